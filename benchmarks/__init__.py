"""The benchmark harness, run from a checkout as `python -m benchmarks.<name>`. Extra `bench`."""

import atexit
import gc

# Importing torch and timm creates a million objects; with Python's thresholds, searching for cycles among them takes up
# to a fifth of the start of each process.
gc.set_threshold(10_000, 5, 10)
# Nobody needs what torch and timm leave at the end; searching it for cycles takes each process 2 s.
atexit.register(gc.freeze)
