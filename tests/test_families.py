"""Every kind of head: equal to the definition, and indistinguishable from plain timm where it must be."""

import copy
import math
import pickle
import re
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import AttentionPool2d

import timm_csra

from .families import EXACT, FAMILIES, Family, create, images, literal_logits, literal_scores, paper, spatial_features

all_families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
SETTINGS = [(0.1, (math.inf,)), (1.0, (1.0,)), (0.37, (5.0,)), (0.2, (1.0, math.inf))]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


@all_families
@torch.no_grad()
def test_lam_zero_is_the_plain_model(family: Family) -> None:
    model = create(family.name)
    x = images(family)
    logits, state = model(x), copy.deepcopy(model.state_dict())
    config = timm.data.resolve_model_data_config(model)
    plain_class, plain_dict = type(model), dict(vars(model))

    assert timm_csra.wrap(model, lam=0) is model
    assert torch.equal(model(x), logits)
    assert isinstance(model, plain_class)
    assert timm.data.resolve_model_data_config(model) == config
    wrapped_state = model.state_dict()
    assert list(wrapped_state) == list(state)
    assert all(torch.equal(wrapped_state[key], state[key]) for key in state)

    model.csra.lam = 0.5
    assert not torch.equal(model(x), logits)
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert torch.equal(pre_logits, model.forward_head(features, True))
    assert timm_csra.unwrap(model) is model
    assert torch.equal(pre_logits, model.forward_head(features, pre_logits=True))
    assert type(model) is plain_class
    assert vars(model).keys() == plain_dict.keys()
    assert torch.equal(model(x), logits)


@all_families
@torch.no_grad()
def test_a_batch_without_images(family: Family) -> None:
    """As from a detector that found nothing: what plain timm says of it, wrapped timm says."""
    plain, wrapped, x = create(family.name), timm_csra.wrap(create(family.name)), images(family)[:0]
    try:
        expected = plain(x)
    except RuntimeError as error:  # half of these families reshape in a way that needs an image
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            wrapped(x)
    else:
        assert wrapped(x).shape == expected.shape == (0, plain.num_classes)


@all_families
@torch.no_grad()
def test_equals_the_literal_constant_maps(family: Family) -> None:
    plain = create(family.name)
    wrapped = timm_csra.wrap(create(family.name))
    x = images(family)
    expected = literal_logits(plain, family, x)
    for lam, temperatures in SETTINGS:
        wrapped.csra.lam, wrapped.csra.temperature = lam, temperatures
        assert relative_error(wrapped(x), expected(lam, temperatures)) <= 1e-4
    plain, wrapped, x = plain.double(), wrapped.double(), x.double()
    features, maps = spatial_features(plain, x), timm_csra.score_maps(plain, x)
    scores = literal_scores(plain, family, features)
    assert relative_error(wrapped(x), paper(plain.forward_head(features), scores, lam, temperatures)) <= 1e-12
    assert relative_error(maps.flatten(2).transpose(1, 2), scores) <= 1e-12
    assert torch.equal(maps, timm_csra.score_maps(wrapped, x))
    for model in (plain, wrapped):
        in_one_pass, logits = timm_csra.score_maps(model, x, return_logits=True)
        assert torch.equal(in_one_pass, maps) and relative_error(logits, model(x)) <= 1e-12


@pytest.mark.parametrize("family", EXACT, ids=lambda family: family.name)
@torch.no_grad()
def test_exact_kinds_equal_the_four_lines_of_the_paper(family: Family) -> None:
    model = create(family.name).double()
    x = images(family).double()
    features = model.forward_features(x)
    if family.features == "NCHW":
        features = features.permute(0, 2, 3, 1)
    features = features.flatten(1, -2)  # (N, L, C)
    classifiers = model.get_classifier()
    weight, bias = average_affine(classifiers if isinstance(classifiers, tuple) else (classifiers,))
    for lam, temperature in ((0.1, math.inf), (0.6, 2.0)):
        scores = features @ weight.T  # the paper's classifier has no bias: it is added to base and to attention
        base = scores.mean(1) + bias
        if temperature == math.inf:
            attention = scores.max(1).values + bias
        else:
            weights = torch.softmax(temperature * (scores + bias), dim=1)
            attention = (weights * scores).sum(1) + bias
        wrapped = timm_csra.wrap(model, lam, temperature)
        assert relative_error(wrapped(x), base + lam * attention) <= 1e-12


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.features == "states"], ids=lambda family: family.name)
@torch.no_grad()
def test_locations_average_to_the_logits_where_states_go_to_the_head_too(family: Family) -> None:
    model = create(family.name).double()
    x = images(family).double()
    assert relative_error(timm_csra.score_maps(model, x).mean((2, 3)), model(x)) <= 1e-12


def average_affine(classifiers: tuple[torch.nn.Module, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(K, C)` and bias `(K,)` of the average of linear classifiers, from their raw parameters."""
    weights, biases = [], []
    for classifier in classifiers:
        if hasattr(classifier, "linear"):  # LeViT: batch norm with running statistics, then linear
            norm, linear = classifier.bn, classifier.linear
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            weights.append(linear.weight * scale)
            biases.append(linear.bias + linear.weight @ (norm.bias - norm.running_mean * scale))
        else:
            weights.append(classifier.weight.flatten(1))
            biases.append(classifier.bias)
    return torch.stack(weights).mean(0), torch.stack(biases).mean(0)


@all_families
@torch.no_grad()
def test_copies_are_wrapped_and_independent(family: Family) -> None:
    model = timm_csra.wrap(create(family.name), lam=0.3, temperature=(2, math.inf))
    x = images(family, count=1)
    logits = model(x)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert timm_csra.is_wrapped(duplicate)
        assert type(duplicate) is type(model)
        assert torch.equal(duplicate(x), logits)
        duplicate.csra.lam = 0
        next(duplicate.parameters()).zero_()
        assert torch.equal(model(x), logits)
        assert model.csra == timm_csra.CSRAConfig(0.3, (2, math.inf))


@all_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@torch.no_grad()
def test_autocast_keeps_dtype_and_precision(family: Family, dtype: torch.dtype) -> None:
    model = create(family.name)
    x = images(family)
    exact = model(x)
    with torch.autocast("cpu", dtype):
        plain = model(x)
    timm_csra.wrap(model)
    wrapped_exact = model(x)
    with torch.autocast("cpu", dtype):
        wrapped = model(x)
    assert wrapped.dtype == plain.dtype
    assert relative_error(wrapped.float(), wrapped_exact) <= 2 * relative_error(plain.float(), exact)


@all_families
@torch.no_grad()
def test_channels_last(family: Family) -> None:
    model = timm_csra.wrap(create(family.name))
    x = images(family)
    logits = model(x)
    model = model.to(memory_format=torch.channels_last)
    channels_last = model(x.contiguous(memory_format=torch.channels_last))
    assert channels_last.dtype == logits.dtype
    timm_csra.unwrap(model)
    plain_error = relative_error(model(x.contiguous(memory_format=torch.channels_last)), create(family.name)(x))
    assert relative_error(channels_last, logits) <= max(2 * plain_error, 1e-5)


@all_families
def test_gradients_flow_through_base_and_attention(family: Family) -> None:
    x = images(family, count=1)
    model = create(family.name)
    plain = torch.autograd.grad(model(x)[0, 0], [model.get_parameter(k) for k in head_names(model)])
    timm_csra.wrap(model, lam=0.5)
    wrapped = torch.autograd.grad(model(x)[0, 0], [model.get_parameter(k) for k in head_names(model)])
    for before, after in zip(plain, wrapped, strict=True):
        assert after.isfinite().all()
        assert not torch.equal(before, after)


def head_names(model: torch.nn.Module) -> list[str]:
    attention_pool = isinstance(
        getattr(model, "head", None), AttentionPool2d
    )  # get_classifier fails before timm 1.0.31
    classifiers = model.head.proj if attention_pool else model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    wanted = {id(parameter) for classifier in classifiers for parameter in classifier.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted and name.endswith("weight")]


@all_families
def test_explain(family: Family) -> None:
    model = create(family.name)
    explanation = timm_csra.explain(model, input_size=family.size)
    maps = timm_csra.score_maps(model, images(family, count=1))
    assert explanation.kind == family.kind
    assert explanation.grid == tuple(maps.shape[2:])
    assert explanation.num_classes == maps.shape[1] == model.num_classes
    assert explanation.extra_parameters == 0
    assert explanation.unsupported is None
    wrapped = timm_csra.explain(timm_csra.wrap(model), input_size=family.size)
    assert wrapped == replace(explanation, settings=model.csra)
