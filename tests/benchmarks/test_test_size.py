"""`--img-size test`: the size and crop at which timm itself validates a checkpoint, and publishes its figures."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from benchmarks.asked import asked_cells
from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.sources import load_image_set
from benchmarks.reporting.expected import check
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.loading import Loaded
from benchmarks.scoring.measure import load_images
from benchmarks.show import main as show
from benchmarks.sweep import main as sweep
from benchmarks.tune import main as tune
from timm_csra.evaluation.scoring import DEFAULT, PLAIN

TEST = {"test_input_size": [3, 192, 192], "test_crop_pct": 1.0}
SINGLE, BOTH = [("single", None)], [("single", None), ("mosaic", 2)]


def save(folder: Path, seed: int = 0, **cfg: object) -> Checkpoint:
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay={"crop_pct": 0.9, **cfg})
    timm.models.save_for_hf(model, str(folder), model_config={"label_names": ["cat", "dog"]}, safe_serialization=True)
    return Checkpoint("local-dir", str(folder))


def cells(model: Checkpoint, requests: str, photos: Path, tasks: list = SINGLE, crop_pct: float | None = None) -> list:
    asked = asked_cells(model, requests, [load_image_set(photos)], tasks, {}, crop_pct)
    return [(cell.task, cell.size, cell.requested, cell.test_crop_pct) for cell in asked]


@pytest.mark.parametrize("name", timm.list_models(pretrained=True)[::12])
def test_it_is_what_timm_validates_at(name: str) -> None:
    checkpoint, cfg = Checkpoint("timm", name), timm.get_pretrained_cfg(name).to_dict()
    own, test = (resolve_data_config(pretrained_cfg=cfg, use_test_size=use) for use in (False, True))
    assert checkpoint.test_input() == (
        test["input_size"][1:],
        None if test["crop_pct"] == own["crop_pct"] else test["crop_pct"],
    )


def test_each_size_in_pixels_is_measured_once(tmp_path: Path, photos: Path) -> None:
    """And answers every request that it is the size of."""
    own, test = (160, 160), (192, 192)
    without, with_one = save(tmp_path / "without"), save(tmp_path / "with", **TEST)
    assert cells(without, "1x,test", photos) == [("single", own, ("1x", "test"), None)]
    assert cells(without, "test", photos) == [("single", own, ("test",), None)]
    assert cells(with_one, "1x,test", photos) == [("single", own, ("1x",), None), ("single", test, ("test",), 1.0)]
    # 192 pixels as they are asked for are cropped as 160 are; a mosaic is not cropped.
    both = cells(with_one, "192,test", photos, BOTH)
    mosaic = ("mosaic", test, ("192", "test"), None)
    assert both == [("single", test, ("192",), None), mosaic, ("single", test, ("test",), 1.0)]
    assert cells(with_one, "192,test", photos, crop_pct=0.5) == [("single", test, ("192", "test"), None)]
    double = save(tmp_path / "double", test_input_size=[3, 320, 320])
    larger = ("single", (320, 320), ("2x", "test"), None)
    assert cells(double, "1x,2x,test", photos) == [("single", own, ("1x",), None), larger]
    cropped = save(tmp_path / "cropped", test_crop_pct=0.5)
    assert cells(cropped, "1x,test", photos) == [("single", own, ("1x",), None), ("single", own, ("test",), 0.5)]


def test_pictures_are_prepared_as_timm_validates(tmp_path: Path, photos: Path) -> None:
    data, checkpoint = load_image_set(photos), save(tmp_path / "model", **TEST)
    model = checkpoint.create((192, 192))
    (cell,) = asked_cells(checkpoint, "test", [data], SINGLE, {})
    how = Options((PLAIN, DEFAULT), workers=0)
    transform = create_transform(**resolve_data_config(model=model, use_test_size=True))
    for options, expected in ((how, transform), (Options((PLAIN,), workers=0, crop_pct=0.5), None)):
        loader, preprocessing, _ = load_images(cell, Loaded(model, (192, 192)), options)
        images = torch.cat([images for images, _, _ in loader])
        if expected is None:
            assert preprocessing["crop_pct"] == 0.5, "what is asked for comes first"
        else:
            assert torch.equal(images, torch.stack([expected(Image.open(path).convert("RGB")) for path in data.paths]))
    keys = [Cell(checkpoint, data, "single", (192, 192), test_crop_pct=crop).key(how) for crop in (None, 1.0)]
    assert keys[0] != keys[1]
    assert "test_crop_pct" not in keys[0]


def test_verdicts_are_over_checkpoints_of_all_crops(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [
        save(tmp_path / "a"),
        save(tmp_path / "b", 1, **TEST),  # of other weights: the same ones count once
        save(tmp_path / "c", 2, **{**TEST, "test_crop_pct": 0.8}),
    ]
    arguments = ["--models", ",".join(model.name for model in models), "--data", str(photos), "--img-size", "test"]
    assert sweep([*arguments, "--out", str(tmp_path / "out"), "--workers", "0", "--device", "cpu"]) == 0
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").glob("*.json")]
    assert {(r["img_size"], r["preprocessing"]["crop_pct"]) for r in records} == {(160, 0.9), (192, 1.0), (192, 0.8)}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = next(line for line in lines if line[1:5] == ["single", "test", "top1", "fixed"])
    assert sum(map(int, counts[5:8])) == 3


def test_published_figures_are_compared_at_their_size() -> None:
    expected = {"m": {"top1": "80.0", "img_size": "192", "crop_pct": "1.000", "interpolation": "bicubic"}}
    record = {
        "model": "m", "task": "single", "n": 50_000, "img_size": 192, "requested": ["test"],
        "preprocessing": {"crop_pct": 1.0, "interpolation": "bicubic"},
        "results": [{"metric": "top1", "protocol": "fixed", "baseline": 80.05}],
    }  # fmt: skip
    assert check(record, expected) == "agrees"
    assert check(record | {"results": [record["results"][0] | {"baseline": 80.2}]}, expected) == "flagged"
    smaller = record | {"img_size": 160, "requested": ["1x"]}
    assert check(smaller, expected) == "not compared: img_size 160, published for 192 (see --img-size test)"


def test_show_and_tune_take_it(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = save(tmp_path / "model", **TEST).name
    picture = str(next(photos.rglob("*.png")))
    for request, status in (("test", 0), ("192", 0), ("2x", 0), ("huge", 2), ("0", 2)):
        assert show([picture, "--model", name, "--img-size", request, "--out", str(tmp_path / "out.png")]) == status
    assert "--img-size: found 'huge'; expected pixels, multiples or test" in capsys.readouterr().err
    more = ["--models", name, "--data", str(photos), "--img-size", "test", "--device", "cpu", "--workers", "0"]
    assert tune([*more, "--folds", "3"]) == 0
    assert "192 x 192 pixels" in capsys.readouterr().out
    assert tune([*more, "--without-labels"]) == 0
    assert "192 x 192 pixels" in capsys.readouterr().out
