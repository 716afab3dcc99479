"""Benchmarks: ooc-ntk beside what its users would otherwise write, measured in one run."""
