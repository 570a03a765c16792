"""The embedded sample: photographs in the scikit-image and scikit-learn wheels, for a sweep without downloads.

A person, not a model, chose the synsets of each photograph. Seven photographs are a demonstration, not evidence.
"""

import hashlib
import importlib.metadata
import itertools
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageNetInfo

from .datasets import DataError, ImageSet


@dataclass(frozen=True)
class Photograph:
    """A file of a wheel, the ImageNet-1k synsets that count as correct for it, and its attribution."""

    wheel: str
    file: str
    synsets: tuple[str, ...]
    attribution: str


PHOTOGRAPHS = (
    Photograph(
        "scikit-image",
        "skimage/data/astronaut.png",
        ("n04266014",),  # the space shuttle behind her
        "Eileen Collins, NASA, public domain",
    ),
    Photograph(
        "scikit-image",
        "skimage/data/camera.png",
        ("n04485082",),  # tripod
        "Lav Varshney, CC0",
    ),
    Photograph(
        "scikit-image",
        "skimage/data/chelsea.png",
        ("n02123045", "n02123159", "n02124075"),  # tabby, tiger cat, Egyptian cat
        "Chelsea the cat, Stefan van der Walt, CC0",
    ),
    Photograph(
        "scikit-image",
        "skimage/data/coffee.png",
        ("n07920052", "n07930864"),  # espresso, cup
        "Pikolo Espresso Bar, Rachel Michetti, CC0",
    ),
    Photograph(
        "scikit-image",
        "skimage/data/motorcycle_left.png",
        ("n03785016",),  # moped, the class nearest to a motorcycle
        "Middlebury 2014 stereo benchmark, Scharstein et al.",
    ),
    Photograph(
        "scikit-image",
        "skimage/data/rocket.jpg",
        ("n03773504", "n04008634"),  # missile; projectile, missile
        "Launch of DSCOVR on Falcon 9, SpaceX, public domain",
    ),
    Photograph(
        "scikit-learn",
        "sklearn/datasets/images/china.jpg",
        ("n03877845",),  # palace
        "danielbuechele on Flickr, CC BY 2.0",
    ),
)

NOTE = (
    f"{len(PHOTOGRAPHS)} photographs, not evidence: mosaics that share photographs have no intervals and no crossfit."
)


def path_of(photograph: Photograph) -> Path:
    try:
        path = Path(str(importlib.metadata.distribution(photograph.wheel).locate_file(photograph.file)))
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{photograph.wheel} is not installed; pip install -e '.[bench]'") from None
    if not path.is_file():
        raise DataError(
            f"{path}: no such file in the installed {photograph.wheel} {importlib.metadata.version(photograph.wheel)}."
        )
    return path


def load_sample() -> ImageSet:
    """Load the photographs, and every mosaic of four of them (35), as a multi-label set over ImageNet-1k."""
    synsets = ImageNetInfo().label_names()
    paths = tuple(path_of(photograph) for photograph in PHOTOGRAPHS)
    return ImageSet(
        name="sample",
        paths=paths,
        labels=tuple(tuple(sorted(map(synsets.index, photograph.synsets))) for photograph in PHOTOGRAPHS),
        classes=tuple(synsets),
        multilabel=True,
        # By content, so that the fingerprint does not depend on where the wheels are installed.
        content=tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths),
        tilings=tuple(itertools.combinations(range(len(PHOTOGRAPHS)), 4)),
    )
