"""Parts of ``python -m bench``: what a bench module registers, and peers of one's own.

A module registers a part with :func:`part`, on a generator of findings. Peers are those of ``bench.contenders``; more
come from the Python files that the variable :data:`PEERS_VARIABLE` names, each with functions from (model, data) to
:class:`bench.peers.Result` by name in a dict ``PEERS``.
"""

from __future__ import annotations

import importlib
import os
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from . import contenders
from .bars import Bar
from .records import Finding

#: Modules that register a part, in the order in which parts run.
MODULES: Final = (
    "side_by_side",
    "growth",
    "memory",
    "outofcore",
    "projection_part",
    "algebra_part",
    "cluster",
    "interrupted",
    "savings",
)

#: Environment variable: files with peers of one's own, separated as paths are.
PEERS_VARIABLE: Final = "OOC_NTK_BENCH_PEERS"


@dataclass(frozen=True)
class Part:
    """What one module measures in ``python -m bench``.

    Attributes:
        name: what ``--parts`` takes.
        title: what it is about.
        measure: gives findings one after another; True asks for smoke size.
        seconds: what it takes on two cores that do nothing else (reckoned from longer runs).
        limit_seconds: after which it is ended; what it gave back until then counts.
        bars: the figures that it judges. One that is not there in the end is not measured.
        results: the page of ``bench/results`` with longer runs.
        asked: whether it is played only where it is named: what it needs or takes is too much for every time.
    """

    name: str
    title: str
    measure: Callable[[bool], Iterator[Finding]]
    seconds: float
    limit_seconds: float
    bars: tuple[Bar, ...] = ()
    results: str = ""
    asked: bool = False


#: Parts by name.
PARTS: dict[str, Part] = {}


def part(
    name: str,
    title: str,
    *,
    seconds: float,
    limit_seconds: float,
    bars: tuple[Bar, ...] = (),
    results: str = "",
    asked: bool = False,
) -> Callable[[Callable[[bool], Iterator[Finding]]], Callable[[bool], Iterator[Finding]]]:
    """Register a generator of findings as a part. See :class:`Part`."""

    def register(measure: Callable[[bool], Iterator[Finding]]) -> Callable[[bool], Iterator[Finding]]:
        PARTS[name] = Part(name, title, measure, seconds, limit_seconds, bars, results, asked)
        return measure

    return register


def load_parts() -> dict[str, Part]:
    """Import all modules that register parts.

    Returns:
        The parts, in the order of :data:`MODULES`.
    """
    names = [f"bench.{module}" for module in MODULES]
    for name in names:
        importlib.import_module(name)
    return {part.name: part for name in names for part in PARTS.values() if part.measure.__module__ == name}


def load_peers() -> None:
    """Add the peers of the files that :data:`PEERS_VARIABLE` names to those of ``bench.contenders``."""
    for path in filter(None, os.environ.get(PEERS_VARIABLE, "").split(os.pathsep)):
        for name, compute in runpy.run_path(path)["PEERS"].items():
            contenders.CONTENDERS[name] = compute
            contenders.PEERS[name] = name
