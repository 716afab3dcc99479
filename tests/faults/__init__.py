"""Randomised faults: a run is killed, starved of space or damaged at random moments, and never gives a wrong number."""
