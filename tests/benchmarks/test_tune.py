"""`python -m benchmarks.tune`, from photographs on disk to a saved checkpoint."""

from pathlib import Path

import pytest
import timm
import torch

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


def test_what_does_not_fit_is_told(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    arguments = ["--data", str(photos), "--workers", "0"]
    assert main(["--models", model, *arguments, "--metric", "mAP"]) == 2
    assert "benchmarks.tune: metric: found 'mAP' for targets that are class indices" in capsys.readouterr().err
    assert main(["--models", f"{model},pypi:*", *arguments]) == 2
    assert "found 4 combinations of checkpoint, data and task; expected one" in capsys.readouterr().err
    assert main(["--models", model, *arguments, "--task", "multilabel"]) == 2
    assert "needs several labels for each image" in capsys.readouterr().err


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
