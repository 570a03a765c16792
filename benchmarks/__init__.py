"""The benchmark harness, run from a checkout as `python -m benchmarks.<name>`. Extra `bench`."""
