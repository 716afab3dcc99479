"""Projected jobs as the planner sees them: features take the place of the Jacobian, everything else stays."""

from __future__ import annotations

from dataclasses import replace

from .cost import expand_seconds
from .memory import RULE_BYTES, SketchChunks, gathered_rows, sketch_terms
from .rates import MachineRates
from .workload import ParameterBlock, Sketched, Workload

#: Name of the one block that features are.
FEATURES: str = "features"


def features_workload(workload: Workload, rates: MachineRates) -> Workload:
    """The job of contracting features, which are dense, ``dim`` columns wide, and dearer to derive.

    Args:
        workload: the measured job, with its sketch.
        rates: the machine's rates.

    Returns:
        A workload with one block; its seconds per sample are those of deriving, expanding and projecting.
    """
    sketch, derivation, rows = workload.sketch, workload.derivation, workload.rows_per_sample
    assert sketch is not None
    seconds = derivation.capture_seconds_per_sample
    if any(block.source != "rule" for block in workload.blocks):
        seconds += derivation.seconds_per_sample
    for block in workload.blocks:
        if block.source == "rule" and not from_factors(block, sketch):
            seconds += expand_seconds(workload, block, rates)
    seconds += rows * sketch.row_seconds + sketch.batch_seconds / derivation.batch_size
    return replace(
        workload,
        blocks=(ParameterBlock(FEATURES, (FEATURES,), 0, sketch.dim, FEATURES),),
        derivation=replace(
            derivation,
            method="rules",
            seconds_per_sample=seconds,
            chain_seconds_per_sample=seconds,
            capture_seconds_per_sample=0.0,
        ),
        sketch=replace(sketch, batch_terms=_batch_terms(workload, sketch)),
    )


def from_factors(block: ParameterBlock, sketch: Sketched) -> bool:
    """Whether a block's weight is sketched from its factors, so that its gradient is never formed."""
    return block.parameters[0] in sketch.from_factors


def _batch_terms(workload: Workload, sketch: Sketched) -> dict[str, int]:
    """Bytes that one batch takes while it is projected, by term."""
    rows, item, batch = workload.rows_per_sample, workload.item_bytes, workload.derivation.batch_size
    factors = [block.factors for block in workload.blocks if block.factors is not None]
    chunks = SketchChunks.of(workload.device)
    terms = sketch_terms(sketch.projection, batch, rows, item, workload.columns, chunks)
    kept = sum(each.held_bytes(rows, item) for each in factors)
    plain = sum(block.columns for block in workload.blocks if block.source == "rule" and block.factors is None)
    terms["factors of one batch"] = batch * (kept + rows * plain * item)
    if any(each.window is not None for each in factors):
        terms["unfolded inputs"] = 2 * chunks.unfolded_bytes
    others = sum(block.columns for block in workload.blocks if block.source != "rule")
    if others and workload.derivation.method == "loop":
        terms["gathered rows"] = (gathered_rows(others, item) + 1) * others * item
    # Weights of layers with groups are expanded whole, for some samples at a time.
    whole = [block.columns for block in workload.blocks if block.source == "rule" and block.factors is None]
    if whole:
        sample = rows * max(whole) * item
        terms["gradients by rules"] = max(sample, min(RULE_BYTES, batch * sample))
    return terms
