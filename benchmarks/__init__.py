"""The benchmark harness: what is measured, against whom, and the results as CSV. Run `python -m benchmarks`."""
