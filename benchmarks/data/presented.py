"""Datasets of model inputs: single photographs, mosaics, five crops, and streams."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import IterableImageDataset, str_to_pil_interp
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import FiveCrop

from .classes import Alignment
from .datasets import DataError, ImageSet, Source
from .pixels import Pixels


class _Images(Dataset):
    """Items of (image, target, index). An image that cannot be read is black, with the index -1 - index.

    With `pixels`, cached images are not decoded again.
    """

    data: ImageSet
    targets: Tensor
    transform: Any = None  # set by timm's create_loader
    pixels: Pixels | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        if self.pixels is not None and index in self.pixels:
            return self.pixels.tensor(index, self.transform), self.targets[index], index
        try:
            return self.transform(self.image(index)), self.targets[index], index
        except DataError:
            return self.transform(Image.new("RGB", (64, 64))), self.targets[index], -1 - index

    def image(self, index: int) -> Image.Image:
        """Return the image before the checkpoint's preprocessing; raises DataError if it cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Paths of the photographs that the image consists of."""
        raise NotImplementedError

    def why_not(self, index: int) -> str:
        """Return the error of an image that cannot be read."""
        try:
            self.image(index)
        except DataError as error:
            return str(error)
        return f"{self.name(index)}: could not be read at the first attempt"


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
    """Single photographs without their labels: every target is 0."""

    def __init__(self, data: ImageSet) -> None:
        self.data = data
        self.targets = torch.zeros(len(data), dtype=torch.long)


class Streamed(IterableImageDataset):
    """The images of a stream, with the positions of their labels among the scored classes.

    The images have no index, and their order depends on the number of workers. Each has a hash of its pixels instead,
    to sort by.
    """

    def __init__(self, source: Source, alignment: Alignment) -> None:
        super().__init__(root=None, reader=source.open().reader)
        self.count, self.positions = source.count, alignment.positions

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        for image, target in self.reader:
            if int(target) not in self.positions:
                raise DataError(f"found the label {int(target)}, expected one of {len(self.positions)} classes.")
            pixels = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
            yield self.transform(image), self.positions[int(target)], int.from_bytes(pixels, "big") >> 1


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
    """Crops of the model's size from the four corners and the centre of an image resized for `SCALE` times that size.

    Items are crops `(5, C, H, W)` and the index, which is negative if the image cannot be read, as in `Photographs`.
    """

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
    """Resize images into the tiles of a mosaic, row by row.

    Tiles differ in size by one pixel if `size` `(H, W)` is not a multiple of the grid.
    """
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
    """Return multi-hot targets `(n, classes)` int8; labels that are not scored are left out."""
    targets = torch.zeros(len(labels), alignment.count, dtype=torch.int8)
    for row, found in enumerate(labels):
        targets[row, [alignment.positions[label] for label in found if label in alignment.positions]] = 1
    return targets
