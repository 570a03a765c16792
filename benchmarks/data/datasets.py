"""Which photographs with which labels."""

import hashlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, IterableImageDataset

from timm_csra.pictures import in_rgb

from .classes import NotApplicableError


class DataError(ValueError):
    """The data cannot be read or used; the text names the file, what was found and what was expected."""


class Store(Protocol):
    """Photographs that are no files of their own: an archive, a dataset of another library."""

    def open(self, index: int) -> Any:
        """What PIL opens, or a PIL image."""


@dataclass(frozen=True)
class _Part:
    """Some of the photographs of a store."""

    store: Store
    indices: tuple[int, ...]

    def open(self, index: int) -> Any:
        return self.store.open(self.indices[index])


@dataclass(frozen=True)
class Source:
    """A stream of images and labels, opened anew for each pass.

    Attributes:
        open: gives timm's dataset.
        count: number of images that it declares; 0 where it does not say.
    """

    open: Callable[[], IterableImageDataset]
    count: int


@dataclass(frozen=True)
class ImageSet:
    """Photographs with their labels.

    Attributes:
        name: what records and tables call it.
        paths: files, `(n,)`; with a store, names in it.
        labels: class indices of each photograph; exactly one each unless `multilabel`.
        classes: names as the data declares them: synsets, label names, or `synset description`.
        multilabel: whether a photograph may have several labels, or none.
        tilings: which photographs form each mosaic, where the data prescribes it. A photograph may then come twice,
            mosaics are not independent, and nothing is inferred from them.
        ignored: class indices of each photograph that are not judged (`difficult` in Pascal VOC).
        store: where the photographs are, None for files.
        stream: of images with one label each, which have no list: paths and labels are empty.
        where: the folder or file they are in; None where that does not matter.
        content: of what is in a store or a stream, whatever changes with it; for each photograph, or of all together.
        calibration: by what lam is chosen, without labels, for the protocol `agreement` on this data.
        order: what puts `classes` into an order that a training on such data takes too; None where nothing does.
    """

    name: str
    paths: tuple[Path, ...]
    labels: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...]
    multilabel: bool = False
    tilings: tuple[tuple[int, ...], ...] | None = None
    ignored: tuple[tuple[int, ...], ...] | None = None
    store: Store | None = None
    stream: Source | None = None
    where: str | None = None
    content: tuple[str, ...] | str = ""
    calibration: "Calibration | None" = None
    order: str | None = None

    def __len__(self) -> int:
        return len(self.paths) if self.stream is None else self.stream.count

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the place, with what is in it (size and time of each file; see `content`), the labels and the
        classes."""
        digest = hashlib.sha256(repr((self.where, self.name if self.stream else None)).encode())
        content = self.content or tuple(map(state_of_file, self.paths))
        several = content if isinstance(content, tuple) else (content,) * len(self.paths)
        digest.update(b"" if self.paths else repr(content).encode())
        for path, state, labels in zip(self.paths, several, self.labels, strict=True):
            digest.update(f"{path.name} {state} {labels}\n".encode())
        digest.update("\n".join(self.classes).encode())
        digest.update(repr((self.ignored, self.tilings)).encode())
        return digest.hexdigest()[:16]

    def open(self, index: int) -> Image.Image:
        """The whole photograph in RGB, see `in_rgb`; DataError, naming it, where it cannot be decoded."""
        with self.opened(index) as image:
            return in_rgb(image)

    @contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        """The photograph as it is stored, not decoded yet; DataError, naming it, also where decoding it then fails."""
        path = self.paths[index]
        try:
            image = Image.open(path) if self.store is None else self.store.open(index)
            with image if isinstance(image, Image.Image) else Image.open(image) as opened:
                yield opened
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be read as an image: {error}") from error

    def sample(self, count: int | None, seed: int) -> "ImageSet":
        """So many photographs, drawn by the seed and in their order, or all. A larger sample has all of a smaller one.

        Raises:
            DataError: of a stream, which would have to be read to its end.
        """
        if self.stream and count is not None:
            raise DataError(f"{self.name}: --limit needs a list of the images, which a stream does not have.")
        if count is None or count >= len(self):
            return self
        return self.some(sorted(np.random.default_rng(seed).permutation(len(self))[:count].tolist()))

    def some(self, indices: Sequence[int]) -> "ImageSet":
        """These photographs."""
        ignored = self.ignored and tuple(self.ignored[i] for i in indices)
        paths, labels = tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices)
        store = self.store and _Part(self.store, tuple(indices))
        content = self.content if isinstance(self.content, str) else tuple(self.content[i] for i in indices)
        return replace(self, paths=paths, labels=labels, ignored=ignored, store=store, content=content)


def state_of_file(path: Path) -> str:
    """What changes with the content of a file: its size, and when it was written."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


@dataclass(frozen=True)
class Calibration:
    """Pictures of one object each, by which lam is chosen without labels for the data that they go with.

    Attributes:
        pictures: those that do not also stand among the data measured.
        fingerprint: of all that were given.
        left_out: names of those that do.
        reason: why lam is not chosen for this data, or None.
    """

    pictures: ImageSet
    fingerprint: str
    left_out: tuple[str, ...] = ()
    reason: str | None = None


@cache
def _real_labels() -> list[list[int]]:
    return json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") or b"")


def real_labels(data: ImageSet) -> ImageSet:
    """The same photographs with their ImageNet ReaL labels (Beyer et al., arXiv 2006.07159), found by file name.

    Raises:
        NotApplicableError: a photograph is not called as one of the 50,000 of the validation set.
    """
    labels = []
    for path in data.paths:
        stem, number = path.stem[:-8], path.stem[-8:]
        if stem != "ILSVRC2012_val_" or not number.isdigit() or not 1 <= int(number) <= len(_real_labels()):
            raise NotApplicableError(
                f"no ReaL label for {path.name}: expected names such as ILSVRC2012_val_00000293.JPEG"
            )
        labels.append(tuple(_real_labels()[int(number) - 1]))
    classes = tuple(ImageNetInfo().label_names())
    return replace(data, labels=tuple(labels), classes=classes, multilabel=True, order=None)


def tilings(data: ImageSet, grid: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Which photographs form each mosaic: a seeded permutation in groups of grid^2, each photograph at most once."""
    if data.tilings is not None:
        return data.tilings
    tiles = grid * grid
    order = np.random.default_rng(seed).permutation(len(data)).tolist()
    return tuple(tuple(order[start : start + tiles]) for start in range(0, len(data) // tiles * tiles, tiles))


def open_image(path: Path) -> Image.Image:
    """The whole image in RGB; DataError, naming the file, where it cannot be decoded."""
    return ImageSet(path.name, (path,), ((),), ()).open(0)
