"""`--score-classes`: over the classes that the data declares, or over all of the head; never both in one verdict."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_csra
from benchmarks.report import main as report
from benchmarks.sweep import main
from benchmarks.tune import main as tune
from timm_csra.card import model_card

NAMES = ["bird", "dog", "fish", "cat", "wolf", "fox"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=len(NAMES))
    torch.nn.init.normal_(model.get_classifier().weight, std=3)
    timm.models.save_for_hf(
        model, str(tmp_path / "model"), model_config={"label_names": NAMES}, safe_serialization=True
    )
    return f"local-dir:{tmp_path / 'model'}"


def sweep(out: Path, model: str, photos: Path, *more: str) -> list[dict]:
    arguments = ["--models", model, "--data", str(photos), "--out", str(out), "--workers", "0", "--device", "cpu"]
    assert main([*arguments, "--img-size", "64", *more]) == 0
    records = [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))]
    return sorted(records, key=lambda record: (record["task"], record["score_classes"]))


def logits_and_targets(name: str, photos: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model, args={"input_size": (3, 64, 64)}))
    paths = sorted(photos.rglob("*.png"))
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]))
    return logits, torch.tensor([NAMES.index(path.parent.name) for path in paths])


def test_top1_over_all_classes_of_the_head(tmp_path: Path, model: str, photos: Path) -> None:
    sweep(tmp_path / "out", model, photos)
    data, head = sweep(tmp_path / "out", model, photos, "--score-classes", "head")
    logits, targets = logits_and_targets(model, photos)
    declared = torch.tensor([NAMES.index(name) for name in ("dog", "cat")])
    among = declared[logits[:, declared].argmax(1)]
    expected = [100 * (found == targets).float().mean().item() for found in (among, logits.argmax(1))]
    found = [record["results"][0]["baseline"] for record in (data, head)]
    assert found == pytest.approx(expected)
    assert found[0] > found[1], "or the test would say nothing"
    assert (data["columns"], head["columns"]) == (2, 6)
    assert (data["score_classes"], head["score_classes"]) == ("data", "head")
    assert "score_classes" not in data["key"], "records of before keep their names"
    assert head["key"]["score_classes"] == "head"


def test_all_tables_tell_them_apart(
    tmp_path: Path, model: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tasks = tmp_path / "out", ("--task", "single,mosaic")
    sweep(out, model, photos, *tasks)
    assert "all classes" not in capsys.readouterr().out
    sweep(out, model, photos, *tasks, "--score-classes", "head")
    assert "single (all classes)" in capsys.readouterr().out
    with (out / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["score_classes"] for row in rows} == {"data", "head"}
    fixed = [row for row in rows if (row["metric"], row["protocol"]) == ("top1", "fixed")]
    assert len(fixed) == 2
    assert all(row["p_holm"] == row["p_value"] for row in fixed), "each is a verdict of its own"
    assert report([str(out), "--no-plots"]) == 0
    page, table = (out / "report" / "index.html").read_text(), (out / "report" / "results.md").read_text()
    for text in ("photos · single (all classes) · 64", "photos · mosaic 2x2 (all classes) · 64"):
        assert json.dumps(text) in page
        assert f"| {text} |" in table
    assert "| photos, single (all classes), 64 | top1 | fixed |" in table
    with (out / "report" / "results.csv").open(newline="") as file:
        assert {row["score_classes"] for row in csv.DictReader(file)} == {"data", "head"}


def test_a_class_map_has_classes_of_its_own(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", model, "--data", str(tmp_path), "--class-map", "coco80-to-imagenet1k"]
    assert main([*arguments, "--score-classes", "head", "--device", "cpu"]) == 2
    assert "--score-classes head and --class-map: expected one of them" in capsys.readouterr().err


def test_a_card_says_so() -> None:
    row = {"metric": "top1", "protocol": "fixed", "n": 9, "scores": "logits", "lam": "0.1", "temperature": "inf"}
    row |= {"baseline": 50.0, "value": 51.0, "gain": 1.0, "ci_low": 0.5, "ci_high": 1.5}
    model = timm_csra.wrap(timm.create_model("test_resnet").eval())
    record = {"status": "ok", "model": "m", "data": "photos", "task": "single", "img_size": 64, "n": 9}
    record |= {"weights_sha256": "0", "score_classes": "head", "results": [row]}
    text = model_card(model, model.csra, "user/repo", [record], "0").content
    assert "| photos, single, all classes of the head | 64 |" in text
    assert "photos, single, all classes of the head, 64 px, 9 pictures" in text


def test_tune_says_so(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", model, "--data", str(photos), "--img-size", "64", "--workers", "0", "--device", "cpu"]
    assert tune([*arguments, "--folds", "3", "--score-classes", "head"]) == 0
    assert "single (all classes), 64 x 64 pixels" in capsys.readouterr().out
