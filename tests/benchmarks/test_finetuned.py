"""Checkpoints of one's own: named classes or not, files of timm's train script, from the command line to the tables."""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.utils import CheckpointSaver, natural_key

from benchmarks.sweep import main

NAMES = ("bird", "n10 cat", "n9 dog", "wolf")  # natural order: n9 before n10


def pictures(root: Path, folders: tuple[str, ...], each: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for index in range(each * len(folders)):
        folder = root / folders[index % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


def checkpoint(folder: Path, classes: int, **config: object) -> str:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=classes)
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
    return f"local-dir:{folder}"


def trained(folder: Path, classes: int, **args: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    namespace = argparse.Namespace(model="test_resnet", num_classes=classes, **args)
    CheckpointSaver(model, optimizer, namespace, checkpoint_dir=str(folder)).save_checkpoint(0, metric=1.0)
    return f"file:test_resnet@{folder / 'model_best.pth.tar'}"


def sweep(out: Path, models: str, data: Path, *more: str) -> tuple[int, list[dict], list[dict]]:
    arguments = ["--models", models, "--data", str(data), "--out", str(out), "--workers", "0", "--device", "cpu", *more]
    status = main(arguments)
    records = [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))]
    with (out / "summary.csv").open(newline="") as file:
        return status, records, list(csv.DictReader(file))


def top1_by_timm(model: torch.nn.Module, data: Path) -> float:
    """As timm's validate.py counts it: the folders in timm's order are the outputs of the head."""
    dataset = create_dataset("", root=str(data))
    config = resolve_model_data_config(model)
    loader = create_loader(dataset, **config, batch_size=8, num_workers=0, use_prefetcher=False)
    with torch.inference_mode():
        right = [model(images).argmax(1) == targets for images, targets in loader]
    return 100 * torch.cat(right).float().mean().item()


def baseline(record: dict, metric: str = "top1") -> float:
    return next(r["baseline"] for r in record["results"] if (r["metric"], r["protocol"]) == (metric, "fixed"))


def test_folders_in_timms_order_stand_for_the_outputs_of_a_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pictures(tmp_path / "data", NAMES)
    model = checkpoint(tmp_path / "model", 4)
    status, (record,), _ = sweep(tmp_path / "out", model, data)
    assert (status, record["status"]) == (0, "ok")
    assert record["classes_from"] == "the natural order of the folders, as timm's train script has them"
    assert "Classes of the head by the natural order of the folders, as timm's train script has them" in (
        " ".join(capsys.readouterr().out.split())
    )
    assert baseline(record) == pytest.approx(top1_by_timm(timm.create_model(model, pretrained=True).eval(), data))
    assert sorted(NAMES, key=natural_key) != sorted(NAMES), "or the order would not be tested"


def test_folders_called_by_index(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", 12)
    _, (record,), _ = sweep(tmp_path / "out", model, pictures(tmp_path / "data", tuple(map(str, range(12)))))
    assert (record["status"], record["classes_from"]) == ("ok", "folders called 0 to 11")


def test_a_file_of_names_comes_first(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", ("cat", "dog"))
    model = checkpoint(tmp_path / "model", 3, label_names=["cat", "dog", "bird"])
    names = tmp_path / "names.txt"
    names.write_text("dog\nbird\ncat\n")
    _, (own,), _ = sweep(tmp_path / "own", model, data)
    assert own["classes_from"] == "label_names of the checkpoint"
    _, (record,), _ = sweep(tmp_path / "out", model, data, "--class-names", str(names))
    assert (record["classes_from"], record["columns"]) == ("names.txt", 2)
    assert record["key"]["class_names"].startswith("names.txt ")
    assert "class_names" not in own["key"]
    names.write_text("0 dog\n1 cat\n")
    status, (record,), _ = sweep(tmp_path / "wrong", model, data, "--class-names", str(names))
    assert (status, record["status"]) == (1, "not_applicable")
    assert "names.txt has 2 names, and the head 3 classes" in record["reason"]


def test_what_is_not_measured_at_all_is_no_success(tmp_path: Path) -> None:
    data, model = pictures(tmp_path / "data", ("cat", "dog")), checkpoint(tmp_path / "model", 3)
    status, (record,), _ = sweep(tmp_path / "out", model, data)
    assert (status, record["status"]) == (1, "not_applicable")
    assert record["reason"].startswith(
        "the names of the head's 3 classes are unknown, and the data has 2 classes (cat; dog): expected --class-names "
        "FILE with one name for each class of the head, label_names in config.json, folders called 0 to 2, or 3 folders"
    )
    named = checkpoint(tmp_path / "named", 3, label_names=["cat", "dog", "bird"])
    assert sweep(tmp_path / "out", f"{model},{named}", data)[0] == 0


@pytest.mark.parametrize("task", ["single", "multilabel"])
def test_a_table_gives_the_order_of_its_classes(tmp_path: Path, task: str) -> None:
    data = pictures(tmp_path / "data", ("images",), each=8)
    column = {"single": "label", "multilabel": "labels"}[task]
    rows = [f"images/{path.name},{index % 3}" for index, path in enumerate(sorted((data / "images").iterdir()))]
    (data / "labels.csv").write_text("\n".join([f"file,{column}", *rows, ""]))
    (data / "classes.txt").write_text("0 wolf\n1 cat\n2 dog\n")
    _, (record,), _ = sweep(tmp_path / "out", checkpoint(tmp_path / "model", 3), data, "--task", task)
    assert (record["status"], record["classes_from"]) == ("ok", "the order of classes.txt")


def test_a_file_of_timms_train_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pictures(tmp_path / "data", NAMES)
    model = trained(tmp_path / "run", 4, img_size=96, crop_pct=1.0)
    status, (record,), (row, *_) = sweep(tmp_path / "out", model, data)
    assert (status, record["status"], record["img_size"]) == (0, "ok", 96)
    assert record["model"] == row["model"] == model
    assert record["weights_from"] == "state_dict of model_best.pth.tar"
    assert record["preprocessing"]["crop_pct"] == 1.0
    assert "state_dict of model_best.pth.tar" in " ".join(capsys.readouterr().out.split())
    plain = timm.create_model(
        "test_resnet",
        num_classes=4,
        checkpoint_path=model.partition("@")[2],
        pretrained_cfg_overlay={"input_size": (3, 96, 96), "crop_pct": 1.0},
    )
    assert baseline(record) == pytest.approx(top1_by_timm(plain.eval(), data))


def test_an_order_of_classes_of_the_training_is_not_guessed(tmp_path: Path) -> None:
    data, model = pictures(tmp_path / "data", NAMES), trained(tmp_path / "run", 4, class_map="order.txt")
    status, (record,), _ = sweep(tmp_path / "out", model, data)
    assert (status, record["status"]) == (1, "not_applicable")
    assert "was trained with --class-map order.txt: give that to --class-names" in record["reason"]
    (tmp_path / "order.txt").write_text("\n".join(sorted(NAMES)))
    status, (record,), _ = sweep(tmp_path / "out2", model, data, "--class-names", str(tmp_path / "order.txt"))
    assert (status, record["status"]) == (0, "ok")


def test_a_file_that_cannot_be_read_stops_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pictures(tmp_path / "data", ("cat", "dog"))
    for models, text in (
        (f"file:test_resnet@{tmp_path / 'gone.pth.tar'}", "gone.pth.tar not found; expected a checkpoint of timm's"),
        ("file:gone.pth.tar", "expected ARCH@PATH, such as resnet50@output/train/model_best.pth.tar"),
    ):
        assert main(["--models", models, "--data", str(data), "--out", str(tmp_path / "out")]) == 2
        assert text in capsys.readouterr().err
