"""Two reductions of log-probabilities: against their formulas, and from photographs on disk to the printed difference."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.special import log_softmax, logsumexp, softmax

from benchmarks.log_mean_exp import LOG_MEAN_EXP, main, reductions, score_both
from timm_csra.config import LOG_SOFTMAX
from timm_csra.evaluation.scoring import Setting, score

from .test_survival import save


@pytest.mark.parametrize("scale", [1, 30])
def test_formulas(scale: float) -> None:
    s = log_softmax(scale * np.random.default_rng(0).standard_normal((2, 6, 5)), axis=2)
    found = reductions(torch.tensor(s, dtype=torch.float32), (1.0, 5.0))
    assert found.keys() == {(kind, T) for kind in (LOG_SOFTMAX, LOG_MEAN_EXP) for T in (1.0, 5.0)}
    for T in (1.0, 5.0):
        np.testing.assert_allclose(found[LOG_SOFTMAX, T], (softmax(T * s, axis=1) * s).sum(axis=1), rtol=1e-5)
        np.testing.assert_allclose(found[LOG_MEAN_EXP, T], logsumexp(T * s, axis=1, b=1 / 6) / T, rtol=1e-5)


def test_one_is_the_average_of_the_other_over_lower_temperatures() -> None:
    s = torch.randn(2, 6, 5, dtype=torch.float64).log_softmax(dim=2)
    middles = (np.arange(400) + 0.5) / 400 * 5.0
    of_lower = torch.stack([reductions(s, (T,))[LOG_SOFTMAX, T] for T in middles])
    torch.testing.assert_close(reductions(s, (5.0,))[LOG_MEAN_EXP, 5.0], of_lower.mean(dim=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_library_s_scores_are_those_of_score(name: str) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    batches = [(torch.randn(count, 3, *model.pretrained_cfg["input_size"][1:]), torch.zeros(count)) for count in (2, 3)]
    expected, _ = score(model, batches, [Setting(1.0, (1.0, 5.0), LOG_SOFTMAX)], columns=[4, 0])
    found, targets = score_both(model, batches, (1.0, 5.0), [4, 0])
    torch.testing.assert_close(found.base, expected.base)
    for term, attention in expected.attention.items():
        torch.testing.assert_close(found.attention[term], attention)
    assert targets.shape == (5,)


def test_photographs_and_mosaics(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = tmp_path / "several"
    (several / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), ["file,labels"]
    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(several / "images" / f"{index}.png")
        rows.append(f"images/{index}.png,{['0', '1', '', '0 1'][index % 4]}")
    (several / "labels.csv").write_text("\n".join(rows))
    (several / "classes.txt").write_text("0 cat\n1 dog\n")
    models = ",".join(save(tmp_path / f"model{seed}", seed) for seed in range(2))
    arguments = ["--models", models, "--img-size", "64", "--grid", "1", "--workers", "0", "--device", "cpu"]
    assert main([*arguments, "--data", str(several), str(photos)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", head)[-3:] == ["softmax-weighted mean", "log-mean-exp", "difference"]
    rows = [line for line in lines if re.match("model", line)]
    assert len(rows) == 6
    differences: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        library, candidate, difference = (float(gain) for gain in re.findall(r"([+-]\d+\.\d\d) \[", row))
        assert difference == pytest.approx(candidate - library, abs=0.011)
        _, data, _, _, metric, n, *_ = re.split(r"  +", row)
        differences.setdefault((data, metric, n), []).append(difference)
    # Three of the twelve photographs have no label: lrap, an average over those with one, does not count them.
    assert differences.keys() == {("several", "mAP", "12"), ("several", "lrap", "9"), ("photos", "lrap", "12")}
    for (data, metric, n), each in differences.items():
        (line,) = (
            line for line in lines if line.startswith(f"{data} ") and f" {metric} (n = {n}), 2 checkpoints: " in line
        )
        assert float(re.findall(r"([+-]\d+\.\d\d) \[", line)[0]) == pytest.approx(np.mean(each), abs=0.011)


def test_what_does_not_fit_is_told(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", save(tmp_path / "model"), "--data", str(photos), "--workers", "0", "--img-size", "64"]
    assert main([*arguments, "--temperatures", "1,inf"]) == 2
    assert "--temperatures: found inf; expected finite values" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "photos: found 3 images, expected at least 4, two for each half." in capsys.readouterr().err
