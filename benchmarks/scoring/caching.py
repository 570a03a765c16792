"""Which decoded images a pass can share with others, and that it does."""

import hashlib
from pathlib import Path
from typing import Any

from ..data.datasets import ImageSet
from ..data.pixels import Entry
from ..records.files import Record
from . import software
from .cells import Options


def cache_images(loader: Any, data: ImageSet, config: Record, options: Options, grid: int | None = None) -> None:
    """Have a loader that has not begun read its images from `options.cache_images`, after they are put there if they are
    not. `config` is timm's, of the transform.

    Raises:
        OSError: see `Entry.get`.
    """
    entry = entry_of(data, config, options, len(loader.dataset), grid)
    loader.dataset.pixels = entry.get(loader.dataset, options.batch_size, loader.num_workers)


def entry_of(data: ImageSet, config: Record, options: Options, images: int, grid: int | None = None) -> Entry:
    """Where the cache has the images of a pass."""
    assert options.cache_images is not None
    # Colours are scaled after what is kept; only the border is of their mean.
    left_out = {"std"} if config["crop_mode"] == "border" else {"std", "mean"}
    paths = hashlib.sha256("\n".join(map(str, data.paths)).encode()).hexdigest()
    identity = {
        "data": data.fingerprint,
        "where": data.where,
        "paths": paths,
        "mosaic": [grid, options.seed] if grid else None,
        "preprocessing": {name: value for name, value in config.items() if name not in left_out},
        "versions": software.versions(*software.PIXELS),
        "scoring": software.SCORING,
    }
    height, width = config["input_size"][-2:]
    name = f"{data.name}--mosaic{grid}" if grid else data.name
    return Entry(Path(options.cache_images), name, images, (height, width), identity)
