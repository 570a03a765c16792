"""Files as they come: which count as photographs, how each is opened, and which are taken."""

import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.datasets import DataError, ImageSet, open_image
from benchmarks.data.files import EXTENSIONS
from benchmarks.data.sources import load_image_set, load_pictures
from benchmarks.scoring import measure, passes
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.loading import Loaded
from timm_csra.demo.seen import open_picture
from timm_csra.evaluation.scoring import DEFAULT, PLAIN

FORMATS = ("png", "jpg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "PNG")


def picture(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), (colour % 256, 99, 200)).save(path)
    return path


def packed(kind: str, folder: Path) -> Path:
    if kind == "folder":
        return folder
    path = folder.with_name(f"{folder.name}.{kind}")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_what_pillow_reads_counts_everywhere_and_what_macos_adds_nowhere(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for number, ending in enumerate(FORMATS):
        if ending != "webp" or features.check("webp"):
            picture(root / ("cat", "dog")[number % 2] / f"{number}.{ending}")
    for name in ("__MACOSX/cat/._0.png", "cat/._0.jpg", ".hidden/1.png", "cat/notes.txt", "dog/clip.mpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"Mac OS X")
    data = load_image_set(packed(kind, root))
    assert sorted(path.suffix[1:] for path in data.paths) == sorted(FORMATS)
    assert data.classes == ("cat", "dog")
    assert all(data.open(index).size == (30, 20) for index in range(len(data)))


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_nothing_but_what_macos_adds_is_no_image(kind: str, tmp_path: Path) -> None:
    (tmp_path / "photos" / "__MACOSX" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "__MACOSX" / "cat" / "._0.png").write_bytes(b"Mac OS X")
    with pytest.raises(DataError, match="photos.*image"):
        load_image_set(packed(kind, tmp_path / "photos"))


def test_pillow_can_open_each_of_the_endings() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2"} <= set(EXTENSIONS)
    assert not {".pdf", ".mpg", ".h5", ".grib", ".eps", ".txt", ".svg"} & set(EXTENSIONS)


def table(root: Path, text: str, encoding: str = "utf-8") -> Path:
    for index in range(3):
        picture(root / "images" / f"{index}.png", index)
    (root / "labels.csv").write_text(text, encoding=encoding)
    (root / "classes.txt").write_text("0 cat\n1 dog\n", encoding=encoding)
    return root


def test_a_table_may_begin_with_a_mark(tmp_path: Path) -> None:
    """As spreadsheets write it."""
    data = load_image_set(table(tmp_path / "a", "file,label\nimages/0.png,1\n", "utf-8-sig"))
    assert (data.labels, data.classes) == (((1,),), ("cat", "dog"))


def test_a_file_counts_once(tmp_path: Path) -> None:
    rows = "file,label\nimages/0.png,1\nimages/1.png,0\nimages/../images/0.png,1\nimages/0.png,0\n"
    with pytest.raises(DataError) as refused:
        load_image_set(table(tmp_path / "a", rows))
    said = str(refused.value)
    assert "0.png: listed 3 times: " in said and "Expected each image once." in said
    assert all(f"labels.csv, line {line}" in said for line in (2, 4, 5)) and "line 3" not in said


def test_coco_with_a_category_that_it_does_not_have(tmp_path: Path) -> None:
    picture(tmp_path / "val" / "1.jpg")
    notes: dict[str, Any] = {"categories": [{"id": 3, "name": "car"}], "images": [{"id": 1, "file_name": "1.jpg"}]}
    notes["annotations"] = [{"id": 7, "image_id": 1, "category_id": 90, "iscrowd": 0}]
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps(notes))
    with pytest.raises(DataError, match=r"instances_val.json: annotation 7 has the category 90, which is none of"):
        load_image_set(path)
    notes |= {"annotations": [], "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "1.jpg"}]}
    path.write_text(json.dumps(notes))
    with pytest.raises(DataError, match=r"1.jpg: listed 2 times: .*image 1; .*image 2. Expected each image once"):
        load_image_set(path)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_of_grey_are_not_white(ending: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 30 * 20).reshape(20, 30).astype(np.uint16)
    path = tmp_path / f"grey.{ending}"
    Image.fromarray(values).save(path)
    found = np.asarray(open_image(path))
    assert (found == (values >> 8).astype(np.uint8)[..., None]).all()


def test_values_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 3e5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float.tif: .*found 32 bits a pixel .*expected 8 or 16"):
        open_image(tmp_path / "float.tif")


def test_the_sweep_ignores_the_orientation_as_timm_does_and_the_demo_applies_it(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned by 90 degrees
    path = tmp_path / "cat" / "0.jpg"
    path.parent.mkdir()
    Image.new("RGB", (30, 20)).save(path, exif=tags)
    by_timm, _ = timm.data.ImageDataset(str(tmp_path))[0]
    assert by_timm.size == open_image(path).size == (30, 20)
    assert open_picture(str(path)).size == (20, 30)


def test_too_many_pixels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb.png: cannot be read as an image: .*exceeds limit of 200 pixels"):
        open_image(path)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_limit_takes_a_sample_of_all_classes(kind: str, tmp_path: Path) -> None:
    for index in range(60):
        picture(tmp_path / "photos" / f"class{index // 10}" / f"{index}.png", index)
    path = packed(kind, tmp_path / "photos")
    taken = [load_image_set(path, limit=20, seed=seed) for seed in (0, 0, 1)]
    assert [len(data) for data in taken] == [20] * 3
    assert taken[0].paths == taken[1].paths != taken[2].paths
    assert len({label for labels in taken[0].labels for label in labels}) > 3
    assert taken[0].classes == tuple(f"class{number}" for number in range(6))
    assert set(load_image_set(path, limit=10).paths) < set(taken[0].paths)
    assert taken[0].fingerprint == taken[1].fingerprint != taken[2].fingerprint
    assert load_pictures(path, limit=20).paths == taken[0].paths


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32))
def test_a_sample_is_in_order_and_grows(images: int, limit: int, seed: int) -> None:
    data = ImageSet("d", tuple(Path(f"{i:02}") for i in range(images)), ((0,),) * images, ("a",))
    found, more = data.sample(limit, seed).paths, data.sample(limit + 1, seed).paths
    assert len(found) == min(limit, images) and list(found) == sorted(found) and set(found) <= set(more)


def test_a_stream_has_no_limit() -> None:
    stream = ImageSet("wds/x", (), (), (), stream=object())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="wds/x: --limit needs a list of the images, which a stream does not have"):
        stream.sample(3, 0)


class Memory:
    """A small cell, and the checkpoint for it."""

    def __init__(self, folder: Path) -> None:
        for index in range(8):
            picture(folder / ("cat", "dog")[index % 2] / f"{index}.png", 30 * index)
        overlay = {"label_names": ["cat", "dog"]}
        model = timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay=overlay).eval()
        weights = folder.with_name("weights.bin")
        weights.write_bytes(b"")
        self.loaded = Loaded(model, (64, 64))
        self.cell = Cell(Checkpoint("local-dir", str(weights.parent)), load_image_set(folder), "single", (64, 64))

    def run(self) -> dict[str, Any]:
        return measure.run_cell(self.cell, lambda: self.loaded, Options((PLAIN, DEFAULT), batch_size=8, workers=0))


def test_memory_that_runs_out_in_the_metrics_costs_no_other_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, counted, score = Memory(tmp_path / "photos"), [], passes.score

    def fails(*_: Any) -> None:
        raise MemoryError("no memory for the bootstrap")

    monkeypatch.setattr(passes, "score", lambda *args, **more: counted.append(1) or score(*args, **more))

    monkeypatch.setattr(measure, "results", fails)
    record = short.run()
    assert (record["status"], record["batch_size"]) == ("failed", 8)
    assert record["reason"] == "MemoryError: no memory for the bootstrap"
    assert len(counted) == 1


def test_neither_does_what_is_done_with_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, score = Memory(tmp_path / "photos"), passes.score

    def fails(model: Any, batches: Iterator[Any], *more: Any, **others: Any) -> Any:
        score(model, batches, *more, **others)
        raise torch.OutOfMemoryError("of all scores in one")

    monkeypatch.setattr(passes, "score", fails)
    assert short.run()["batch_size"] == 8


def test_memory_that_runs_out_in_a_forward_pass_halves_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, score = Memory(tmp_path / "photos"), passes.score

    def fails(model: Any, batches: Iterator[Any], *more: Any, **others: Any) -> Any:
        def looked() -> Iterator[Any]:
            for images, targets in batches:
                if len(images) > 2:
                    raise torch.OutOfMemoryError("for a batch")
                yield images, targets

        return score(model, looked(), *more, **others)

    monkeypatch.setattr(passes, "score", fails)
    record = short.run()
    assert (record["status"], record["batch_size"]) == ("ok", 2)
