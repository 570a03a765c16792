"""Versions that results depend on: of packages, and of the computations in this repository."""

from functools import cache
from importlib.metadata import version

import torch

# Raise SCORING when the scores of the same images change, and EVALUATION when the results of the same scores change:
# metrics, intervals, tests, chosen settings. tests/benchmarks/test_software.py fails on both kinds of change.
SCORING = 1
EVALUATION = 2

PIXELS = ("timm", "torchvision", "pillow", "numpy")  # they decode, resize and tile images
PASS = ("torch", *PIXELS)  # they run models
ANSWER = ("torchmetrics", "scipy", "statsmodels")


@cache
def versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}


def tf32(device: str) -> list[str | bool] | None:
    """Return whether matrix products and convolutions use TF32, which changes the third digit; None except on CUDA."""
    if torch.device(device).type != "cuda":
        return None
    return [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]
