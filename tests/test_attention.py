"""The formula on tensors: against numpy in float64, and its mathematical properties."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from timm_csra.attention import Attention, add_attention, class_attention

shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4))
scores = shapes.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=st.floats(-30, 30, width=32)))
temperatures = st.one_of(st.just(math.inf), st.floats(0.01, 1e3))
heads = st.lists(temperatures, min_size=1, max_size=3).map(tuple)
lams = st.floats(0, 5)


def wrapped(base: torch.Tensor, scores: torch.Tensor, lam: float, heads: tuple[float, ...]) -> torch.Tensor:
    """What a wrapped model does with its logits and location scores."""
    return add_attention(base, Attention.of(scores, heads).terms(heads), lam)


def by_definition(values: np.ndarray, temperature: float) -> np.ndarray:
    """sum_j softmax_j(T s_j) s_j, one image and class at a time."""
    result = np.empty((values.shape[0], values.shape[2]))
    for image in range(values.shape[0]):
        for k in range(values.shape[2]):
            s = values[image, :, k]
            if temperature == math.inf:
                result[image, k] = max(s)
            else:
                weights = np.exp(temperature * (s - max(s)))
                result[image, k] = (weights / weights.sum()) @ s
    return result


@given(scores, temperatures)
def test_equals_the_definition(values: np.ndarray, temperature: float) -> None:
    attention = class_attention(torch.from_numpy(values), temperature).numpy()
    np.testing.assert_allclose(attention, by_definition(values, temperature), rtol=1e-9, atol=1e-9)


@given(scores, st.lists(temperatures, min_size=1, max_size=3), st.data())
def test_parts_of_the_locations_make_the_whole(values: np.ndarray, heads: list[float], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, values.shape[1]))))
    edges = [0, *cuts, values.shape[1]]
    tensor = torch.from_numpy(values)
    valid = torch.from_numpy(data.draw(hnp.arrays(np.bool_, values.shape[:2])))
    valid[:, data.draw(st.integers(0, values.shape[1] - 1))] = True  # at least one
    spans = [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]
    parts = [Attention.of(tensor[:, span], heads, valid[:, span]) for span in spans]
    order = data.draw(st.permutations(range(len(parts))))
    whole = functools.reduce(lambda a, b: a.merge(b, heads), [parts[index] for index in order])
    for head, term in zip(heads, whole.terms(heads), strict=True):
        for image in range(len(values)):
            expected = by_definition(values[image : image + 1, valid[image].numpy()], head)
            np.testing.assert_allclose(term[image : image + 1].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperature", [1e-30, 1.0, 99.0, 1e30, 1e308, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_parts_never_overflow(dtype: torch.dtype, temperature: float) -> None:
    tensor = torch.tensor([[[-60000.0], [60000.0], [59000.0], [-60000.0]]], dtype=dtype)
    valid = torch.tensor([[True, True, True, False]])
    parts = [Attention.of(tensor[:, j : j + 1], (temperature,), valid[:, j : j + 1]) for j in range(4)]
    whole = functools.reduce(lambda a, b: a.merge(b, (temperature,)), parts)
    (term,) = whole.terms((temperature,))
    expected = by_definition(tensor[:, :3].double().numpy(), min(temperature, 1e300))
    np.testing.assert_allclose(term.double().numpy(), expected, rtol=0.01, atol=1)


@given(scores, temperatures)
def test_lies_between_mean_and_maximum(values: np.ndarray, temperature: float) -> None:
    attention = class_attention(torch.from_numpy(values), temperature).numpy()
    assert (attention <= values.max(1) + 1e-9).all()
    assert (attention >= values.mean(1) - 1e-9).all()


@given(scores, heads, lams, st.randoms())
def test_order_of_locations_is_irrelevant(values: np.ndarray, heads: tuple, lam: float, random: object) -> None:
    order = list(range(values.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    tensor = torch.from_numpy(values)
    expected = wrapped(tensor.mean(1), tensor, lam, heads)
    assert torch.allclose(wrapped(tensor.mean(1), tensor[:, order], lam, heads), expected, atol=1e-9)


@given(scores, heads, lams, lams, st.floats(0, 1))
def test_logits_are_affine_in_lam(values: np.ndarray, heads: tuple, a: float, b: float, share: float) -> None:
    tensor = torch.from_numpy(values)
    base = tensor.mean(1)
    mixed = wrapped(base, tensor, share * a + (1 - share) * b, heads)
    parts = share * wrapped(base, tensor, a, heads) + (1 - share) * wrapped(base, tensor, b, heads)
    assert torch.allclose(mixed, parts, atol=1e-6)
    assert torch.equal(wrapped(base, tensor, 0.0, heads), base)


@given(hnp.arrays(np.float64, (2, 1, 3), elements=st.floats(-30, 30)), st.integers(1, 9), heads, lams)
def test_constant_map_gives_base_plus_lam_times_base(one: np.ndarray, count: int, heads: tuple, lam: float) -> None:
    constant = torch.from_numpy(one).expand(-1, count, -1)
    base = constant[:, 0]
    assert torch.allclose(wrapped(base, constant, lam, heads), (1 + lam) * base, atol=1e-6)


@given(scores, st.lists(temperatures, min_size=1, max_size=3))
def test_heads_are_averaged(values: np.ndarray, heads: list[float]) -> None:
    tensor = torch.from_numpy(values)
    zero = torch.zeros_like(tensor[:, 0])
    one_by_one = sum(wrapped(zero, tensor, 1.0, (head,)) for head in heads) / len(heads)
    assert torch.allclose(wrapped(zero, tensor, 1.0, tuple(heads)), one_by_one, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1e-30, 1.0, 99.0, 1e30, 1e308, math.inf])
def test_no_temperature_overflows(dtype: torch.dtype, temperature: float) -> None:
    tensor = torch.tensor([[[100.0, -100.0], [100.0, 50.0], [-100.0, 0.0]]], dtype=dtype)
    attention = class_attention(tensor, temperature)
    assert attention.dtype == dtype
    expected = by_definition(tensor.double().numpy(), min(temperature, 1e300))
    np.testing.assert_allclose(attention.double().numpy(), expected, rtol=0.01)


def test_temperature_tends_to_the_maximum() -> None:
    tensor = torch.randn(2, 50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(class_attention(tensor, 1e4), class_attention(tensor, math.inf), atol=1e-3)
    assert torch.allclose(class_attention(tensor, 1e-9), tensor.mean(1), atol=1e-6)
