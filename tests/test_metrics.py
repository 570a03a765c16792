"""Metrics against scikit-learn, with the traps that torchmetrics lays."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score, top_k_accuracy_score

from timm_csra.evaluation.metrics import evaluate, weighted_average_precision

N, K = 60, 12


@pytest.fixture(params=["small", "large", "tied"])
def logits(request: pytest.FixtureRequest) -> torch.Tensor:
    """Large logits are those that a sigmoid would tie; tied ones are equal before it."""
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return {"small": values, "large": 40 + 5 * values, "tied": values.round()}[request.param]


@pytest.fixture
def labels() -> torch.Tensor:
    """Class 3 never occurs, and two images have no label."""
    labels = torch.rand(N, K, generator=torch.Generator().manual_seed(1)) < 0.2
    labels[:, 3] = False
    labels[[4, 9]] = False
    labels[[i for i in range(N) if i not in (4, 9)], torch.arange(N)[: N - 2] % 3] = True
    return labels


def test_map_equals_sklearn_over_classes_with_a_positive(logits: torch.Tensor, labels: torch.Tensor) -> None:
    occurring = labels.any(0)
    expected = average_precision_score(labels[:, occurring], logits[:, occurring], average="macro")
    rows = np.arange(N)
    evaluation = evaluate(logits, labels)["mAP"]
    assert evaluation.value(rows) == pytest.approx(100 * expected, abs=1e-4)
    some = np.array([1, 5, 5, 8, 13, 40, 41, 41, 41])
    occurring = labels[some].any(0)
    expected = average_precision_score(labels[some][:, occurring], logits[some][:, occurring], average="macro")
    assert evaluation.value(some) == pytest.approx(100 * expected, abs=1e-4)
    assert evaluation.resampled(some[None])[0] == pytest.approx(100 * expected, abs=1e-4)


def test_lrap_equals_sklearn_on_labelled_images(logits: torch.Tensor, labels: torch.Tensor) -> None:
    counted = labels.any(1)
    expected = label_ranking_average_precision_score(labels[counted], logits[counted])
    assert evaluate(logits, labels)["lrap"].value(np.arange(N)) == pytest.approx(100 * expected, abs=1e-4)


def test_recall_at_k_with_k_the_number_of_labels(labels: torch.Tensor) -> None:
    logits = 40 + torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    recalls = []
    for row in range(N):
        wanted = set(np.flatnonzero(labels[row]))
        if wanted:
            recalls.append(len(wanted & set(np.argsort(-logits[row].numpy())[: len(wanted)])) / len(wanted))
    assert evaluate(logits, labels)["recall_at_k"].value(np.arange(N)) == pytest.approx(100 * np.mean(recalls))


def test_accuracy_equals_sklearn() -> None:
    logits = 40 + torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(N) % K
    evaluations = evaluate(logits, targets)
    for name, k in (("top1", 1), ("top5", 5)):
        expected = 100 * top_k_accuracy_score(targets, logits, k=k, labels=range(K))
        assert evaluations[name].value(np.arange(N)) == pytest.approx(expected)
        some = np.array([0, 3, 3, 50])
        expected = 100 * top_k_accuracy_score(targets[some], logits[some], k=k, labels=range(K))
        assert evaluations[name].value(some) == pytest.approx(expected)
    assert list(evaluate(logits[:, :5], targets % 5)) == ["top1"]


def test_resamples_equal_the_metric_on_each_resample(labels: torch.Tensor) -> None:
    logits = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    resamples = np.random.default_rng(0).integers(0, N, size=(7, N))
    for evaluation in (*evaluate(logits, labels).values(), *evaluate(logits, torch.arange(N) % K).values()):
        expected = [evaluation.value(rows) for rows in resamples]
        np.testing.assert_allclose(evaluation.resampled(resamples), expected, atol=1e-4)


def test_undefined_where_nothing_is_positive() -> None:
    nothing = torch.zeros(4, 3, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for evaluation in evaluate(torch.randn(4, 3), nothing).values():
            assert np.isnan(evaluation.value(np.arange(4)))
            assert np.isnan(evaluation.resampled(np.zeros((2, 4), dtype=int))).all()


@given(st.data())
def test_weighted_average_precision_equals_sklearn(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 12))
    scores = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count)), dtype=float)
    targets = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)), dtype=float)
    ours = weighted_average_precision(scores, targets, weights[None])[0]
    if not weights[targets].sum():
        assert np.isnan(ours)
    else:
        repeated = np.repeat(np.arange(count), weights.astype(int))
        assert ours == pytest.approx(average_precision_score(targets[repeated], scores[repeated]))
