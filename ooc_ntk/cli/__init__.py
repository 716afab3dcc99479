"""The command line ``ooc-ntk``."""

from __future__ import annotations

from ooc_ntk.stopping import EXIT_TERMINATED

from .commands import EXIT_FINDING, EXIT_INPUT, EXIT_STOPPED, app, main

__all__ = ["EXIT_FINDING", "EXIT_INPUT", "EXIT_STOPPED", "EXIT_TERMINATED", "app", "main"]
