"""The benchmark harness, run from a checkout as `python -m benchmarks.<name>`. Extra `bench`."""

import atexit
import gc

# Nobody needs what torch and timm leave at the end; searching it for cycles takes each process 2 s.
atexit.register(gc.freeze)
