"""Experiments of two papers on empirical NTKs at small scale, on real data: ``python -m bench.experiments --list``."""
