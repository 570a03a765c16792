"""Which photographs with which labels, and what a model gets to see of them: single or in mosaics."""

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
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, IterableImageDataset, str_to_pil_interp
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import FiveCrop

from .classes import Alignment, NotApplicableError


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
    calibration: "Calibration | None" = None
    order: str | None = None

    def __len__(self) -> int:
        return len(self.paths) if self.stream is None else self.stream.count

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the files (name and size), the labels and the classes."""
        digest = hashlib.sha256(repr(self.name).encode() if self.stream else b"")
        for path, labels in zip(self.paths, self.labels, strict=True):
            size = path.stat().st_size if self.store is None else ""
            digest.update(f"{path.name} {size} {labels}\n".encode())
        digest.update("\n".join(self.classes).encode())
        digest.update(repr(self.ignored).encode() if self.ignored else b"")
        return digest.hexdigest()[:16]

    def open(self, index: int) -> Image.Image:
        """The whole photograph in RGB; DataError, naming it, where it cannot be decoded."""
        with self.opened(index) as image:
            return image.convert("RGB")

    @contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        """The photograph as it is stored, not decoded yet; DataError, naming it, also where decoding it then fails."""
        path = self.paths[index]
        try:
            image = Image.open(path) if self.store is None else self.store.open(index)
            with image if isinstance(image, Image.Image) else Image.open(image) as opened:
                yield opened
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as an image: {error}") from error

    def first(self, count: int | None) -> "ImageSet":
        """The first photographs, or all."""
        if count is None or (count >= len(self) and not self.stream):
            return self
        if self.stream:
            raise DataError(f"{self.name}: --limit needs a list of the images, which a stream does not have.")
        return self.some(range(count))

    def some(self, indices: Sequence[int]) -> "ImageSet":
        """These photographs."""
        ignored = self.ignored and tuple(self.ignored[i] for i in indices)
        paths, labels = tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices)
        store = self.store and _Part(self.store, tuple(indices))
        return replace(self, paths=paths, labels=labels, ignored=ignored, store=store)


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


class _Images(Dataset):
    """Images with targets and their index; one that cannot be read is grey, and its index is -1 - index."""

    data: ImageSet
    targets: Tensor
    transform: Any = None  # set by timm's create_loader

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        try:
            return self.transform(self.image(index)), self.targets[index], index
        except DataError:
            return self.transform(Image.new("RGB", (64, 64))), self.targets[index], -1 - index

    def image(self, index: int) -> Image.Image:
        """The image before the checkpoint's preprocessing. Raises DataError."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Which photographs it consists of."""
        raise NotImplementedError

    def why_not(self, index: int) -> str:
        """What is wrong with an image that cannot be read."""
        try:
            self.image(index)
        except DataError as error:
            return str(error)
        return f"{self.name(index)}: could not be read at first"


class Photographs(_Images):
    """Single photographs. `targets`: `(n,)` positions among the scored classes, or `(n, classes)` int8."""

    def __init__(self, data: ImageSet, alignment: Alignment) -> None:
        self.data = data
        if data.multilabel:
            self.targets = multi_hot(data.labels, alignment)
            if data.ignored is not None:
                self.targets -= multi_hot(data.ignored, alignment)
        else:
            self.targets = torch.tensor([alignment.positions[label] for (label,) in data.labels])

    def image(self, index: int) -> Image.Image:
        return self.data.open(index)

    def name(self, index: int) -> str:
        return str(self.data.paths[index])


class Unlabelled(Photographs):
    """Single photographs whose labels, if there are any, are not looked at: every target is 0."""

    def __init__(self, data: ImageSet) -> None:
        self.data = data
        self.targets = torch.zeros(len(data), dtype=torch.long)


class Streamed(IterableImageDataset):
    """The images of a stream with the positions of their labels among the scored classes; none has an index."""

    def __init__(self, source: Source, alignment: Alignment) -> None:
        super().__init__(root=None, reader=source.open().reader)
        self.count, self.positions = source.count, alignment.positions

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        for image, target in super().__iter__():
            if int(target) not in self.positions:
                raise DataError(f"found the label {int(target)}, expected one of {len(self.positions)} classes.")
            yield image, self.positions[int(target)], 0


class Mosaics(_Images):
    """grid x grid photographs in one image of `size` `(H, W)` pixels, each squashed whole into its tile.

    `targets`: `(n, classes)` int8, the classes of the tiles.
    """

    def __init__(
        self,
        data: ImageSet,
        alignment: Alignment,
        groups: Sequence[tuple[int, ...]],
        grid: int,
        size: tuple[int, int],
        interpolation: str,
    ) -> None:
        self.data, self.groups, self.grid, self.size = data, groups, grid, size
        self.interpolation = str_to_pil_interp(interpolation)
        self.targets = multi_hot([[label for i in group for label in data.labels[i]] for group in groups], alignment)

    def image(self, index: int) -> Image.Image:
        tiles = [self.data.open(i) for i in self.groups[index]]
        return mosaic(tiles, self.grid, self.size, self.interpolation)

    def name(self, index: int) -> str:
        return " + ".join(str(self.data.paths[i]) for i in self.groups[index])


class FiveCrops(Dataset):
    """The four corners and the centre, of the size the model takes, of an image prepared for `SCALE` times that size.
    Items are `(5, C, H, W)` with the index, negative as in the others where the image cannot be read."""

    SCALE = 1.25

    def __init__(self, images: _Images, transform: Any, size: tuple[int, int]) -> None:
        self.images, self.transform, self.crop = images, transform, FiveCrop(size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image = self.images.image(index)
        except DataError:
            image, index = Image.new("RGB", (64, 64)), -1 - index
        return torch.stack(self.crop(self.transform(image))), index


def mosaic(tiles: Sequence[Image.Image], grid: int, size: tuple[int, int], interpolation: Any) -> Image.Image:
    """Tiles row by row; where the size is no multiple of the grid, tiles differ by one pixel."""
    height, width = size
    rows = [round(edge * height / grid) for edge in range(grid + 1)]
    columns = [round(edge * width / grid) for edge in range(grid + 1)]
    canvas = Image.new("RGB", (width, height))
    for place, tile in enumerate(tiles):
        row, column = divmod(place, grid)
        box = (columns[column + 1] - columns[column], rows[row + 1] - rows[row])
        canvas.paste(tile.resize(box, interpolation), (columns[column], rows[row]))
    return canvas


def multi_hot(labels: Sequence[Sequence[int]], alignment: Alignment) -> Tensor:
    """`(n, classes)` int8, 1 where a photograph shows the class; labels that are not scored are left out."""
    targets = torch.zeros(len(labels), alignment.count, dtype=torch.int8)
    for row, found in enumerate(labels):
        targets[row, [alignment.positions[label] for label in found if label in alignment.positions]] = 1
    return targets
