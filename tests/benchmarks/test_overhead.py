"""The benchmark of time and memory, and with it the guard against gross regressions: ratios of one and the same run."""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_csra
from benchmarks import sweep_pass
from benchmarks.overhead import VARIANTS, _call, _parser, _table, main, measure
from timm_csra.evaluation.scoring import Scores, score

NAIVE = ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("name", NAIVE)
@torch.no_grad()
def test_all_variants_compute_what_they_are_compared_for(name: str) -> None:
    args = _parser().parse_args([])
    model = timm.create_model(name).eval()
    for parameter in model.get_classifier().parameters():
        nn.init.normal_(parameter)
    explanation = timm_csra.explain(model)
    x = torch.randn(2, *explanation.input_size)
    naive, wrapped = (_call(model, variant, explanation, args)(x) for variant in ("naive", "wrapped"))
    if name != "test_vit":  # whose norm comes before its tokens are pooled, and whose class token decides
        torch.testing.assert_close(naive, wrapped, rtol=1e-4, atol=1e-3)
    assert (naive - model(x)).abs().max() > 0.01


def test_what_does_not_apply_is_left_out() -> None:
    args = _parser().parse_args([])
    model = timm.create_model("test_convnext").eval()
    calls = {variant: _call(model, variant, timm_csra.explain(model), args) for variant in VARIANTS}
    assert [variant for variant, call in calls.items() if call] == ["plain", "wrapped", "log_softmax"]


def test_a_sweep_is_measured_as_it_scores_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Scores] = []

    def remembered(*args: Any, **options: Any) -> tuple[Scores, torch.Tensor]:
        scores, targets = score(*args, **options)
        found.append(scores)
        return scores, targets

    monkeypatch.setattr(sweep_pass, "score", remembered)
    arguments = ["--sweep", "--batch-size", "2", "--rounds", "1", "--warmup", "0", "--num-classes", "7"]
    cost = measure("test_resnet", _parser().parse_args(arguments))
    assert all(scores.base.shape == (1 + 2, 7) for scores in found)
    logits, both = sorted((set(scores.attention) for scores in found), key=len)
    assert logits == set(itertools.product(["logits"], [1, 5, math.inf]))
    assert both == set(itertools.product(["logits", "log_softmax"], [1, 5, math.inf]))
    assert cost.ratios.keys() >= {"sweep_logits", "sweep"}
    assert cost.over_sweep_logits.median == pytest.approx(cost.seconds["sweep"] / cost.seconds["sweep_logits"])
    assert [str(column.header) for column in _table([cost]).columns][-3:] == [
        "sweep_logits/plain", "sweep/plain", "sweep/sweep_logits"
    ]  # fmt: skip


def test_the_check_of_the_first_images_is_not_in_the_time_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def slow_to_start(model: nn.Module, batches: Any, *_: Any, **__: Any) -> None:
        for images, targets in batches:
            assert len(images) == len(targets)
            time.sleep(0 if sizes else 0.3)
            sizes.append(len(images))

    monkeypatch.setattr(sweep_pass, "score", slow_to_start)
    model = timm.create_model("test_resnet").eval()
    seconds = sweep_pass.batch_seconds(model, timm_csra.explain(model), (), "cpu", torch.zeros(4, 3, 160, 160))
    assert sizes == [1, 4]
    assert 0 < seconds < 0.3


def test_a_sweep_is_not_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "test_resnet", "--sweep", "--compile"]) == 2
    assert "leave out --sweep or --compile" in capsys.readouterr().err


def test_unknown_models_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "resnet18,resnet_of_tomorrow"]) == 2
    assert "timm has no architecture resnet_of_tomorrow" in capsys.readouterr().err


@pytest.mark.benchmark
def test_wrapping_is_cheap_in_time_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overhead.json"
    models = ["--models", "resnet18,mobilenetv3_small_100", "--batch-size", "4"]
    assert main([*models, "--rounds", "11", "--out", str(out)]) == 0
    costs = {cost["model"]: cost for cost in json.loads(out.read_text())["costs"]}
    assert costs["resnet18"]["ratios"]["wrapped"]["median"] < 1.3
    assert costs["mobilenetv3_small_100"]["ratios"]["wrapped"]["median"] < 2.2
    assert costs["resnet18"]["floor"] < 1.02
    assert costs["resnet18"]["over_logits"]["median"] < 1.15
    for cost in costs.values():
        assert cost["added"]["low"] <= cost["added"]["median"] <= cost["added"]["high"]
    # ResNet-18's few per cent can drown in the noise of eleven rounds; a second pass through a hidden layer does not.
    assert abs(costs["resnet18"]["added"]["median"]) < 0.3 * costs["resnet18"]["seconds"]["plain"]
    nonlinear = costs["mobilenetv3_small_100"]
    assert 0 < nonlinear["added"]["median"] < 1.2 * nonlinear["seconds"]["plain"]
    assert 1 < costs["resnet18"]["least"]["median"] < 1.3
    assert costs["mobilenetv3_small_100"]["least"] is None  # its head is no single product
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "resnet18" in capsys.readouterr().out

    arguments = ["--models", "test_resnet", "--img-size", "448", "--num-classes", "60000", "--batch-size", "8"]
    assert main([*arguments, "--rounds", "3", "--warmup", "1", "--memory", "--out", str(out)]) == 0
    (cost,) = json.loads(out.read_text())["costs"]
    extra = {variant: megabytes - cost["megabytes"]["plain"] for variant, megabytes in cost["megabytes"].items()}
    assert extra["naive"] > 150  # 8 x 196 x 60000 scores of 4 bytes are 376 MB, after a peak of the plain model's own
    assert extra["wrapped"] < extra["naive"] / 5
    assert cost["ratios"]["wrapped"]["median"] < 1.5 * cost["ratios"]["naive"]["median"]
