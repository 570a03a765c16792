"""Whether a cell has an answer is told before weights are downloaded or loaded."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IterableImageDataset, create_dataset

from benchmarks.checkpoints.downloads import Downloads
from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.classes import ClassMap, ClassNames, NotApplicableError
from benchmarks.data.datasets import ImageSet, Source
from benchmarks.engines.estimate import DEFAULT as UNKNOWN_MACS
from benchmarks.engines.estimate import macs_of
from benchmarks.engines.local import LocalEngine
from benchmarks.scoring.applicable import Applicability
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.loading import Loaded
from benchmarks.scoring.measure import load_images, score_cell
from benchmarks.sweep import main
from timm_csra.evaluation.scoring import PLAIN

from .test_survival import save

OPTIONS = Options((PLAIN,), workers=0)
NAMED = replace(OPTIONS, class_names=ClassNames("names.txt", ("cat", "dog", "owl")))
MAPPED = replace(OPTIONS, class_map=ClassMap("map", {"cat": ("n02123045",), "dog": ()}))
HEADLESS = "aimv2_1b_patch14_224.apple_pt"


def images(count: int = 8, classes: tuple[str, ...] = ("cat", "dog"), **more: Any) -> ImageSet:
    paths = tuple(Path(f"{index}.png") for index in range(count))
    labels = tuple((index % len(classes),) for index in range(count))
    return ImageSet("photos", paths, labels, classes, **more)


def stream() -> ImageSet:
    def opened() -> IterableImageDataset:
        return create_dataset("wds/photos", root="/nowhere")

    return ImageSet("wds/photos", (), (), ("cat", "dog"), stream=Source(opened, 8))


SEVERAL = images(multilabel=True)
CASES = [
    # (data, task, grid, options, num_classes and label_names of the checkpoint, reason)
    (SEVERAL, "single", None, OPTIONS, 2, ["cat", "dog"], "single needs exactly one label"),
    (images(), "multilabel", None, OPTIONS, 2, ["cat", "dog"], "multilabel needs several labels for each image: labels.csv"),
    (SEVERAL, "mosaic", 2, OPTIONS, 2, ["cat", "dog"], "mosaics are built from images with exactly one label each"),
    (stream(), "mosaic", 2, OPTIONS, 2, ["cat", "dog"], "a stream has no list of its images"),
    (images(8), "mosaic", 3, OPTIONS, 2, ["cat", "dog"], "8 images are too few for one mosaic of 3x3"),
    (images(), "real", None, OPTIONS, 2, ["cat", "dog"], "no ReaL label for 0.png: expected names such as"),
    (images(), "single", None, OPTIONS, 0, None, r"the checkpoint has no classifier \(num_classes=0\)"),
    (images(), "single", None, OPTIONS, 3, None, "the names of the head's 3 classes are unknown"),
    (images(), "single", None, OPTIONS, 2, ["cat", "fox"], "1 classes of the data are not among the head's: dog"),
    (images(), "single", None, NAMED, 2, ["cat", "fox"], "names.txt has 3 names, and the head 2 classes"),
    (SEVERAL, "multilabel", None, MAPPED, 2, ["cat", "dog"], "no class of the class map map is among the head's"),
    (images(), "single", None, OPTIONS, 2, ["cat", "dog"], None),
    (images(), "mosaic", 2, OPTIONS, 3, {"0": "cat", "1": "owl", "2": "dog"}, None),
    (SEVERAL, "multilabel", None, MAPPED, 2, ["n02123045", "dog"], None),
    (images(), "single", None, NAMED, 3, None, None),
    (images(classes=("n02123045", "n02099601")), "single", None, OPTIONS, 1000, None, None),
    (images(order="folders"), "single", None, OPTIONS, 2, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("data", "task", "grid", "options", "count", "names", "reason"), CASES)
def test_it_is_told_by_the_configuration_and_as_the_model_would(
    data: ImageSet, task: str, grid: int | None, options: Options, count: int, names: Any, reason: str | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = timm.create_model("test_resnet", num_classes=count)
    timm.models.save_for_hf(model, str(tmp_path), model_config={"label_names": names} if names else {})
    for file in tmp_path.iterdir():
        if file.name != "config.json":
            file.unlink()
    checkpoint = Checkpoint("local-dir", str(tmp_path))
    cell = Cell(checkpoint, data, task, (160, 160), grid=grid, own=checkpoint.input_size())
    with monkeypatch.context() as nothing_built:
        nothing_built.setattr("timm.create_model", refuse)
        told = Applicability(options).why_not(cell)
    assert bool(told) == bool(reason)
    assert reason is None or re.search(reason, str(told))

    # The same of the model itself, which `benchmarks.tune` and others have.
    loaded = Loaded(checkpoint.architecture((160, 160)).eval(), (160, 160))
    if told:
        with pytest.raises(NotApplicableError) as refused:
            score_cell(cell, loaded, options)
        assert str(refused.value) == told
    else:
        load_images(cell, loaded, options)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("nothing may be loaded or computed here")


def test_the_order_of_a_training_is_asked_for(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    content = {"state_dict": model.state_dict(), "arch": "test_resnet", "args": {"class_map": "order.txt"}}
    torch.save(content, tmp_path / "last.pth.tar")
    checkpoint = Checkpoint("file", f"test_resnet@{tmp_path / 'last.pth.tar'}")
    cell = Cell(checkpoint, images(order="folders"), "single", (160, 160), own=(160, 160))
    assert "was trained with --class-map order.txt" in str(Applicability(OPTIONS).why_not(cell))
    options = replace(OPTIONS, class_names=ClassNames("names.txt", ("dog", "cat")))
    assert Applicability(options).why_not(cell) is None


def test_what_cannot_be_asked_is_left_to_whoever_loads_it(tmp_path: Path) -> None:
    absent = Cell(Checkpoint("hf-hub", "user/gone"), images(), "single", "1x")
    assert Applicability(OPTIONS).why_not(absent) is None
    assert "several labels" in str(Applicability(OPTIONS).why_not(replace(absent, task="multilabel")))
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in (5, "cat"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"label_names": wrong}))
        checkpoint = Checkpoint("local-dir", str(tmp_path))
        cell = Cell(checkpoint, images(), "single", (160, 160), own=(160, 160))
        assert Applicability(OPTIONS).why_not(cell) is None
        with pytest.raises(ValueError, match=r"label_names: found a (int|str), expected a list of names"):
            load_images(cell, Loaded(checkpoint.architecture(), (160, 160)), OPTIONS)


def test_classes_are_matched_once_for_checkpoints_that_declare_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("benchmarks.scoring.applicable.align", lambda *args, **_: asked.append(args))
    data, applicability = images(), Applicability(OPTIONS)
    for name in ("resnet50.a1_in1k", "resnet50.a2_in1k", "resnet18.a1_in1k", "levit_128s.fb_dist_in1k"):
        applicability.why_not(Cell(Checkpoint("timm", name), data, "single", (224, 224), own=(224, 224)))
    assert len(asked) == 1
    applicability.why_not(Cell(Checkpoint("timm", name), images(9), "single", (224, 224), own=(224, 224)))
    assert len(asked) == 2


def test_what_does_not_apply_is_neither_fetched_nor_given_to_the_engine(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, str | None]] = []
    start = Downloads.start

    def started(self: Downloads, checkpoint: Checkpoint, following: Checkpoint | None) -> None:
        fetched.append((checkpoint.name, following and following.name))
        start(self, checkpoint, following)

    monkeypatch.setattr(Downloads, "start", started)
    computed = []
    submit = LocalEngine.submit
    monkeypatch.setattr(
        LocalEngine, "submit", lambda self, cell, log: (computed.append(cell.checkpoint.name), submit(self, cell, log))
    )
    first, last = save(tmp_path / "first"), save(tmp_path / "last")
    others = []
    for name, count in (("headless", 0), ("unnamed", 3), ("crossvit", 2)):
        (tmp_path / name).mkdir()
        architecture = "crossvit_tiny_240" if name == "crossvit" else "test_resnet"
        timm.models.save_for_hf(timm.create_model(architecture, num_classes=count), str(tmp_path / name))
        others.append(f"local-dir:{tmp_path / name}")
    arguments = ["--models", ",".join([first, *others, last]), "--data", str(photos), "--out", str(tmp_path / "out")]
    arguments += ["--img-size", "64", "--task", "single,multilabel", "--workers", "0", "--device", "cpu", "--prefetch"]
    assert main(arguments) == 0
    assert fetched == [(first, last), (last, None)]
    assert computed == [first, last]
    found = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").glob("*.json")]
    single = {record["model"]: (record["status"], record["reason"]) for record in found if record["task"] == "single"}
    assert single[others[0]] == ("not_applicable", "the checkpoint has no classifier (num_classes=0)")
    assert single[others[1]][1].startswith("the names of the head's 3 classes are unknown")
    assert single[others[2]][1].startswith("the model cannot be built for 64 pixels: ")
    assert [single[name][0] for name in (first, last)] == ["ok", "ok"]
    assert {record["status"] for record in found if record["task"] == "multilabel"} == {"not_applicable"}


def test_a_dry_run_loads_nothing_and_says_what_does_not_apply(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, unnamed = save(tmp_path / "model"), tmp_path / "unnamed"
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=3), str(unnamed))
    monkeypatch.setattr(Checkpoint, "create", refuse)
    monkeypatch.setattr("torch.load", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("timm.models._helpers.load_state_dict", refuse)
    models = f"{model},local-dir:{unnamed},pypi:tf_efficientnet_lite0"
    arguments = ["--models", models, "--data", str(photos), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--task", "single,multilabel", "--img-size", "64", "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("64 12 not applicable") == 5 and printed.count("64 12 to do") == 1
    assert "3 cells not applicable: the task multilabel needs several labels" in printed
    assert "1 cells not applicable: the names of the head's 3 classes are unknown" in printed
    assert "1 cells not applicable: 2 classes of the data are not among the head's: cat; dog" in printed
    assert "1 cells, 12 images" in printed
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_many_cells_is_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = timm.list_models("*vit*", pretrained=True)[:40]
    headless = [name for name in (HEADLESS, *names) if timm.get_pretrained_cfg(name).num_classes == 0]
    monkeypatch.setattr("timm.list_models", lambda *_, **__: [HEADLESS, *names])
    monkeypatch.setattr("benchmarks.sweep._unavailable", lambda _: {})
    monkeypatch.setattr("benchmarks.checkpoints.find.etag", lambda *_: ("a hash", None))
    monkeypatch.setattr(Checkpoint, "create", refuse)
    built: list[object] = []
    monkeypatch.setattr(Checkpoint, "try_at", lambda *asked: built.append(asked))
    root = tmp_path / "photos"
    for index, name in enumerate(("n02123045", "n02099601") * 4):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), index, dtype=np.uint8)).save(root / name / f"{index}.png")
    arguments = ["--models", "all", "--data", str(root), "--out", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--task", "single,mosaic", "--img-size", "64"]
    assert main([*arguments, "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    counted = re.search(r"(\d+) cells: (\d+) to do, (\d+) not applicable", printed)
    assert counted, printed
    cells, to_do, others = map(int, counted.groups())
    assert (cells, to_do + others) == (82, 82) and to_do >= 2
    assert f"{2 * len(headless)} cells not applicable: the checkpoint has no classifier (num_classes=0)" in printed
    assert re.search(rf"{to_do} cells, \d+ images, .* of forward passes", printed)
    assert "--dry-run cells lists each" in printed
    assert f"{to_do} of them are not at the checkpoint's own size" in printed
    assert names[0] not in printed
    assert not built, "which takes seconds for each"
    assert main([*arguments, "--dry-run", "cells"]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"{name} ") >= 2 for name in (HEADLESS, *names))
    assert not (tmp_path / "out").exists()


def test_the_cost_of_what_has_no_classifier_can_be_asked() -> None:
    assert macs_of(Cell(Checkpoint("timm", HEADLESS), images(), "single", (224, 224))) == UNKNOWN_MACS
