"""Peers: what else can compute a trace kernel, each in a module of its own, all answering one call.

A peer is a function from (model in eval mode, inputs) to :class:`Result`; it raises :class:`Refused` with a reason
where it cannot do the job, or is not installed. ``bench.contenders`` lists them.
"""

from .plain import chunks_within, exact_kernel, jacobian_contraction, per_sample_loop
from .result import MEMORY_BYTES, Refused, Result

__all__ = [
    "MEMORY_BYTES",
    "Refused",
    "Result",
    "chunks_within",
    "exact_kernel",
    "jacobian_contraction",
    "per_sample_loop",
]
