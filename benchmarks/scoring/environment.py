"""Describe the machine and the software that a record was made with."""

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from ..records.files import Record
from .cells import Options
from .software import versions

PACKAGES = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "scipy", "statsmodels", "pillow")


def environment(options: Options) -> Record:
    """Describe this machine and its software. `Run.write` adds the commit."""
    device = torch.device(options.device)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(*PACKAGES),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "batch_size": options.batch_size,
    }


@cache
def commit() -> str | None:
    """Return the commit of the checkout, with `-dirty` if it has local changes; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
