"""Which photographs with which labels, and what a model gets to see of them: single or in mosaics."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_reader, str_to_pil_interp
from torch import Tensor
from torch.utils.data import Dataset

from .classes import Alignment


class DataError(ValueError):
    """The data cannot be read or used; the text names the file, what was found and what was expected."""


@dataclass(frozen=True)
class ImageSet:
    """Photographs with their labels.

    Attributes:
        name: the folder's name.
        paths: files, `(n,)`.
        labels: class indices of each photograph; exactly one each unless `multilabel`.
        classes: names as the data declares them: synsets, label names, or `synset description`.
        multilabel: whether a photograph may have several labels, or none.
        tilings: which photographs form each mosaic, where the data prescribes it. A photograph may then come twice,
            mosaics are not independent, and nothing is inferred from them.
    """

    name: str
    paths: tuple[Path, ...]
    labels: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...]
    multilabel: bool = False
    tilings: tuple[tuple[int, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the files (name and size), the labels and the classes."""
        digest = hashlib.sha256()
        for path, labels in zip(self.paths, self.labels, strict=True):
            digest.update(f"{path.name} {path.stat().st_size} {labels}\n".encode())
        digest.update("\n".join(self.classes).encode())
        return digest.hexdigest()[:16]


def load_image_set(root: Path, limit: int | None = None) -> ImageSet:
    """Read a folder with `labels.csv` and `classes.txt`, or an ImageFolder (one folder per class).

    `limit` takes the first rows of `labels.csv`, or the first files in natural order.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected an ImageFolder, or images/ with labels.csv and classes.txt.")
    data = _read_csv(root) if (root / "labels.csv").is_file() else _read_image_folder(root)
    return data if limit is None else replace(data, paths=data.paths[:limit], labels=data.labels[:limit])


def _read_image_folder(root: Path) -> ImageSet:
    try:
        reader = create_reader("", root=str(root))
    except RuntimeError as error:
        raise DataError(f"{root}: neither labels.csv nor an ImageFolder was found: {error}") from error
    paths, labels = zip(*reader.samples, strict=True)
    classes = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.get))
    return ImageSet(root.resolve().name, tuple(map(Path, paths)), tuple((label,) for label in labels), classes)


def _read_csv(root: Path) -> ImageSet:
    classes = _read_classes(root / "classes.txt")
    table = root / "labels.csv"
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        rows = list(reader)
    column = next((name for name in ("label", "labels") if name in columns), None)
    if column is None or "file" not in columns:
        raise DataError(f"{table}: found the columns {', '.join(columns)}; expected file and one of label, labels.")
    if not rows:
        raise DataError(f"{table}: no row; expected one for each image.")
    paths, labels = [], []
    for line, row in enumerate(rows, start=2):
        where = f"{table}, line {line}"
        try:
            found = tuple(sorted({int(label) for label in (row[column] or "").split()}))
        except ValueError:
            raise DataError(f"{where}: found {column}={row[column]!r}; expected indices into classes.txt.") from None
        if column == "label" and len(found) != 1:
            raise DataError(f"{where}: found label={row[column]!r}; expected one index (several go into labels).")
        if not all(0 <= label < len(classes) for label in found):
            raise DataError(f"{where}: found {column}={row[column]!r}; classes.txt has {len(classes)} classes.")
        path = root / (row["file"] or "")
        if not path.is_file():
            raise DataError(f"{where}: no such file: {path}")
        paths.append(path)
        labels.append(found)
    return ImageSet(root.resolve().name, tuple(paths), tuple(labels), classes, multilabel=column == "labels")


def _read_classes(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected one line for each class, `index name`, as labels.csv uses it.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    numbered = [line.partition(" ") for line in lines]
    if all(number.isdigit() for number, _, _ in numbered):
        for expected, (number, _, _) in enumerate(numbered):
            if int(number) != expected:
                raise DataError(f"{path}, line {expected + 1}: found index {number}; expected {expected}.")
        return tuple(name for _, _, name in numbered)
    return tuple(lines)


def tilings(data: ImageSet, grid: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Which photographs form each mosaic: a seeded permutation in groups of grid^2, each photograph at most once."""
    if data.tilings is not None:
        return data.tilings
    tiles = grid * grid
    order = np.random.default_rng(seed).permutation(len(data)).tolist()
    return tuple(tuple(order[start : start + tiles]) for start in range(0, len(data) // tiles * tiles, tiles))


def open_image(path: Path) -> Image.Image:
    """The whole image in RGB; DataError, naming the file, where it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error


class Photographs(Dataset):
    """Single photographs. `targets`: `(n,)` positions among the scored columns, or `(n, columns)` bool."""

    def __init__(self, data: ImageSet, alignment: Alignment) -> None:
        self.paths = data.paths
        positions = [[alignment.positions[label] for label in labels] for labels in data.labels]
        self.targets = (
            multi_hot(positions, len(alignment.columns)) if data.multilabel else torch.tensor(positions)[:, 0]
        )
        self.transform: Any = None  # set by timm's create_loader

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(open_image(self.paths[index])), self.targets[index]


class Mosaics(Dataset):
    """grid x grid photographs in one image of `size` `(H, W)` pixels, each squashed whole into its tile.

    `targets`: `(n, columns)` bool, the classes of the tiles.
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
        positions = [[alignment.positions[label] for i in group for label in data.labels[i]] for group in groups]
        self.targets = multi_hot(positions, len(alignment.columns))
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.image(index)), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """The mosaic before the checkpoint's mean and std."""
        tiles = [open_image(self.data.paths[i]) for i in self.groups[index]]
        return mosaic(tiles, self.grid, self.size, self.interpolation)


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


def multi_hot(positions: Sequence[Sequence[int]], columns: int) -> Tensor:
    """`(n, columns)` bool."""
    targets = torch.zeros(len(positions), columns, dtype=torch.bool)
    for row, places in enumerate(positions):
        targets[row, list(places)] = True
    return targets
