"""Settings: what is stored, and the text of what is refused."""

import math

import numpy as np
import pytest
import torch

import timm_csra
from timm_csra import CSRAConfig
from timm_csra.config import SCORES


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (math.inf, (math.inf,)),
        (1, (1.0,)),
        (np.float32(2), (2.0,)),
        ((1, math.inf), (1.0, math.inf)),
        ([0.5, 5], (0.5, 5.0)),
    ],
)
def test_temperature_is_stored_as_a_tuple_of_floats(given: object, stored: tuple[float, ...]) -> None:
    config = CSRAConfig(0.1, given)  # type: ignore[arg-type]
    assert config.temperature == stored
    assert all(type(value) is float for value in stored)


@pytest.mark.parametrize(
    ("lam", "error", "text"),
    [
        (math.nan, ValueError, "lam must be finite and at least 0, got nan"),
        (math.inf, ValueError, "lam must be finite and at least 0, got inf"),
        (-0.1, ValueError, "lam must be finite and at least 0, got -0.1"),
        (10**400, ValueError, "lam must fit into a float, found a number above 1.8e308"),
        (True, TypeError, r"lam must be a real number, got True \(bool\)"),
        ("0.1", TypeError, r"lam must be a real number, got '0.1' \(str\)"),
        (None, TypeError, r"lam must be a real number, got None \(NoneType\)"),
        (0.1j, TypeError, r"got 0.1j \(complex\)"),
        (torch.tensor(0.1), TypeError, r"\(Tensor\)"),
        ((0.1,), TypeError, r"\(tuple\)"),
    ],
)
def test_bad_lam(lam: object, error: type[Exception], text: str) -> None:
    check_refused("lam", lam, error, text)


@pytest.mark.parametrize(
    ("temperature", "error", "text"),
    [
        (0, ValueError, "temperature must be positive, got 0"),
        (-1.0, ValueError, "temperature must be positive, got -1.0"),
        (math.nan, ValueError, "temperature must be positive, got nan"),
        ((), ValueError, r"temperature must hold at least one value, got \(\)"),
        ((1, -2), ValueError, "temperature must be positive, got -2"),
        (10**400, ValueError, "temperature must fit into a float, found a number above 1.8e308"),
        (False, TypeError, r"got False \(bool\)"),
        ((1, True), TypeError, r"got True \(bool\)"),
        ("inf", TypeError, r"got 'inf' \(str\)"),
        (None, TypeError, r"got None \(NoneType\)"),
        (((1,),), TypeError, r"got \(1,\) \(tuple\)"),
    ],
)
def test_bad_temperature(temperature: object, error: type[Exception], text: str) -> None:
    check_refused("temperature", temperature, error, text)


@pytest.mark.parametrize(
    ("scores", "error", "text"),
    [
        ("softmax", ValueError, "scores must be 'logits' or 'log_softmax', got 'softmax'"),
        ("", ValueError, "scores must be 'logits' or 'log_softmax', got ''"),
        (None, TypeError, r"scores must be 'logits' or 'log_softmax', got None \(NoneType\)"),
        (("logits",), TypeError, r"got \('logits',\) \(tuple\)"),
    ],
)
def test_bad_scores(scores: object, error: type[Exception], text: str) -> None:
    check_refused("scores", scores, error, text)


def check_refused(name: str, value: object, error: type[Exception], text: str) -> None:
    """As an argument of `wrap`, and as an assignment to a wrapped model, which then keeps what it had."""
    import timm

    model = timm.create_model("test_resnet")
    with pytest.raises(error, match=text):
        timm_csra.wrap(model, **{name: value})
    assert not timm_csra.is_wrapped(model)
    timm_csra.wrap(model, 0.2, 3)
    with pytest.raises(error, match=text):
        setattr(model.csra, name, value)
    with pytest.raises(error, match=text):
        timm_csra.wrap(model, **{name: value})
    assert model.csra == CSRAConfig(0.2, 3)


@pytest.mark.parametrize("scores", SCORES)
def test_scores_are_an_argument_an_assignment_and_stored(scores: str) -> None:
    import timm

    model = timm_csra.wrap(timm.create_model("test_resnet"), 0.3, scores=scores)
    assert model.csra == CSRAConfig(0.3, math.inf, scores)
    model.csra.scores = "logits"
    assert model.csra == CSRAConfig(0.3)
    config = CSRAConfig(0.3, (1, math.inf), scores)
    assert config.to_dict() == {"version": 2, "lam": 0.3, "temperature": [1.0, "inf"], "scores": scores}
    assert CSRAConfig.from_dict(config.to_dict()) == config


def test_what_version_1_stored_is_read_as_logits() -> None:
    assert CSRAConfig.from_dict({"version": 1, "lam": 0.3, "temperature": ["inf"]}) == CSRAConfig(0.3, scores="logits")


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(AttributeError, match="CSRAConfig has no setting 'lamb'; it has lam, temperature, scores"):
        CSRAConfig().lamb = 0.3  # type: ignore[attr-defined]
