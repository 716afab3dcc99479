"""The command line ``ooc-ntk``."""

from __future__ import annotations

from ooc_ntk.stopping import EXIT_TERMINATED

from . import commands, fit, nearest, report, spectrum, surrogate
from .terminal import EXIT_FINDING, EXIT_INPUT, EXIT_STOPPED, app

__all__ = [
    "EXIT_FINDING",
    "EXIT_INPUT",
    "EXIT_STOPPED",
    "EXIT_TERMINATED",
    "app",
    "commands",
    "fit",
    "main",
    "nearest",
    "report",
    "spectrum",
    "surrogate",
]


def main() -> None:
    """Entry point of the ``ooc-ntk`` command."""
    app()
