"""The measurements behind the numbers in the documentation. In the repository's root, run python -m benchmarks.NAME."""
