"""Sections of the report: what is read of a run, and what is said of it."""
