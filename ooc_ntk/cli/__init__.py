"""The command line ``ooc-ntk``."""

from __future__ import annotations

from ooc_ntk.stopping import EXIT_TERMINATED

from . import commands, spectrum
from .terminal import EXIT_FINDING, EXIT_INPUT, EXIT_STOPPED, app

__all__ = ["EXIT_FINDING", "EXIT_INPUT", "EXIT_STOPPED", "EXIT_TERMINATED", "app", "commands", "main", "spectrum"]


def main() -> None:
    """Entry point of the ``ooc-ntk`` command."""
    app()
