"""Measurements: `python -m benchmarks.NAME` in the root of the repository. Numbers in documents come from here."""
