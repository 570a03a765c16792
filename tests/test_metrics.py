"""Metrics against scikit-learn, with the traps that torchmetrics lays."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    label_ranking_average_precision_score,
    log_loss,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)

from timm_csra.evaluation.average_precision import weighted_average_precision
from timm_csra.evaluation.metrics import (
    ANY_LABEL,
    SIGMOID,
    VOC2007,
    calibration,
    evaluate,
)
from timm_csra.evaluation.samples import Evaluation, Rows, weights_of

N, K = 60, 12


def value(evaluation: Evaluation, rows: Rows, count: int = N) -> float:
    """On some of the images, with repetitions."""
    return evaluation.weighted(weights_of([rows], count))[0]


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
    assert value(evaluation, rows) == pytest.approx(100 * expected, abs=1e-4)
    some = np.array([1, 5, 5, 8, 13, 40, 41, 41, 41])
    occurring = labels[some].any(0)
    expected = average_precision_score(labels[some][:, occurring], logits[some][:, occurring], average="macro")
    assert value(evaluation, some) == pytest.approx(100 * expected, abs=1e-4)


def test_lrap_equals_sklearn_on_labelled_images(logits: torch.Tensor, labels: torch.Tensor) -> None:
    counted = labels.any(1)
    expected = label_ranking_average_precision_score(labels[counted], logits[counted])
    assert value(evaluate(logits, labels)["lrap"], np.arange(N)) == pytest.approx(100 * expected, abs=1e-4)


def test_r_precision_is_precision_at_the_number_of_labels(labels: torch.Tensor) -> None:
    logits = 40 + torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    shares = []
    for row in range(N):
        wanted = set(np.flatnonzero(labels[row]))
        if wanted:
            shares.append(len(wanted & set(np.argsort(-logits[row].numpy())[: len(wanted)])) / len(wanted))
    assert value(evaluate(logits, labels)["r_precision"], np.arange(N)) == pytest.approx(100 * np.mean(shares))


def test_accuracy_equals_sklearn() -> None:
    logits = 40 + torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(N) % K
    evaluations = evaluate(logits, targets)
    for name, k in (("top1", 1), ("top5", 5)):
        expected = 100 * top_k_accuracy_score(targets, logits, k=k, labels=range(K))
        assert value(evaluations[name], np.arange(N)) == pytest.approx(expected)
        some = np.array([0, 3, 3, 50])
        expected = 100 * top_k_accuracy_score(targets[some], logits[some], k=k, labels=range(K))
        assert value(evaluations[name], some) == pytest.approx(expected)
    assert list(evaluate(logits[:, :5], targets % 5)) == ["top1"]


def test_resamples_equal_the_metric_on_each_resample(labels: torch.Tensor) -> None:
    logits = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    resamples = np.random.default_rng(0).integers(0, N, size=(7, N))
    for evaluation in (*evaluate(logits, labels).values(), *evaluate(logits, torch.arange(N) % K).values()):
        expected = [value(evaluation, rows) for rows in resamples]
        np.testing.assert_allclose(evaluation.weighted(weights_of(resamples, N)), expected, atol=1e-4)


def test_undefined_where_nothing_is_positive() -> None:
    nothing = torch.zeros(4, 3, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for evaluation in evaluate(torch.randn(4, 3), nothing).values():
            assert np.isnan(value(evaluation, np.arange(4), 4))
            assert np.isnan(evaluation.weighted(weights_of([[0] * 4, [1]], 4))).all()


@given(st.data())
def test_weighted_average_precision_equals_sklearn(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 12))
    scores = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count)), dtype=float)
    targets = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)), dtype=float)
    ours = weighted_average_precision(scores, targets, weights[:, None])[0]
    if not weights[targets].sum():
        assert np.isnan(ours)
    else:
        repeated = np.repeat(np.arange(count), weights.astype(int))
        assert ours == pytest.approx(average_precision_score(targets[repeated], scores[repeated]))
        eleven = weighted_average_precision(scores, targets, weights[:, None], points=11)[0]
        assert eleven == pytest.approx(eleven_point_average_precision(targets[repeated], scores[repeated]))


def eleven_point_average_precision(targets: np.ndarray, scores: np.ndarray) -> float:
    """By the words of the VOC 2007 development kit: thresholds one by one, then the maximum at each recall."""
    curve = []
    for threshold in np.unique(scores):
        chosen = scores >= threshold
        curve.append((targets[chosen].sum() * 10 / targets.sum(), targets[chosen].mean()))
    return float(np.mean([max(precision for recall, precision in curve if recall >= step) for step in range(11)]))


def test_f1_equals_sklearn(logits: torch.Tensor, labels: torch.Tensor) -> None:
    top = np.zeros((N, K), dtype=bool)
    for row, values in enumerate(logits):
        top[row, values.topk(3).indices] = True
    above = (logits > 0).numpy()
    occurring = labels.any(0).numpy()
    for name, predicted in (("F1_top3", top), ("F1", above)):
        evaluations = evaluate(logits, labels) | evaluate(logits, labels, SIGMOID)
        truth = labels.numpy()[:, occurring]
        precision, recall = (
            score(truth, predicted[:, occurring], average="macro", zero_division=0)
            for score in (precision_score, recall_score)
        )
        expected = 200 * precision * recall / (precision + recall)
        assert value(evaluations[f"C{name}"], np.arange(N)) == pytest.approx(expected)
        overall = 100 * f1_score(labels.numpy(), predicted, average="micro")
        assert value(evaluations[f"O{name}"], np.arange(N)) == pytest.approx(overall)
    assert "CF1_top3" not in evaluate(logits[:, :3], labels[:, :3])


def test_what_is_not_judged_is_left_out(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """VOC 2007: difficult objects count neither for nor against, class by class."""
    hidden = torch.rand(N, K, generator=torch.Generator().manual_seed(5)) < 0.2
    targets = labels.to(torch.int8)
    targets[hidden] = -1
    rows = np.arange(N)
    judged = ~hidden.numpy()
    expected, eleven = [], []
    for k in range(K):
        truth, scores = labels[judged[:, k], k].numpy(), logits[judged[:, k], k].numpy()
        if truth.any():
            expected.append(100 * average_precision_score(truth, scores))
            eleven.append(100 * eleven_point_average_precision(truth, scores))
    assert value(evaluate(logits, targets)["mAP"], rows) == pytest.approx(np.mean(expected))
    assert value(evaluate(logits, targets, VOC2007)["mAP"], rows) == pytest.approx(np.mean(eleven))
    lrap = [
        label_ranking_average_precision_score(labels[i : i + 1, judged[i]], logits[i : i + 1, judged[i]])
        for i in range(N)
        if (labels[i].numpy() & judged[i]).any()
    ]
    assert value(evaluate(logits, targets)["lrap"], rows) == pytest.approx(100 * np.mean(lrap), abs=1e-4)
    top = np.zeros((N, K), dtype=bool)
    top[np.arange(N)[:, None], logits.topk(3, dim=1).indices.numpy()] = True
    micro = 100 * f1_score(labels.numpy()[judged], top[judged])
    assert value(evaluate(logits, targets)["OF1_top3"], rows) == pytest.approx(micro)


def test_any_of_several_right_names(labels: torch.Tensor) -> None:
    logits = torch.randn(N, K, generator=torch.Generator().manual_seed(6))
    evaluations = evaluate(logits, labels, ANY_LABEL)
    hits = [bool(labels[i, logits[i].argmax()]) for i in range(N) if labels[i].any()]
    assert value(evaluations["top1"], np.arange(N)) == pytest.approx(100 * np.mean(hits))
    several = labels.sum(1) >= 2
    assert 0 < several.sum() < N
    expected = label_ranking_average_precision_score(labels[several], logits[several])
    assert value(evaluations["lrap"], np.arange(N)) == pytest.approx(100 * expected, abs=1e-4)


def test_n_is_the_number_of_images_that_count(labels: torch.Tensor) -> None:
    logits = torch.randn(N, K, generator=torch.Generator().manual_seed(8))
    some, several = int((labels.sum(1) >= 1).sum()), int((labels.sum(1) >= 2).sum())
    assert 0 < several < some < N
    both = evaluate(logits, labels) | evaluate(logits, labels, SIGMOID)
    # Images without a label are negatives of every class, and whatever is predicted in them is wrong.
    everything = dict.fromkeys(("mAP", "CF1_top3", "OF1_top3", "CF1", "OF1"), N)
    assert {name: one.n for name, one in both.items()} == everything | {"lrap": some, "r_precision": some}
    found = {name: one.n for name, one in evaluate(logits, labels, ANY_LABEL).items()}
    assert found == {"top1": some, "lrap": several, "r_precision": several}
    assert {one.n for one in evaluate(logits, torch.arange(N) % K).values()} == {N}


def test_calibration() -> None:
    logits = 3 * torch.randn(N, K, generator=torch.Generator().manual_seed(7))
    targets = torch.arange(N) % K
    probabilities = logits.double().softmax(1).numpy()
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == targets.numpy()
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    found = calibration(logits, targets)
    assert found["ece"] == pytest.approx(100 * error, abs=1e-3)
    assert found["nll"] == pytest.approx(log_loss(targets, probabilities, labels=range(K)), rel=1e-5)
