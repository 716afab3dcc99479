"""The audit: prove a finished kernel without trusting the engine that made it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from ooc_ntk.algebra.features import Features
from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.algebra.layers import LAYERS
from ooc_ntk.compute.functions import ClipOutput
from ooc_ntk.errors import StorageError
from ooc_ntk.planning.layers import layer_of
from ooc_ntk.planning.outputs import OutputSpec
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tiles import Range
from ooc_ntk.storage.arrays import open_tile_array
from ooc_ntk.storage.manifest import Manifest

from .audit_features import FeatureReference
from .context import SampleReader
from .prepare import PreparedJob

#: Samples whose rows, and columns, are recomputed by default: 8 × 8 entries (a choice: seconds for a small network).
AUDITED_SAMPLES: Final = 8

#: A projected kernel passes if its residual is at most so many times the predicted one: all entries share R, so that
#: their errors are large together or small together (a choice; on two small networks the largest of 200 seeds was 4.0).
RESIDUAL_TIMES: Final = 6.0


#: Kernel tiles whose layers are added up (a choice: every layer's tile is read).
SUMMED_TILES: Final = 16

#: Each layer's kernel is rounded once to what is stored, and so is their sum.
LAYERS_TOLERANCE: Final = 1e-6


@dataclass(frozen=True)
class Check:
    """One part of an audit.

    Attributes:
        name: what was checked.
        passed: whether it held.
        detail: figures, or what is wrong.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Audit:
    """The outcome of an audit.

    Attributes:
        checks: every check, in order.
        relative_error: relative Frobenius error of the recomputed entries; None if none were recomputed.
        entries: number of recomputed entries.
        coverage: recomputed entries over all entries.
        tolerance: the plan's tolerance.
        predicted_error: of a projected kernel, the error that its error bars predict of these entries.
    """

    checks: tuple[Check, ...]
    relative_error: float | None
    entries: int
    coverage: float
    tolerance: float
    predicted_error: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.passed for check in self.checks)


def audit(
    root: Path,
    plan: Plan,
    prepared: PreparedJob | None,
    samples: int = AUDITED_SAMPLES,
    seed: int = 0,
    advance: Callable[[str], None] = lambda what: None,  # noqa: ARG005
) -> Audit:
    """Check a finished run: checksums, structure, and entries recomputed in float64.

    Args:
        root: run directory.
        plan: its plan.
        prepared: the job, for recomputing entries; None leaves that out.
        samples: samples whose rows and columns are recomputed.
        seed: of the choice of samples.
        advance: told what is being checked.

    Returns:
        The outcome.
    """
    advance("checksums")
    checks = [_checksums(root)]
    if checks[0].passed:
        advance("structure")
        if plan.projection is not None:
            checks.append(_finite_features(Kernel(root).features))
        if not plan.features_only:
            checks.extend(_structure(root, plan))
        if plan.layers:
            checks.append(_layers_add_up(root, plan, seed))
    found: _Recomputed | None = None
    if prepared is not None and all(check.passed for check in checks):
        advance("recomputing entries in float64")
        found = _recompute(root, plan, prepared, samples, seed)
        checks.extend(_judged(plan, found))
    rows, columns = plan.kernel_shape
    if found is None:
        return Audit(tuple(checks), None, 0, 0.0, plan.tolerance)
    coverage = found.entries / (rows * columns)
    return Audit(tuple(checks), found.error, found.entries, coverage, plan.tolerance, found.predicted)


@dataclass(frozen=True)
class _Recomputed:
    """What recomputing some entries showed.

    Attributes:
        error: relative Frobenius error of the entries.
        entries: how many there are.
        layers_error: largest error of a layer's entries, relative to the whole kernel's; None if none are kept.
        features_error: of a projected kernel, relative error of the recomputed features.
        features: how many numbers of them.
        predicted: of a projected kernel, the relative error that its error bars predict.
    """

    error: float
    entries: int
    layers_error: float | None = None
    features_error: float = 0.0
    features: int = 0
    predicted: float | None = None


def _judged(plan: Plan, found: _Recomputed) -> list[Check]:
    """Verdicts on recomputed entries."""
    if found.predicted is None:
        checks = [
            Check(
                "entries recomputed in float64",
                found.error <= plan.tolerance,
                f"{found.entries} entries, relative error {found.error:.1e}, tolerance {plan.tolerance:.0e}",
            )
        ]
        if found.layers_error is not None:
            checks.append(
                Check(
                    "layers recomputed in float64",
                    found.layers_error <= plan.tolerance,
                    f"{found.entries} entries of each of {len(plan.layers)} layers, largest error "
                    f"{found.layers_error:.1e} of the kernel's norm",
                )
            )
        return checks
    return [
        Check(
            "features recomputed in float64",
            found.features_error <= plan.tolerance,
            f"{found.features:,} numbers, relative error {found.features_error:.1e}, tolerance {plan.tolerance:.0e}",
        ),
        Check(
            "residual of the projection",
            found.error <= RESIDUAL_TIMES * found.predicted + plan.tolerance,
            f"{found.entries} exact entries, relative residual {found.error:.2%}, predicted {found.predicted:.2%}",
        ),
    ]


def _finite_features(features: Features) -> Check:
    """Every feature is a number."""
    bad, count = 0, 0
    for panel in features.panels():
        values = features.read(panel)
        bad, count = bad + int((~np.isfinite(values)).sum()), count + values.size
    return Check("finite features", bad == 0, f"{count:,} numbers" if not bad else f"{bad:,} are NaN or infinite")


def _checksums(root: Path) -> Check:
    """Every committed file against its checksum."""
    manifest = Manifest(root, read_only=True)
    try:
        files = manifest.files()
        damage = manifest.damage(thorough=True)
    finally:
        manifest.close()
    if damage.reasons:
        with suppress(StorageError):  # a read-only copy can be verified too
            manifest = Manifest(root)
            manifest.distrust(damage.reasons)
            manifest.close()
        shown = "; ".join(f"{path} {reason}" for path, reason in list(damage.reasons.items())[:5])
        more = f" and {len(damage.reasons) - 5} more" if len(damage.reasons) > 5 else ""
        return Check("checksums", False, f"{shown}{more}; 'ooc-ntk run' computes them again")
    return Check("checksums", True, f"{len(files)} files")


def _structure(root: Path, plan: Plan) -> list[Check]:
    """Finite entries, symmetry of the train square, positive diagonal, tile by tile."""
    kernel, diagonal = open_tile_array(root, "kernel.zarr"), open_tile_array(root, "diagonal")
    grid, entries = plan.sample_grid, plan.entries_per_sample
    bad, worst, checked = 0, 0.0, 0
    diagonal_error = 0.0
    diagonals = np.asarray(diagonal[:])
    for i, j in grid.kernel_tiles():
        rows, columns = grid.rows(i), grid.columns(j)
        tile = np.asarray(kernel[_times(rows, entries), _times(columns, entries)])
        bad += int((~np.isfinite(tile)).sum())
        checked += tile.size
        train = grid.mirror_rows(i) * entries
        if train:
            start = rows.start * entries
            other = np.asarray(kernel[_times(columns, entries), start : start + train])
            bad += int((~np.isfinite(other)).sum())
            with np.errstate(invalid="ignore"):
                worst = max(worst, float(np.abs(tile[:train] - other.T).max(initial=0.0)))
        if i == j and plan.normalize is None:
            mine = tile.diagonal()
            stored = diagonals[rows.start * entries :][: mine.size]
            scale = float(np.abs(stored).max(initial=0.0)) or 1.0
            diagonal_error = max(diagonal_error, float(np.abs(mine - stored).max(initial=0.0)) / scale)
    negative = int((diagonals < 0).sum() + (~np.isfinite(diagonals)).sum())
    return [
        Check("finite entries", bad == 0, f"{checked:,} entries" if bad == 0 else f"{bad:,} are NaN or infinite"),
        Check("symmetry", worst == 0.0, "exact" if worst == 0.0 else f"entries differ by up to {worst:.1e}"),
        Check(
            "diagonal",
            negative == 0 and diagonal_error <= max(plan.tolerance, 1e-6 if plan.precision != "float64" else 0.0),
            f"{diagonals.size:,} entries, none negative, {diagonal_error:.1e} from the stored one"
            if negative == 0
            else f"{negative} entries are negative or not finite",
        ),
    ]


def _layers_add_up(root: Path, plan: Plan, seed: int) -> Check:
    """Whether the layers' kernels add up to the kernel, in some tiles, and none of them holds a missing entry."""
    grid, entries = plan.sample_grid, plan.entries_per_sample
    tiles = list(grid.kernel_tiles())
    random = np.random.default_rng(seed)
    chosen = [tiles[index] for index in sorted(random.permutation(len(tiles))[:SUMMED_TILES])]
    kernel, layers = open_tile_array(root, "kernel.zarr"), open_tile_array(root, LAYERS)
    worst, bad = 0.0, 0
    for i, j in chosen:
        rows, columns = _times(grid.rows(i), entries), _times(grid.columns(j), entries)
        wanted = np.asarray(kernel[rows, columns], dtype=np.float64)
        total = np.zeros_like(wanted)
        for layer in range(layers.shape[0]):
            part = np.asarray(layers[layer, rows, columns], dtype=np.float64)
            bad += int((~np.isfinite(part)).sum())
            total += part
        norm = float(np.linalg.norm(wanted)) or 1.0
        worst = max(worst, float(np.linalg.norm(total - wanted)) / norm)
    return Check(
        "layers add up",
        bad == 0 and worst <= LAYERS_TOLERANCE,
        f"{layers.shape[0]} layers, {len(chosen)} of {len(tiles)} tiles, within {worst:.1e}"
        if bad == 0
        else f"{bad:,} entries are NaN or infinite",
    )


def _times(samples: Range, entries: int) -> slice:
    """Kernel rows of a range of samples."""
    return slice(samples.start * entries, samples.stop * entries)


class _Reference:
    """Gradients by plain autograd in float64, one sample and one output at a time, on a copy of the model."""

    def __init__(self, prepared: PreparedJob, plan: Plan) -> None:
        self._module = copy.deepcopy(prepared.module).to("cpu").double().eval()
        self._outputs = prepared.outputs
        self._kernel = plan.kernel
        self._reader: SampleReader = prepared.reader
        chosen = set(prepared.function.names)
        self._variables = [p for name, p in self._module.named_parameters() if name in chosen]
        self._columns: dict[str, list[int]] = {}
        for name, parameter in self._module.named_parameters():
            if name in chosen:
                self._columns.setdefault(layer_of(name), []).append(parameter.numel())

    def layers(self) -> dict[str, slice]:
        """The columns of every layer; a layer's parameters stand side by side."""
        found, start = {}, 0
        for name, sizes in self._columns.items():
            found[name] = slice(start, start + sum(sizes))
            start += sum(sizes)
        return found

    def scalars(self, sample: int) -> list[Tensor]:
        """The scalars whose gradients are the Jacobian rows of a sample, with their graph."""
        (_, found) = next(self._reader.pieces(Range(sample, sample + 1), 1))
        args = [value.double() if value.is_floating_point() else value for value in found.args]
        kwargs = {k: value.double() if value.is_floating_point() else value for k, value in found.kwargs.items()}
        with torch.enable_grad():
            output = self._output(self._module(*args, **kwargs))
            values = self._values(output, None if found.targets is None else found.targets[0])
            if self._kernel == "pseudo":
                return [values.sum()]
            if self._kernel.startswith("output:"):
                return [values[int(self._kernel[7:])]]
            return list(values)

    def _output(self, output: Any) -> Tensor:
        """What a model returned for one sample, as one row: its logits, or the embeddings of a pair."""
        if isinstance(self._outputs, ClipOutput):
            if isinstance(output, dict):
                output = (output["image_embeds"], output["text_embeds"])
            pair = output[:2] if isinstance(output, tuple | list) else (output.image_embeds, output.text_embeds)
            return torch.cat([part.reshape(-1) for part in pair])
        found: Tensor = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
        return found.reshape(-1)

    def _values(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """The output function by its definition, in other words than the engine's."""
        if callable(self._outputs):
            return self._outputs(logits, target).reshape(-1)
        spec = OutputSpec.parse(self._outputs)
        if spec.name == "logits" or (target is None and spec.name != "logprob"):
            return logits[spec.part(logits.numel())]
        if spec.name == "logprob":
            return (logits - torch.logsumexp(logits, 0))[spec.part(logits.numel())]
        assert target is not None
        if spec.name == "loss" and target.is_floating_point():
            return 0.5 * (logits - target.double().reshape(-1)).pow(2).sum().reshape(1)
        if target.numel() > 1:
            steps = logits.reshape(target.numel(), -1)
            if spec.name == "loss":
                return F.cross_entropy(steps, target.reshape(-1)).reshape(1)
            last = int((target.reshape(-1) >= 0).nonzero()[-1])
            return steps[last, int(target.reshape(-1)[last])].reshape(1)
        label = int(target)
        if spec.name == "next-token":
            return logits[label].reshape(1)
        if spec.name == "loss":
            return F.cross_entropy(logits[None], torch.tensor([label])).reshape(1)
        rest = torch.cat([logits[:label], logits[label + 1 :]])
        return (logits[label] - torch.logsumexp(rest, 0)).reshape(1)

    def gradient(self, scalar: Tensor) -> Tensor:
        """One Jacobian row (parameters,) float64."""
        parts = torch.autograd.grad(
            scalar, self._variables, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.reshape(-1) for part in parts])


def _recompute(root: Path, plan: Plan, prepared: PreparedJob, samples: int, seed: int) -> _Recomputed:
    """Relative error of randomly chosen entries, and of the features behind them."""
    random = np.random.default_rng(seed)
    rows = np.sort(random.choice(plan.samples, min(samples, plan.samples), replace=False))
    among = [int(row) for row in rows if row < plan.train_samples][: samples // 2]
    others = random.permutation(np.setdiff1d(np.arange(plan.train_samples), among))[: samples - len(among)]
    columns = np.sort(np.concatenate([np.asarray(among, dtype=np.int64), others.astype(np.int64)]))
    reference = _Reference(prepared, plan)
    features = None
    if plan.projection is not None:
        features = FeatureReference(plan, prepared.function, len(rows), seed)
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    layers = dict.fromkeys(plan.layers, slice(0))
    layers.update({name: part for name, part in reference.layers().items() if name in layers})
    parts = np.zeros((len(layers), len(rows) * plan.entries_per_sample, len(columns) * plan.entries_per_sample))
    try:
        expected = _reference_entries(reference, plan, rows, columns, features, list(layers.values()), parts)
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
    kernel = Kernel(root)
    entries = plan.entries_per_sample
    row_index = (rows[:, None] * entries + np.arange(entries)).reshape(-1)
    column_index = (columns[:, None] * entries + np.arange(entries)).reshape(-1)
    stored = np.asarray(kernel[row_index, column_index], dtype=np.float64)
    norm = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(stored - expected))
    if not np.isfinite(error):
        raise StorageError("the recomputed entries are not finite; the model's float64 gradients overflow")
    found = _Recomputed(error / norm if norm else error, int(expected.size))
    if plan.layers:
        mine = np.stack([np.asarray(kernel.layer(name)[row_index, column_index], np.float64) for name in layers])
        found = replace(found, layers_error=float(np.linalg.norm(mine - parts, axis=(1, 2)).max()) / (norm or 1.0))
    if features is None:
        return found
    mine = kernel.features.read(rows)[:, :, features.columns].astype(np.float64)
    scale = float(np.linalg.norm(features.found)) or 1.0
    predicted = float(np.linalg.norm(kernel.errors(row_index, column_index)))
    return replace(
        found,
        features_error=float(np.linalg.norm(mine - features.found)) / scale,
        features=int(mine.size),
        predicted=predicted / (norm or 1.0),
    )


def _reference_entries(
    reference: _Reference,
    plan: Plan,
    rows: np.ndarray,
    columns: np.ndarray,
    features: FeatureReference | None,
    layers: Sequence[slice],
    parts: np.ndarray,
) -> np.ndarray:
    """Kernel entries by the definitions, in float64: (rows · entries, columns · entries).

    ``parts``, (layers, rows · entries, columns · entries), takes the same of every layer's columns.

    Row gradients are held for one output at a time, so memory is (rows + 1) · parameters · 8 bytes.
    """
    full = plan.kernel == "full"
    entries, outputs = plan.entries_per_sample, plan.rows_per_sample
    if plan.head is not None:  # by every output, whatever rows the engine derived
        outputs = plan.outputs
    result = np.zeros((len(rows), entries, len(columns), entries))
    row_norms, column_norms = np.zeros((len(rows), entries)), np.zeros((len(columns), entries))
    for c in range(outputs):
        held = torch.stack([reference.gradient(reference.scalars(int(row))[c]) for row in rows])
        row_norms[:, c if full else 0] += held.square().sum(1).numpy()
        if features is not None:
            features.add(c, held.numpy())
        for j, column in enumerate(columns):
            scalars = reference.scalars(int(column))
            for d in range(outputs) if full else (c,):
                gradient = reference.gradient(scalars[d])
                first, second = (c, d) if full else (0, 0)
                result[:, first, j, second] += (held @ gradient).numpy()
                for part, there in zip(parts, layers, strict=True):
                    part[first::entries, j * entries + second] += (held[:, there] @ gradient[there]).numpy()
                if c == d:
                    column_norms[j, d if full else 0] += float(gradient @ gradient)
    if plan.scale == "mean":
        result /= plan.outputs
        parts /= plan.outputs
    flat = result.reshape(len(rows) * entries, len(columns) * entries)
    if plan.normalize == "cosine":
        scale = plan.outputs if plan.scale == "mean" else 1
        left, right = np.sqrt(row_norms.reshape(-1) / scale), np.sqrt(column_norms.reshape(-1) / scale)
        flat = flat * np.divide(1, left, out=np.zeros_like(left), where=left > 0)[:, None]
        flat = flat * np.divide(1, right, out=np.zeros_like(right), where=right > 0)[None, :]
    return flat
