"""Measure the peak memory of a `with` block, in a process of its own if that of earlier work would hide it."""

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

Found = TypeVar("Found")


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


def in_process(function: Callable[..., Found], *arguments: object) -> Found:
    """Call a function in a new process, which ends afterwards. No `Pool`, whose processes may not have children."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _status(field: str) -> int:
    """Read a field of the process's status, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
