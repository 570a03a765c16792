"""Sets of photographs with labels."""

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
from PIL import Image
from timm.data import ImageNetInfo, IterableImageDataset

from timm_csra.pictures import UNREADABLE, in_rgb

from .classes import NotApplicableError


class DataError(ValueError):
    """The data cannot be read or used; the text names the file, what was found and what was expected."""


class Store(Protocol):
    """Photographs that are not files: members of an archive, or items of another library's dataset."""

    def open(self, index: int) -> Any:
        """Return a PIL image, or a file or path that PIL can open."""


@dataclass(frozen=True)
class _Part:
    """Some of the photographs of a store."""

    store: Store
    indices: tuple[int, ...]

    def open(self, index: int) -> Any:
        return self.store.open(self.indices[index])


@dataclass(frozen=True)
class Source:
    """A stream of images and labels, opened again for each pass.

    Attributes:
        open: returns timm's dataset.
        count: number of images that the dataset declares; 0 if it declares none.
    """

    open: Callable[[], IterableImageDataset]
    count: int


@dataclass(frozen=True)
class ImageSet:
    """Photographs with their labels.

    Attributes:
        name: name in records and tables.
        paths: the n files; with a store, the n names in it.
        labels: class indices of each photograph; exactly one each unless `multilabel`.
        classes: names as the data declares them: synsets, label names, or `synset description`.
        multilabel: whether a photograph may have several labels, or none.
        tilings: the photographs of each mosaic, if the data prescribes them. Mosaics may then share photographs and are
            not independent, so they get no intervals or tests.
        ignored: class indices that metrics ignore for each photograph (`difficult` in Pascal VOC).
        store: opens the photographs; None if they are files.
        stream: the source of images with one label each. A stream has no list of images: paths and labels are empty.
        where: the folder or file of the photographs; None if it does not matter.
        content: a fingerprint of the content of a store or stream, for each photograph or for all together.
        calibration: pictures for the protocol `agreement`, which chooses lam without labels.
        order: describes the order of `classes`, if training code uses the same one for such data; else None.
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
        """Hash of the folder, file names, content (size and time of each file; see `content`), labels and classes."""
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
        """Decode a photograph and convert it to RGB, see `in_rgb`; raises DataError with its name if that fails."""
        with self.opened(index) as image:
            return in_rgb(image)

    @contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        """Open a photograph without decoding it.

        Raises:
            DataError: it cannot be opened, or cannot be decoded within the block; the text names it.
        """
        path = self.paths[index]
        try:
            image = Image.open(path) if self.store is None else self.store.open(index)
            with image if isinstance(image, Image.Image) else Image.open(image) as opened:
                yield opened
        except UNREADABLE as error:
            raise DataError(f"{path}: cannot be read as an image: {error}") from error

    def sample(self, count: int | None, seed: int) -> "ImageSet":
        """Draw `count` photographs at random and keep their order; None keeps all.

        A larger sample with the same seed contains a smaller one.

        Raises:
            DataError: the data is a stream, which has no list of its images.
        """
        if self.stream and count is not None:
            raise DataError(f"{self.name}: --limit needs a list of the images, which a stream does not have.")
        if count is None or count >= len(self):
            return self
        return self.some(sorted(np.random.default_rng(seed).permutation(len(self))[:count].tolist()))

    def some(self, indices: Sequence[int]) -> "ImageSet":
        """Return the set of these photographs only."""
        ignored = self.ignored and tuple(self.ignored[i] for i in indices)
        paths, labels = tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices)
        store = self.store and _Part(self.store, tuple(indices))
        content = self.content if isinstance(self.content, str) else tuple(self.content[i] for i in indices)
        return replace(self, paths=paths, labels=labels, ignored=ignored, store=store, content=content)


def state_of_file(path: Path) -> str:
    """Return size and modification time of a file, which change with its content."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


@dataclass(frozen=True)
class Calibration:
    """Pictures of one object each, for choosing lam without labels for a data set.

    Attributes:
        pictures: the pictures that are not also among the images of the data set.
        fingerprint: fingerprint of all calibration pictures, with those left out.
        left_out: names of the pictures that are also among the images of the data set.
        reason: why no lam is chosen for this data, or None.
    """

    pictures: ImageSet
    fingerprint: str
    left_out: tuple[str, ...] = ()
    reason: str | None = None


@cache
def _real_labels() -> list[list[int]]:
    return json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") or b"")


def real_labels(data: ImageSet) -> ImageSet:
    """Return the photographs with their ImageNet ReaL labels (Beyer et al., arXiv 2006.07159), looked up by file name.

    Raises:
        NotApplicableError: a photograph does not have the file name of an image of the validation set.
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
    """Group photographs into mosaics: a seeded permutation, cut into groups of grid^2; each is used at most once."""
    if data.tilings is not None:
        return data.tilings
    tiles = grid * grid
    order = np.random.default_rng(seed).permutation(len(data)).tolist()
    return tuple(tuple(order[start : start + tiles]) for start in range(0, len(data) // tiles * tiles, tiles))


def open_image(path: Path) -> Image.Image:
    """Decode an image and convert it to RGB; raises DataError with the file's name if that fails."""
    return ImageSet(path.name, (path,), ((),), ()).open(0)
