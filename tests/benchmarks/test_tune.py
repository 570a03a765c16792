"""`python -m benchmarks.tune`, from photographs on disk to a saved checkpoint."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_csra
from benchmarks.tune import main

from .test_survival import save


def test_no_evidence_on_noise(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    arguments = ["--models", model, "--data", str(photos), "--workers", "0", "--folds", "3", "--img-size", "64"]
    assert main([*arguments, "--save", str(tmp_path / "tuned")]) == 0
    told = capsys.readouterr().out
    assert "No evidence that CSRA helps here: use lam=0, the plain model." in told
    assert "on held-out images  top1" in told
    assert "(n = 12, 3 folds)" in told
    saved = timm_csra.from_pretrained(str(tmp_path / "tuned")).eval()
    assert saved.csra.lam == 0
    x = torch.randn(1, 3, 64, 64)
    plain = timm.create_model(model, pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(saved(x), plain(x))


def test_the_names_given_for_the_classes_are_saved(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint names its classes in another order, and describes them."""
    torch.manual_seed(0)
    labels = {"label_names": ["one", "two", "three"], "label_descriptions": {"one": "the first"}}
    timm.models.save_for_hf(
        timm.create_model("test_resnet", num_classes=3), str(tmp_path / "model"), model_config=labels
    )
    (tmp_path / "names.txt").write_text("dog\nowl\ncat\n")
    arguments = ["--data", str(photos), "--workers", "0", "--folds", "3", "--img-size", "64"]
    given = ["--models", f"local-dir:{tmp_path / 'model'}", "--class-names", str(tmp_path / "names.txt")]
    assert main([*given, *arguments, "--save", str(tmp_path / "tuned")]) == 0
    found = re.search(r"on held-out images .*", capsys.readouterr().out)
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["label_names"] == ["dog", "owl", "cat"]
    assert "label_descriptions" not in config
    assert main(["--models", f"local-dir:{tmp_path / 'tuned'}", *arguments]) == 0  # which needs no file any more
    assert found and found[0] in capsys.readouterr().out


def test_what_does_not_fit_is_told(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    arguments = ["--data", str(photos), "--workers", "0"]
    assert main(["--models", model, *arguments, "--metric", "mAP"]) == 2
    assert "benchmarks.tune: metric: found 'mAP' for targets that are class indices" in capsys.readouterr().err
    assert main(["--models", f"{model},pypi:*", *arguments]) == 2
    assert "found 4 combinations of checkpoint, data and task; expected one" in capsys.readouterr().err
    assert main(["--models", model, *arguments, "--task", "multilabel"]) == 2
    assert "needs several labels for each image" in capsys.readouterr().err


def test_pictures_in_no_class_folder_have_no_label(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither all of them, nor one that lies beside the class folders; of the archive as of the folder."""
    model, (first, *others) = save(tmp_path / "model"), sorted(photos.rglob("*.png"))
    for loose in ([first], others):
        for photo in loose:
            photo.rename(photos / f"loose-{photo.parent.name}-{photo.name}")
        archive = shutil.make_archive(str(tmp_path / "archive"), "zip", photos)
        for data in (str(photos), archive):
            assert main(["--models", model, "--data", data, "--workers", "0"]) == 2
            said = capsys.readouterr().err
            count = 1 if loose == [first] else len(others) + 1
            assert f"{data}: found {count} of {len(others) + 1} pictures in no class folder, such as loose-" in said
            assert "expected a folder for each class, or labels.csv; benchmarks.tune --without-labels needs" in said


@pytest.mark.filterwarnings("ignore:.*the largest tried")
def test_without_labels_any_folder_of_pictures_will_do(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "model")
    flat = tmp_path / "flat"
    flat.mkdir()
    for photo in photos.rglob("*.png"):
        photo.rename(flat / photo.name)
    (flat / "labels.csv").write_text("no label here\n")
    arguments = ["--models", model, "--data", str(flat), "--workers", "0", "--without-labels", "--img-size", "64"]
    settings = ["--agreement", "0.5", "--lams", "0.2,0.1", "--temperatures", "5+inf", "--scores", "logits"]
    assert main([*arguments, *settings, "--save", str(tmp_path / "tuned")]) == 0
    told, warned = capsys.readouterr()
    saved = timm_csra.from_pretrained(str(tmp_path / "tuned")).eval()
    plain = timm.create_model(model, pretrained=True).eval()
    config = resolve_data_config({"input_size": (3, 64, 64)}, model=plain)
    x = torch.stack([create_transform(**config)(Image.open(path).convert("RGB")) for path in flat.glob("*.png")])
    with pytest.warns(UserWarning, match="found 12 pictures, too few"):
        expected = timm_csra.choose_lam(plain, [x], 0.5, (0.1, 0.2), (5, math.inf), "logits")
    assert f"{model} on flat, 64 x 64 pixels\n{expected}\nsaved with lam={expected.lam:g} to" in told
    assert "benchmarks.tune: test_resnet: found 12 pictures, too few to choose lam reliably" in warned
    assert (saved.csra.lam, saved.csra.temperature) == (expected.lam, (5, math.inf))


def test_what_goes_wrong_without_labels_is_told(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    model, data = ["--models", save(tmp_path / "model")], ["--data", str(photos)]
    for arguments, text in (
        ([*model, *data, "--task", "single"], "--task: needs labels; leave it out with --without-labels"),
        ([*model, *data, "--class-map", "coco80-to-imagenet1k"], "--class-map: needs labels"),
        ([*model, *data, "--lams", "0,0.1"], "lams: found 0, 0.1; expected at least one value, all above 0"),
        ([*model, *data, "--lams", "a"], "--lams: found 'a'; expected numbers separated by ','"),
        ([*model, *data, "--temperatures", "1,inf"], "--temperatures: found 1,inf; expected one with --without-labels"),
        ([*model, *data, "--temperatures", "-1"], "temperature must be positive, got -1.0"),
        ([*model, "--data", str(tmp_path / "empty")], "Found 0 images"),
        ([*model, "--data", "hfids/user/set"], "hfids/user/set: a stream has no list of its pictures"),
        (["--models", "pypi:*", *data], "found 3 combinations of checkpoint and size; expected one"),
        (
            [*model, *data, "--scores", "logits,log_softmax"],
            "--scores: found logits,log_softmax; expected one of logits",
        ),
    ):
        assert main([*arguments, "--without-labels", "--workers", "0"]) == 2
        assert text in capsys.readouterr().err
    assert main([*model, *data, "--agreement", "0.9"]) == 2
    assert "--agreement: needs --without-labels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*model, *data, "--without-labels", "--agreement", "98"])
    assert "found '98'; expected a share above 0, at most 1" in capsys.readouterr().err


def test_pictures_that_cannot_be_read_without_labels(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cat" / "broken.png").write_text("no picture")
    arguments = ["--models", save(tmp_path / "model"), "--data", str(photos), "--workers", "0", "--without-labels"]
    assert main(arguments) == 2
    assert "1 of 13 images cannot be read: " in capsys.readouterr().err
    assert main([*arguments, "--skip-bad-images"]) == 0
    told, log = capsys.readouterr()
    assert "n = 12)" in told
    assert "left out: 1 of 13 images cannot be read: " in log
    assert "broken.png" in log


def test_the_help_says_which_pictures_are_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "any folder of pictures of ONE OBJECT EACH" in told
    assert "without labels 0.05,0.1,0.2,0.3,0.5,1,2,4,8" in told


def test_real_photographs_without_labels(
    real_data: Path, real_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = f"local-dir:{real_weights / 'test_resnet'}", str(real_data / "imagenette500")
    arguments = ["--models", model, "--data", data, "--limit", "100", "--workers", "0", "--device", "cpu"]
    assert main([*arguments, "--without-labels"]) == 0
    assert f"{model} on imagenette500, 96 x 96 pixels\nUse lam=" in capsys.readouterr().out


@pytest.mark.slow
def test_mosaics_of_real_photographs(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--models",
        "pypi:tf_efficientnet_lite0",
        "--data",
        str(real_data / "imagenette500"),
        "--task",
        "mosaic",
    ]
    assert main([*arguments, "--metric", "lrap", "--device", "cpu"]) == 0
    assert "CSRA helps here: use lam=" in capsys.readouterr().out
