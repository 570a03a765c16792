"""One forward pass gives what the wrapped model gives at every setting."""

import math

import pytest
import torch
from timm.layers import TestTimePoolHead as TimmPoolHead

import timm_csra
from timm_csra.config import SCORES
from timm_csra.evaluation import scoring
from timm_csra.evaluation.scoring import (
    DEFAULT,
    DEFAULT_LOG_SOFTMAX,
    PLAIN,
    Setting,
    allows_test_time_pool,
    score,
    settings_grid,
)

from .families import FAMILIES, Family, create, images


def test_settings_grid_holds_the_plain_setting_and_what_was_asked_for() -> None:
    assert settings_grid([], []) == [PLAIN]
    assert settings_grid([0, 0.1, 0.1], [math.inf]) == [PLAIN, DEFAULT]
    heads = (1.0, math.inf)
    grid = [Setting(0.5, (1.0,)), Setting(0.5, heads)]
    assert settings_grid([0, 0.5], iter([1, heads])) == [PLAIN, *grid]
    assert settings_grid([0, 0.5], [1, heads], also=[DEFAULT, PLAIN]) == [PLAIN, DEFAULT, *grid]
    both = settings_grid([0, 0.5], iter([1]), iter(SCORES), also=[DEFAULT_LOG_SOFTMAX])
    log_softmax, logits = Setting(0.5, (1.0,), "log_softmax"), Setting(0.5, (1.0,))
    assert both == [PLAIN, DEFAULT_LOG_SOFTMAX, log_softmax, logits]
    with pytest.raises(ValueError, match="lam must be finite and at least 0, got -1"):
        settings_grid([-1], [1])
    with pytest.raises(ValueError, match="scores must be 'logits' or 'log_softmax', got 'softmax'"):
        settings_grid([0.1], [1], ["softmax"])


def test_the_fixed_settings() -> None:
    """The paper's, which `wrap` takes, and that of log-probabilities."""
    config = timm_csra.CSRAConfig()
    assert Setting(config.lam, config.temperatures, config.scores) == DEFAULT
    assert (0.3, (math.inf,), "log_softmax") == DEFAULT_LOG_SOFTMAX


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("wrapped", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "wrapped"])
def test_scores_equal_the_wrapped_model(family: Family, wrapped: bool) -> None:
    model = create(family.name)
    if wrapped:
        timm_csra.wrap(model, 0.7, 3, "log_softmax")
    settings = settings_grid([0.05, 0.3], [1, (5, math.inf)], SCORES)
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
@pytest.mark.parametrize("setting", [DEFAULT, DEFAULT_LOG_SOFTMAX], ids=SCORES)
@torch.no_grad()
def test_reduced_precision_is_that_of_the_wrapped_model(name: str, setting: Setting) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    x = images(family, 4)
    scores, _ = score(create(name), [(x, torch.zeros(4))], [PLAIN, setting], amp_dtype=torch.bfloat16)
    wrapped = timm_csra.wrap(create(name), *setting)
    with torch.autocast("cpu", torch.bfloat16):
        logits = wrapped(x)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(scores.logits(setting), logits.float())
    assert scores.logits(PLAIN).unique().numel() < 0.5 * logits.numel()  # bf16 ties logits
    assert scores.logits(setting).unique().numel() < 0.5 * logits.numel()


@torch.no_grad()
def test_log_probabilities_are_over_all_classes_of_the_head() -> None:
    """Against the formula in float64, for three of a thousand classes."""
    model, x, columns = create("test_resnet"), images(FAMILIES[0], 3), [5, 3, 999]
    settings = settings_grid([0.3], [5, math.inf], ["log_softmax"])
    scores, _ = score(model, [(x, torch.zeros(3))], settings, columns=columns)
    maps = timm_csra.score_maps(model, x).flatten(2).transpose(1, 2).double()
    s = (maps - maps.exp().sum(dim=2, keepdim=True).log())[..., columns]
    weights = (5 * s).exp()
    expected = {5.0: (weights * s).sum(1) / weights.sum(1), math.inf: s.amax(1)}
    for temperature, term in expected.items():
        found = scores.attention["log_softmax", temperature].double()
        torch.testing.assert_close(found, term, rtol=1e-5, atol=1e-5)
        logits = scores.logits(Setting(0.3, (temperature,), "log_softmax")).double()
        torch.testing.assert_close(logits, model(x)[:, columns].double() + 0.3 * term, rtol=1e-5, atol=1e-5)


def test_the_head_runs_once_for_both_kinds_of_scores() -> None:
    model = create("test_resnet")
    seen = []
    model.conv1.register_forward_hook(lambda *_: seen.append(1))
    batches = [(images(FAMILIES[0], 2, seed), torch.zeros(2)) for seed in (0, 1)]
    score(model, batches, settings_grid([0.1], [1, math.inf], ["logits"]))
    alone = len(seen)
    score(model, batches, settings_grid([0.1], [1, math.inf], SCORES))
    assert len(seen) == 2 * alone


@torch.no_grad()
def test_a_masked_class_is_legal_where_the_plain_logits_mask_it() -> None:
    model, x = create("test_resnet"), images(FAMILIES[0], 3)
    model.fc.bias[7] = -math.inf
    settings = settings_grid([0.3], [1, math.inf], SCORES)
    scores, _ = score(model, [(x, torch.zeros(3))], settings, columns=[6, 7])
    for setting in settings:
        found = scores.logits(setting)
        assert found[:, 0].isfinite().all()
        assert found[:, 1].isneginf().all()
        reference = timm_csra.wrap(model, *setting)(x)[:, [6, 7]]
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@torch.no_grad()
def test_a_class_that_only_the_locations_mask_is_refused(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = create("test_resnet"), images(FAMILIES[0], 2)
    broken = torch.zeros(2, 1000)
    broken[1, 3] = value
    monkeypatch.setattr(scoring, "location_attention", lambda *_: ([broken],))
    with pytest.raises(
        ValueError, match="test_resnet: found NaN or infinite logits; expected finite ones, or -inf for"
    ):
        score(model, [(x, torch.zeros(2))], [PLAIN])


@torch.no_grad()
def test_forward_is_checked_where_a_class_is_masked() -> None:
    model, x = create("test_resnet"), images(FAMILIES[0], 2)
    model.fc.bias[7] = -math.inf
    plain = model(x)
    model.forward = lambda x: plain + 1
    with pytest.raises(ValueError, match=r"forward differs from forward_head\(forward_features\(x\)\) by 1;"):
        score(model, [(x, torch.zeros(2))], [PLAIN])
    model.forward = lambda x: plain.nan_to_num(neginf=0)
    with pytest.raises(ValueError, match=r"forward differs from forward_head\(forward_features\(x\)\) by inf;"):
        score(model, [(x, torch.zeros(2))], [PLAIN])


def test_refusals() -> None:
    model = create("test_resnet")
    batch = (images(FAMILIES[0]), torch.zeros(2))
    with pytest.raises(ValueError, match="test_resnet: found no image to score"):
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
