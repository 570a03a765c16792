"""Where and with what a record was made."""

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
    """Where and with what a record is made. The commit is added by who writes it."""
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
    """Commit of the checkout, with `-dirty` where it was changed; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
