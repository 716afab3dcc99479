"""``python -m ooc_ntk``."""

from .cli import main

main()
