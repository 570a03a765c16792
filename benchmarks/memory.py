"""Peak memory of what is done within a block."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Peak:
    megabytes = math.nan


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Peak memory of what is done within, above what there was before: of the allocator, or on a CPU of the process
    (Linux)."""
    peak = Peak()
    if device.type != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        yield peak
        torch.accelerator.synchronize()
        peak.megabytes = (torch.accelerator.max_memory_allocated() - before) / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
        before = _status("VmRSS")
        yield peak
        peak.megabytes = (_status("VmHWM") - before) / 2**10


def _status(field: str) -> int:
    """Kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
