"""One forward pass gives what the wrapped model gives at every setting."""

import math

import pytest
import torch
from timm.layers import TestTimePoolHead as TimmPoolHead

import timm_csra
from timm_csra.evaluation.scoring import DEFAULT, PLAIN, Setting, allows_test_time_pool, score, settings_grid

from .families import FAMILIES, Family, create, images


def test_settings_grid_holds_the_plain_setting_and_what_was_asked_for() -> None:
    assert settings_grid([], []) == [PLAIN]
    assert settings_grid([0, 0.1, 0.1], [math.inf]) == [PLAIN, DEFAULT]
    heads = (1.0, math.inf)
    grid = [Setting(0.5, (1.0,)), Setting(0.5, heads)]
    assert settings_grid([0, 0.5], iter([1, heads])) == [PLAIN, *grid]
    assert settings_grid([0, 0.5], [1, heads], also=[DEFAULT, PLAIN]) == [PLAIN, DEFAULT, *grid]
    with pytest.raises(ValueError, match="lam must be finite and at least 0, got -1"):
        settings_grid([-1], [1])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("wrapped", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "wrapped"])
def test_scores_equal_the_wrapped_model(family: Family, wrapped: bool) -> None:
    model = create(family.name)
    if wrapped:
        timm_csra.wrap(model, 0.7, 3)
    settings = settings_grid([0.05, 0.3], [1, (5, math.inf)])
    batches = [(images(family, 2, seed), torch.tensor([seed, 7])) for seed in (0, 1)]
    columns = [5, 3, 999]
    scores, targets = score(model, batches, settings, columns=columns)
    assert targets.tolist() == [0, 7, 1, 7]
    assert timm_csra.is_wrapped(model) is wrapped
    x = torch.cat([x for x, _ in batches])
    for setting in settings:
        reference = timm_csra.wrap(create(family.name), *setting)
        with torch.no_grad():
            torch.testing.assert_close(scores.logits(setting), reference(x)[:, columns], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2"])
@torch.no_grad()
def test_reduced_precision_is_that_of_the_wrapped_model(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    x = images(family, 4)
    scores, _ = score(create(name), [(x, torch.zeros(4))], [PLAIN, DEFAULT], amp_dtype=torch.bfloat16)
    wrapped = timm_csra.wrap(create(name), *DEFAULT)
    with torch.autocast("cpu", torch.bfloat16):
        logits = wrapped(x)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(scores.logits(DEFAULT), logits.float())
    assert scores.logits(PLAIN).unique().numel() < 0.5 * logits.numel()  # bf16 ties logits
    assert scores.logits(DEFAULT).unique().numel() < 0.5 * logits.numel()


def test_refusals() -> None:
    model = create("test_resnet")
    batch = (images(FAMILIES[0]), torch.zeros(2))
    with pytest.raises(ValueError, match="test_resnet: no image to score"):
        score(model, [], [PLAIN])
    with pytest.raises(ValueError, match="test_resnet: found NaN or infinite logits"):
        score(model, [batch, (batch[0] * math.nan, batch[1])], [PLAIN])
    model.forward = lambda x: torch.ones(2, 1000)
    with pytest.raises(ValueError, match=r"test_resnet: forward differs from forward_head\(forward_features\(x\)\) by"):
        score(model, [batch], [PLAIN])


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
@torch.no_grad()
def test_test_time_pooling_is_timms(name: str) -> None:
    model = create(name)
    x = torch.randn(3, 3, 288, 256, generator=torch.Generator().manual_seed(0))
    assert allows_test_time_pool(timm_csra.explain(model, (288, 256)))
    batches = [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(1))]
    scores, _ = score(model, batches, [PLAIN, DEFAULT], test_time_pool=True)
    timms = TimmPoolHead(create(name), original_pool=7).eval()
    torch.testing.assert_close(scores.pooled["test_time_pool"], timms(x), rtol=1e-4, atol=1e-4)


def test_test_time_pooling_needs_a_linear_head_and_a_window_that_fits() -> None:
    assert not allows_test_time_pool(timm_csra.explain(create("test_resnet"), 96))  # 3 x 3 locations
    assert not allows_test_time_pool(timm_csra.explain(create("test_convnext"), 256))  # a norm after the pool
