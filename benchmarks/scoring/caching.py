"""Let passes share decoded images in the folder of `--cache-images`."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from timm.data import resolve_data_config

from ..data.datasets import ImageSet
from ..data.pixels import Entry
from ..records.files import Record
from . import software
from .cells import Cell, Options


def cache_images(loader: Any, data: ImageSet, config: Record, options: Options, grid: int | None = None) -> None:
    """Make a loader read its images from `options.cache_images`, after writing them there if need be.

    The loader must not have started its workers. `config` is timm's data config, which determines the transform.

    Raises:
        OSError: see `Entry.get`.
    """
    entry = entry_of(data, config, options, len(loader.dataset), grid)
    loader.dataset.pixels = entry.get(loader.dataset, options.batch_size, loader.num_workers)


def entry_of(data: ImageSet, config: Record, options: Options, images: int, grid: int | None = None) -> Entry:
    """Return the cache's entry for the images of a pass."""
    assert options.cache_images is not None
    # Images are cached before normalisation, so `std` and `mean` do not matter, except that `border` pads with `mean`.
    left_out = {"std"} if config["crop_mode"] == "border" else {"std", "mean"}
    identity = {
        "data": data.fingerprint,
        "where": data.where,
        "mosaic": [grid, options.seed] if grid else None,
        "preprocessing": {name: value for name, value in config.items() if name not in left_out},
        "versions": software.versions(*software.PIXELS),
        "scoring": software.SCORING,
    }
    height, width = config["input_size"][-2:]
    name = f"{data.name}--mosaic{grid}" if grid else data.name
    return Entry(Path(options.cache_images), name, images, (height, width), identity)


@dataclass(frozen=True)
class Wanted:
    """The entries that cells will read from a cache, and the names of `streams`, which cannot be cached."""

    cache: Path
    entries: tuple[Entry, ...]
    streams: tuple[str, ...]

    @property
    def lacking(self) -> int:
        """Bytes of the entries that are not in the cache yet."""
        return sum(entry.bytes for entry in self.entries if not entry.folder.is_dir())

    @property
    def free(self) -> int:
        """Free bytes on the disk of the cache."""
        there = next(folder for folder in (self.cache, *self.cache.parents) if folder.is_dir())
        return shutil.disk_usage(there).free

    def __str__(self) -> str:
        every = sum(entry.bytes for entry in self.entries)
        streams = "".join(f" {name} is a stream, which cannot be cached." for name in self.streams)
        return (
            f"--cache-images {self.cache}: {len(self.entries)} sets of decoded images, {decimal(every)}, of which "
            f"{decimal(every - self.lacking)} are in the cache; {decimal(self.free)} are free on its disk.{streams}"
        )


def wanted(cells: Iterable[Cell], options: Options) -> Wanted:
    """Return what the cells will read from `options.cache_images`, without those whose configuration is unknown."""
    assert options.cache_images is not None
    entries: dict[Path, Entry] = {}
    streams: dict[str, None] = {}
    for cell in cells:
        if cell.own is None or isinstance(cell.size, str):  # the configuration could not be read
            continue
        read = [cell]
        if cell.data.calibration and not cell.data.calibration.reason:  # they are never tiled
            read.append(replace(cell, data=cell.data.calibration.pictures, task="single", grid=None))
        for images in read:
            if images.data.stream is not None:
                streams[images.data.name] = None
                continue
            config = resolve_data_config(images.preparation(options), pretrained_cfg=cell.checkpoint.pretrained_cfg)
            entry = entry_of(images.data, config, options, images.images, images.grid)
            entries[entry.folder] = entry
    return Wanted(Path(options.cache_images), tuple(entries.values()), tuple(streams))
