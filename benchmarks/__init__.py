"""The measurements behind the numbers in the documents. Run `python -m benchmarks.NAME` in the repository's root."""
