"""Measure the peak memory of a `with` block."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Peak:
    megabytes = math.nan


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block above the memory before it.

    On an accelerator it is that of torch's allocator, on a CPU that of the process (Linux only).
    """
    peak = Peak()
    if device.type != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        yield peak
        torch.accelerator.synchronize()
        peak.megabytes = (torch.accelerator.max_memory_allocated() - before) / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
        before = _status("VmRSS")
        yield peak
        peak.megabytes = (_status("VmHWM") - before) / 2**10


def _status(field: str) -> int:
    """Read a field of the process's status, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
