"""Versions that figures depend on: of packages, and of what is computed here."""

from functools import cache
from importlib.metadata import version

import torch

# Raise the first when scores of the same pixels change, the second when what is computed from the same scores does:
# metrics, intervals, tests, the settings that are chosen. tests/benchmarks/test_software.py notices both.
SCORING = 1
EVALUATION = 2

PIXELS = ("timm", "torchvision", "pillow", "numpy")  # decode, resize and tile
PASS = ("torch", *PIXELS)  # and run models
ANSWER = ("torchmetrics", "scipy", "statsmodels")


@cache
def versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}


def tf32(device: str) -> list[str | bool] | None:
    """Whether matrices and convolutions are multiplied in TF32, which changes the third digit; None but on CUDA."""
    if torch.device(device).type != "cuda":
        return None
    return [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]
