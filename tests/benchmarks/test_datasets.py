"""Reading photographs and labels, mosaics, and matching classes; with the text of what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from benchmarks.data.classes import Alignment
from benchmarks.data.datasets import (
    DataError,
    ImageSet,
    tilings,
)
from benchmarks.data.presented import Mosaics, Photographs
from benchmarks.data.sources import load_image_set


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 30)) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return paths


def write_table(root: Path, rows: list[str], classes: str = "0 n01440764 tench, Tinca tinca\n1 cat\n") -> Path:
    write_images(root / "images", 3)
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    (root / "classes.txt").write_text(classes)
    return root


def test_reads_single_and_several_labels(tmp_path: Path) -> None:
    root = write_table(tmp_path / "a", ["file,label,extra", "images/0.png,1,x", "images/2.png,0,y"])
    data = load_image_set(root)
    assert (data.name, len(data), data.multilabel) == ("a", 2, False)
    assert data.labels == ((1,), (0,))
    assert data.classes == ("n01440764 tench, Tinca tinca", "cat")
    assert data.paths[1] == root / "images" / "2.png"
    assert load_image_set(root, limit=1).labels == ((1,),)
    assert load_image_set(root, limit=1).fingerprint != data.fingerprint

    root = write_table(tmp_path / "b", ["file,labels", "images/0.png,1 0", "images/1.png,"], classes="tench\ncat\n")
    data = load_image_set(root)
    assert (data.multilabel, data.labels, data.classes) == (True, ((0, 1), ()), ("tench", "cat"))


def test_reads_an_image_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "n01440764", 2)
    write_images(tmp_path / "cat", 1)
    data = load_image_set(tmp_path)
    assert data.classes == ("cat", "n01440764")
    assert data.labels == ((0,), (1,), (1,))


@pytest.mark.parametrize(
    ("rows", "classes", "text"),
    [
        (
            ["file,tag", "images/0.png,1"],
            "0 a\n1 b",
            r"found the columns file, tag; expected file and one of label, lab",
        ),
        (["file,label"], "0 a\n1 b", r"labels.csv: found no row"),
        (["file,label", "images/0.png,7"], "0 a\n1 b", r"line 2: found label='7'; classes.txt has 2 classes"),
        (["file,label", "images/0.png,cat"], "0 a\n1 b", r"line 2: found label='cat'; expected indices into"),
        (["file,label", "images/0.png,0 1"], "0 a\n1 b", r"line 2: found label='0 1'; expected one index"),
        (["file,label", "images/0.png,0", "gone.png,0"], "0 a\n1 b", r"line 3: no such file: .*gone.png"),
        (["file,label", "images/0.png,0"], "0 a\n2 b", r"classes.txt, line 2: found index 2; expected 1"),
    ],
)
def test_refused_tables(tmp_path: Path, rows: list[str], classes: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        load_image_set(write_table(tmp_path, rows, classes))


def test_refused_folders(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="gone: no such folder, archive or annotations; expected an ImageFolder, images/ with lab"
    ):
        load_image_set(tmp_path / "gone")
    with pytest.raises(DataError, match="neither labels.csv nor an ImageFolder was found"):
        load_image_set(tmp_path)
    (tmp_path / "labels.csv").write_text("file,label\n")
    with pytest.raises(DataError, match=r"classes.txt: no such file; expected one line for each class"):
        load_image_set(tmp_path)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:200])
    data = ImageSet("x", (path,), ((0,),), ("a",))
    photographs = Photographs(data, Alignment((0,), {0: 0}))
    photographs.transform = lambda image: image
    with pytest.raises(DataError, match=r"0.png: cannot be read as an image"):
        photographs.image(0)
    assert photographs[0][2] == -1
    assert photographs.why_not(0).startswith(f"{path}: cannot be read as an image")


def test_mosaics_use_each_image_at_most_once() -> None:
    data = ImageSet("x", tuple(Path(str(i)) for i in range(23)), ((0,),) * 23, ("a",))
    for grid in (2, 3):
        groups = tilings(data, grid, seed=1)
        assert len(groups) == 23 // grid**2
        assert all(len(group) == grid**2 for group in groups)
        flat = [i for group in groups for i in group]
        assert len(set(flat)) == len(flat)
        assert groups == tilings(data, grid, seed=1) != tilings(data, grid, seed=2)


@pytest.mark.parametrize(("size", "grid"), [((64, 64), 2), ((65, 97), 2), ((96, 96), 3), ((100, 100), 3)])
def test_a_mosaic_is_its_squashed_tiles(tmp_path: Path, size: tuple[int, int], grid: int) -> None:
    paths = write_images(tmp_path, grid * grid)
    labels = tuple((i % 3,) for i in range(len(paths)))
    data = ImageSet("x", tuple(paths), labels, ("a", "b", "c", "d"))
    alignment = Alignment((7, 8, 9, 11), {0: 0, 1: 1, 2: 2, 3: 3})
    order = tuple(reversed(range(len(paths))))
    mosaics = Mosaics(data, alignment, [order], grid, size, "bicubic")
    canvas = np.asarray(mosaics.image(0))
    assert canvas.shape == (*size, 3)
    heights = np.diff(np.rint(np.linspace(0, size[0], grid + 1)).astype(int))
    widths = np.diff(np.rint(np.linspace(0, size[1], grid + 1)).astype(int))
    top = 0
    for row, height in enumerate(heights):
        left = 0
        for column, width in enumerate(widths):
            tile = Image.open(paths[order[row * grid + column]]).resize((width, height), Image.Resampling.BICUBIC)
            assert np.array_equal(canvas[top : top + height, left : left + width], np.asarray(tile))
            left += width
        top += height
    assert mosaics.targets.tolist() == [[True, True, True, False]]
    # timm's transform then changes nothing but mean and std.
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    mosaics.transform = create_transform(
        (3, *size), interpolation="bicubic", mean=mean.tolist(), std=std.tolist(), crop_pct=1.0, crop_mode="squash"
    )
    expected = (torch.from_numpy(canvas.copy()).permute(2, 0, 1) / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(mosaics[0][0], expected)
