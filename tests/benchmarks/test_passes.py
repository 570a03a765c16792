"""One pass over pixels serves several tasks: how often images are run, and that nothing else changes."""

import importlib.resources
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import benchmarks.scoring.passes
from benchmarks.asked import asked_cells
from benchmarks.checkpoints.find import Checkpoint, find_checkpoints
from benchmarks.data.datasets import ImageSet
from benchmarks.data.sources import load_image_set
from benchmarks.engines.worker import Models
from benchmarks.records.files import Record
from benchmarks.scoring.cells import Options
from benchmarks.scoring.measure import Unfinished, begin_cell, run_cell
from timm_csra.evaluation.scoring import DEFAULT, PLAIN, score

from .test_sweep import make_checkpoint, sweep


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of four of ImageNet's classes, called as in its validation set, with ReaL labels."""
    file = importlib.resources.files("timm.data") / "_info" / "imagenet_real_labels.json"
    labels = [len(found) for found in json.loads(file.read_text())]
    numbers = [i for i, count in enumerate(labels) if count == 2][:12]
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for place, number in enumerate(numbers):
        folder = root / ImageNetInfo().label_names()[place % 4]
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"ILSVRC2012_val_{number + 1:08d}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("resnet"), ImageNetInfo().label_names())


def in_process(
    monkeypatch: pytest.MonkeyPatch, checkpoint: str, data: list[ImageSet], tasks: str, *crops: float
) -> tuple[list[int], list[Record]]:
    """How many images each pass ran, in order, and the records."""
    counted: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        scores, targets = score(*args, **kwargs)
        counted.append(len(targets))
        return scores, targets

    monkeypatch.setattr(benchmarks.scoring.passes, "score", counting)
    (model,), models = find_checkpoints(checkpoint), Models("cpu")
    asked = [(task, 2 if task == "mosaic" else None) for task in tasks.split(",")]
    records = []
    for crop in crops or (None,):
        options = Options((PLAIN, DEFAULT), batch_size=8, workers=0, crop_pct=crop)
        cells = asked_cells(model, "64,96", data, asked, {}, crop)
        records += [run_cell(cell, partial(models.get, cell), options) for cell in cells]
    return counted, records


@pytest.mark.parametrize("tasks", ["single,real,mosaic", "real,single,mosaic"])
def test_tasks_on_the_same_pixels_share_a_pass(
    tasks: str, photos: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [load_image_set(photos)]
    counted, records = in_process(monkeypatch, checkpoint, data, tasks)
    assert Counter(counted) == {12: 2, 3: 2}  # at each size one for single and real, and one for mosaics
    assert Counter((record["task"], record["images_run"]) for record in records) == {
        ("real", 12): 2, ("single", 0): 2, ("mosaic", 3): 2,
    }  # fmt: skip
    for task, images in (("single", 12), ("real", 12), ("mosaic", 3)):
        _, alone = in_process(monkeypatch, checkpoint, data, task)
        together = [record for record in records if record["task"] == task]
        for one, other in zip(alone, together, strict=True):
            assert one["images_run"] == images
            for name in ("key", "n", "columns", "results", "all_settings", "calibration", "kind", "bad_images"):
                assert one[name] == other[name], name


def test_a_pass_serves_no_other_pixels(
    photos: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in sorted(photos.glob("*/*.png"))[:4]:
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        (tmp_path / file.parent.name / file.name).write_bytes(file.read_bytes())
    data = [load_image_set(photos), load_image_set(tmp_path)]
    counted, _ = in_process(monkeypatch, checkpoint, data, "single,real", 0.8, 0.9)
    assert counted == [12, 4] * 4


@pytest.mark.parametrize(("architecture", "built"), [("test_resnet", 1), ("test_convnext", 1), ("test_vit", 3)])
def test_a_model_serves_all_sizes_where_its_weights_do_not_depend_on_them(
    architecture: str, built: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=4)
    labels = {"label_names": ImageNetInfo().label_names()[:4]}
    timm.models.save_for_hf(model, str(tmp_path / "model"), model_config=labels, safe_serialization=True)
    created: list[tuple[int, int]] = []

    def creating(self: Checkpoint, size: tuple[int, int]) -> torch.nn.Module:
        created.append(size)
        return create(self, size)

    create = Checkpoint.create
    monkeypatch.setattr(Checkpoint, "create", creating)
    (checkpoint,), data = find_checkpoints(f"local-dir:{tmp_path / 'model'}"), [load_image_set(photos)]
    options, models = Options((PLAIN, DEFAULT), batch_size=8, workers=0), Models("cpu")
    cells = list(asked_cells(checkpoint, "64,96,160", data, [("single", None), ("mosaic", 2)], {}))
    together = [run_cell(cell, partial(models.get, cell), options) for cell in cells]
    assert len(created) == built
    alone = [run_cell(cell, partial(Models("cpu").get, cell), options) for cell in cells]
    assert len(created) == built + len(cells) == built + 6
    for one, other in zip(together, alone, strict=True):
        assert one["status"] == "ok", one["reason"]
        for name in ("key", "n", "results", "all_settings", "macs", "extra_macs", "weights_sha256", "preprocessing"):
            assert one[name] == other[name], name


def test_a_sweep_says_how_many_images_were_run(photos: Path, checkpoint: str, tmp_path: Path) -> None:
    status, records, _ = sweep(tmp_path, checkpoint, photos, "--task", "single,real,mosaic", "--img-size", "64")
    assert status == 0
    assert {record["task"]: record["images_run"] for record in records} == {"real": 12, "single": 0, "mosaic": 3}


def test_an_image_that_cannot_be_read_is_left_out_of_all_tasks(photos: Path, checkpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for place, file in enumerate(sorted(photos.glob("*/*.png"))):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        content = file.read_bytes()
        (folder / file.parent.name / file.name).write_bytes(content[:200] if place == 5 else content)
    arguments = (checkpoint, folder, "--task", "single,real", "--img-size", "64")
    status, records, _ = sweep(tmp_path / "strict", *arguments)
    assert status == 1
    assert all("1 of 12 images cannot be read" in record["reason"] for record in records)
    status, records, _ = sweep(tmp_path / "skip", *arguments, "--skip-bad-images")
    assert status == 0
    assert [(record["task"], record["n"], record["images_run"]) for record in records] == [
        ("real", 11, 12), ("single", 11, 0),
    ]  # fmt: skip
    assert len({tuple(record["bad_images"]) for record in records}) == 1


def test_kept_scores_of_a_shared_pass_answer_again(photos: Path, checkpoint: str, tmp_path: Path) -> None:
    arguments = (tmp_path, checkpoint, photos, "--task", "single,real", "--img-size", "64")
    _, first, _ = sweep(*arguments, "--keep-scores")
    _, records, _ = sweep(*arguments, "--rescore")
    again = [record for record in records if record["key"]["kept_scores"]]
    assert len(again) == len(first) == 2
    assert [record["images_run"] for record in (*first, *again)] == [12, 0, 0, 0]
    for one, other in zip(first, again, strict=True):
        for a, b in zip(one["results"], other["results"], strict=True):
            assert (a["metric"], a["protocol"], a["n"]) == (b["metric"], b["protocol"], b["n"])
            if a["protocol"] == "fixed":
                torch.testing.assert_close(a["value"], b["value"], atol=9.0, rtol=0)  # half precision, 12 images


def test_metrics_ask_no_device(photos: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may run in a forked process, where CUDA cannot be used: a GPU's name is asked for before."""
    (model,), models = find_checkpoints(checkpoint), Models("cpu")
    options = Options((PLAIN, DEFAULT), batch_size=8, workers=0)
    (cell,) = asked_cells(model, "64", [load_image_set(photos)], [("single", None)], {}, None)
    begun = begin_cell(cell, partial(models.get, cell), options)
    assert isinstance(begun, Unfinished)

    def asked(*_: Any) -> Any:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    monkeypatch.setattr(benchmarks.scoring.measure, "environment", asked)
    for name in ("synchronize", "current_accelerator", "device_count", "is_available"):
        monkeypatch.setattr(torch.accelerator, name, asked)
    record = begun.finished()
    assert record["status"] == "ok", record["reason"]
    assert record["environment"]["device"] == "cpu"
