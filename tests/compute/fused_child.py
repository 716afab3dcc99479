"""Body of a process in which Triton's kernel is run by its interpreter, on the CPU, and compiled without a device."""

from __future__ import annotations

import json
import sys
import warnings

import torch

from ooc_ntk.compute.fused import gram_window, sum_windows
from ooc_ntk.compute.pairwise import contract_pairwise
from tests.compute.fused_cases import CASES, DTYPES, WHOLE, FusedCase, grams, tiles, wanted
from tests.oracle import error


def interpreted(names: list[str]) -> dict[str, dict[str, float]]:
    """Relative errors of the kernel alone, and of some whole contractions, beside float64."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        case = CASES[name]
        torch.manual_seed(0)
        inputs, gradients = grams(case)
        summed = sum_windows(inputs, gradients, case.factors, case.rows, case.columns, case.entries)
        exact = wanted(case, inputs.double(), gradients.double())
        found[name] = {"kernel": error(summed, exact.numpy())}
        if name in WHOLE:
            found[name]["contraction"] = contraction_error(case)
    return found


def contraction_error(case: FusedCase) -> float:
    """Of a whole contraction, beside the unfused one in float64."""
    left, right = tiles(case)
    totals = [torch.full(case.shape, torch.nan, dtype=torch.float64) for _ in range(2)]
    for total, fused in zip(totals, (True, False), strict=True):

        def put(block: torch.Tensor, row: int, column: int, total: torch.Tensor = total) -> None:
            total[row : row + block.shape[0], column : column + block.shape[1]] = block

        sides = (left, right) if fused else [tuple(part.double() for part in side) for side in (left, right)]
        contract_pairwise(case.factors, *sides, case.entries, put, fused=fused)
    return error(totals[0], totals[1].numpy())


def compiled(names: list[str]) -> dict[str, int]:
    """Loads from memory in the code of the kernel for an H100, by case."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from ooc_ntk.compute import fused_triton  # here alone: this file is imported where there is no Triton, too

    kinds = {"float32": "fp32", "bf16": "bf16", "float64": "fp64"}
    found = {}
    for name in names:
        case = CASES[name]
        window = gram_window(case.factors)
        constants = fused_triton.constants_of(
            window, 512, 512, case.entries, DTYPES[case.precision], bias=case.factors.bias
        )
        kind = kinds[case.precision]
        signature = {
            "inputs": f"*{kind}",
            "gradients": f"*{kind}",
            "out": "*fp64" if kind == "fp64" else "*fp32",
            "rows": "i32",
            "columns": "i32",
            **dict.fromkeys(constants, "constexpr"),
        }
        source = ASTSource(fused_triton._sum_pairs, signature, constants)
        code = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=dict(fused_triton._OPTIONS))
        found[name] = code.asm["ptx"].count("ld.global")
    return found


if __name__ == "__main__":
    warnings.simplefilter("error")
    print(json.dumps({"interpreted": interpreted, "compiled": compiled}[sys.argv[1]](sys.argv[2:])))
