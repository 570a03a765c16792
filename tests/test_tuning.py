"""`tune` against the same protocol written out, and against data in which the truth is known."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy import stats
from torch import Tensor

import timm_csra
from timm_csra.config import SCORES
from timm_csra.evaluation.scoring import DEFAULT, PLAIN, Scores, Setting, settings_grid
from timm_csra.evaluation.statistics import folds_of
from timm_csra.evaluation.tuning import choose

SETTINGS = settings_grid([0.1, 0.5, 1.0], [1.0, math.inf])
BOTH = settings_grid([0.1, 0.5, 1.0], [1.0, math.inf], SCORES)


def synthetic(
    seed: int, count: int = 200, signal: float = 0.0, classes: int = 5, scores: tuple[str, ...] = ("logits",)
) -> tuple[Scores, Tensor]:
    """Scores whose attention terms know nothing of the class; those of the last kind `signal` of it."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    right = torch.nn.functional.one_hot(targets, classes).float()

    def noise() -> Tensor:
        return torch.randn(count, classes, generator=generator)

    attention = {
        (kind, temperature): (signal if kind == scores[-1] else 0.0) * right + noise()
        for kind in scores
        for temperature in (1.0, math.inf)
    }
    return Scores(0.7 * right + noise(), attention), targets


def literal(
    scores: Scores, targets: Tensor, settings: list[Setting], folds: int, seed: int
) -> tuple[list[Setting], float]:
    """Nested choice by one standard error, one image and one fold at a time."""
    parts = folds_of(targets.numpy(), seed, folds)
    hits = {
        s: [100 * (scores.logits(s)[rows].argmax(1) == targets[rows]).double().mean().item() for rows in parts]
        for s in settings
    }
    chosen, gains = [], []
    for held_out in range(folds):
        others = [fold for fold in range(folds) if fold != held_out]
        table = {}
        for setting in settings:
            gain = [hits[setting][fold] - hits[PLAIN][fold] for fold in others]
            table[setting] = (np.mean(gain), np.std(gain, ddof=1) / math.sqrt(len(gain)))
        best, error = max(table.values())
        kind = next(setting.scores for setting in settings if table[setting] == (best, error))
        near = [s for s in settings if table[s][0] >= best - error and (s.scores == kind or s.lam == 0)]
        lam = min(setting.lam for setting in near)
        setting = max((s for s in near if s.lam == lam), key=lambda s: table[s][0])
        chosen.append(setting)
        gains.append(hits[setting][held_out] - hits[PLAIN][held_out])
    return chosen, float(np.mean(gains))


@pytest.mark.parametrize("signal", [0.0, 1.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "kinds", [SCORES[:1], SCORES, SCORES[::-1]], ids=["one kind", "log_softmax helps", "logits help"]
)
def test_nested_choice_by_hand(signal: float, seed: int, kinds: tuple[str, ...]) -> None:
    scores, targets = synthetic(seed, signal=signal, scores=kinds)
    settings = BOTH if len(kinds) == 2 else SETTINGS
    result = choose(scores, targets, settings, folds=4, seed=seed)
    chosen, gain = literal(scores, targets, settings, 4, seed)
    assert list(result.nested.settings) == chosen
    assert result.nested.gain == pytest.approx(gain)


def test_no_signal_is_recommended_about_as_rarely_as_the_interval_says() -> None:
    helped = sum(choose(*synthetic(seed), SETTINGS, seed=seed).helps for seed in range(60))
    assert stats.binomtest(helped, 60, 0.025, alternative="greater").pvalue > 0.001


def test_a_signal_is_found_and_applied() -> None:
    result = choose(*synthetic(0, 500, signal=2.0), SETTINGS)
    assert result.helps
    assert result.lam > 0
    assert f"CSRA helps here: use lam={result.lam:g}" in str(result)
    model = timm.create_model("test_resnet").eval()
    assert result.apply(model) is model
    assert (model.csra.lam, model.csra.temperature) == (result.lam, result.temperature)


@pytest.mark.parametrize("kinds", [SCORES, SCORES[::-1]], ids=["log_softmax", "logits"])
def test_the_kind_of_scores_that_helps_is_found_told_and_applied(kinds: tuple[str, ...]) -> None:
    result = choose(*synthetic(0, 500, signal=2.0, scores=kinds), BOTH)
    assert result.helps
    assert result.scores == kinds[-1]
    assert f"use lam={result.lam:g}, temperature={result.temperature}, scores='{kinds[-1]}'." in str(result)
    assert f"settings of the folds  {kinds[-1]} " in str(result)
    model = result.apply(timm.create_model("test_resnet").eval())
    assert model.csra == timm_csra.CSRAConfig(result.lam, result.temperature, kinds[-1])


def test_no_evidence_says_so_and_recommends_the_plain_model() -> None:
    result = choose(*synthetic(3), SETTINGS)
    assert result.recommended == PLAIN
    assert str(result).startswith("No evidence that CSRA helps here: use lam=0, the plain model.")
    model = result.apply(timm.create_model("test_resnet").eval())
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(model(x), timm_csra.unwrap(model)(x))


def test_harm_says_so() -> None:
    scores, targets = synthetic(0, 500, signal=-3.0)
    result = choose(scores, targets, [PLAIN, DEFAULT, Setting(1.0, (1.0,))])
    assert result.chosen == PLAIN
    assert result.recommended == PLAIN


def loader(model: torch.nn.Module, several: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    classes = model.num_classes
    labels = torch.randint(classes, (8,), generator=generator)
    targets = torch.nn.functional.one_hot(labels, classes) if several else labels
    return [(torch.randn(8, 3, 64, 64, generator=generator), targets) for _ in range(3)]


def test_what_it_says_of_n_is_what_counts_for_the_metric() -> None:
    labels = torch.eye(4, dtype=torch.int8)[LABELS]
    labels[::4] = 0  # images without a label
    images = torch.randn(12, 3, 64, 64)
    result = timm_csra.tune(
        timm.create_model("test_resnet", num_classes=4).eval(), [(images, labels)], metric="lrap", folds=3
    )
    assert (result.images, result.nested.n) == (12, 9)
    assert "(n = 9, 3 folds)" in str(result)


@pytest.mark.parametrize("metric", [None, "top1", "mAP", "lrap"])
def test_from_images_to_a_result_without_touching_the_model(metric: str | None) -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    several = metric in ("mAP", "lrap")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = {"lams": [0.05, 0.3], "temperatures": [1], "folds": 3}
    result = timm_csra.tune(model, loader(model, several), metric=metric, **asked)
    assert isinstance(result, timm_csra.TuneResult)
    assert (result.metric, result.images) == (metric or "top1", 24)
    assert not timm_csra.is_wrapped(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert set(result.settings) == {Setting(lam, (1.0,), scores) for lam in (0.05, 0.3) for scores in SCORES}
    if metric is None:
        alone = timm_csra.tune(model, loader(model), scores=["log_softmax"], **asked)
        assert {setting.scores for setting in alone.settings} == {"log_softmax"}
        with pytest.raises(ValueError, match="scores must be 'logits' or 'log_softmax', got 'sum'"):
            timm_csra.tune(model, loader(model), scores=["sum"])


def test_a_metric_of_ones_own() -> None:
    scores, targets = synthetic(0, 120, signal=1.0)

    def share_right(logits: Tensor, labels: Tensor) -> Tensor:
        return 100 * (logits.argmax(1) == labels).double().mean()

    own, top1 = (choose(scores, targets, SETTINGS, metric=metric) for metric in (share_right, "top1"))
    assert own.metric == "share_right"
    assert own.nested.settings == top1.nested.settings
    assert own.nested.gain == pytest.approx(top1.nested.gain)
    assert own.nested.interval == pytest.approx(top1.nested.interval)


def test_what_does_not_fit_is_refused() -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    with pytest.raises(
        ValueError, match=r"test_resnet: found a model in training mode, expected eval: call model.eval\(\)"
    ):
        timm_csra.tune(model, loader(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval().layer3.train()
    with pytest.raises(ValueError, match="test_resnet: found `layer3` in training mode, expected eval"):
        timm_csra.tune(model, loader(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    with pytest.raises(ValueError, match="metric: found 'mAP' for targets that are class indices"):
        timm_csra.tune(model, loader(model), metric="mAP")
    with pytest.raises(ValueError, match="metric: found 'top1' for targets that are several labels"):
        timm_csra.tune(model, loader(model, several=True), metric="top1")
    with pytest.raises(ValueError, match="found 24 images for 20 folds; expected at least 3 folds of 2 images"):
        timm_csra.tune(model, loader(model), folds=20)
    with pytest.raises(ValueError, match="lam must be finite"):
        timm_csra.tune(model, loader(model), lams=[math.nan])
    with pytest.raises(ValueError, match="found no setting to try but the plain model; expected a lam above 0"):
        timm_csra.tune(model, loader(model), lams=[0])
    with pytest.raises(ValueError, match="metric: found top5, which does not apply to these targets with 4 classes"):
        timm_csra.tune(model, loader(model), metric="top5")


def test_a_classifier_that_num_classes_does_not_know() -> None:
    model = timm.create_model("test_resnet")
    model.fc = torch.nn.Linear(model.num_features, 20)
    model.eval()
    images, labels = torch.randn(40, 3, 64, 64), torch.arange(40) % 20
    told = copy.deepcopy(model)
    told.num_classes = 20
    for targets in (labels, torch.nn.functional.one_hot(labels, 20)):
        expected = timm_csra.tune(told, [(images, targets)], folds=3)
        assert timm_csra.tune(model, [(images, targets)], folds=3) == expected
    with pytest.raises(ValueError, match=r"found targets \(40,\) .*indices \(N,\) from 0 to 19, or \(N, 20\) with 1"):
        timm_csra.tune(model, [(images, labels + 1)], folds=3)


class Caching(torch.utils.data.Dataset):
    """Makes each image once, and keeps it."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index))
        return self.kept.setdefault(index, (image, torch.tensor(index % 4)))


def test_what_a_data_set_keeps_can_be_trained_on_afterwards() -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    dataset = Caching()
    timm_csra.tune(model, torch.utils.data.DataLoader(dataset, batch_size=4), folds=3)
    images, targets = (torch.stack(parts) for parts in zip(*dataset.kept.values(), strict=True))
    assert not any(part.is_inference() for pair in dataset.kept.values() for part in pair)
    images = dataset.kept[0][0][None]
    torch.nn.functional.cross_entropy(model(images), targets[:1]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_loader_that_needs_gradients() -> None:
    """Adversarial images, made as they are asked for."""
    model = timm.create_model("test_resnet", num_classes=4).eval()

    def adversarial() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(3):
            images = torch.randn(4, 3, 64, 64, requires_grad=True)
            (gradient,) = torch.autograd.grad(model(images).sum(), images)
            yield images.detach() + 0.1 * gradient.sign(), torch.arange(4)

    assert timm_csra.tune(model, adversarial(), folds=3).images == 12


def test_a_metric_of_ones_own_may_take_gradients() -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()

    def steepness(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.requires_grad_()
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), logits)[0].norm()

    batch = (torch.randn(12, 3, 64, 64), torch.arange(12) % 4)
    assert timm_csra.tune(model, [batch], metric=steepness, folds=3).nested.baseline > 0


@pytest.mark.cuda
def test_batches_on_the_gpu(cuda: torch.device) -> None:
    """As timm's prefetching loader gives them."""
    model = timm.create_model("test_resnet", num_classes=4).eval()
    batches = loader(model)
    expected = timm_csra.tune(model, batches, folds=3)
    found = timm_csra.tune(model.to(cuda), [(x.to(cuda), y.to(cuda)) for x, y in batches], folds=3)
    assert found.images == expected.images
    assert found.nested.baseline == pytest.approx(expected.nested.baseline, abs=5)


LABELS = torch.arange(12) % 4
ONE_HOT = torch.nn.functional.one_hot(LABELS, 4)


@pytest.mark.parametrize("targets", [LABELS, LABELS.int(), LABELS.float()], ids=lambda t: str(t.dtype))
def test_class_indices_of_any_type(targets: Tensor) -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    images = torch.randn(12, 3, 64, 64)
    expected = timm_csra.tune(model, [(images, LABELS)], folds=3)
    assert timm_csra.tune(model, [(images, targets)], folds=3) == expected


@pytest.mark.parametrize("targets", [ONE_HOT, ONE_HOT.float(), ONE_HOT.bool()], ids=lambda t: str(t.dtype))
def test_several_labels_of_any_type(targets: Tensor) -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    images = torch.randn(12, 3, 64, 64)
    assert timm_csra.tune(model, [(images, targets)], folds=3).metric == "mAP"


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (LABELS + 1, r"targets \(12,\) for 12 images, with values 1, 2, 3, 4"),
        (LABELS - 1, r"targets \(12,\) for 12 images, with values -1, 0, 1, 2"),
        (LABELS + 0.5, r"targets \(12,\) for 12 images, with values 0.5"),
        (torch.rand(12, 4), r"targets \(12, 4\) for 12 images, with values 0\.\d+"),
        (ONE_HOT[:, :3], r"targets \(12, 3\) for 12 images"),
        (LABELS[:, None], r"targets \(12, 1\) for 12 images"),
        (LABELS[:6], r"targets \(6,\) for 12 images"),
    ],
    ids=["one too high", "negative", "no whole numbers", "soft", "fewer classes", "a column", "fewer than images"],
)
def test_targets_that_do_not_fit_the_model(targets: Tensor, found: str) -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    batches = iter([(torch.randn(12, 3, 64, 64), targets), pytest.fail])
    with pytest.raises(
        ValueError, match=rf"test_resnet: found {found}.*indices \(N,\) from 0 to 3, or \(N, 4\) with 1"
    ):
        timm_csra.tune(model, batches)  # type: ignore[arg-type]
    assert next(batches) is pytest.fail  # nothing more was asked for


def test_a_loader_that_gives_something_else() -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    images = torch.randn(12, 3, 64, 64)
    for batch, found in [
        ((images, LABELS.tolist()), "Tensor, list"),
        ((images, LABELS, 1), "Tensor, Tensor, int"),
        ({"image": images, "label": LABELS}, "dict"),
    ]:
        with pytest.raises(TypeError, match=rf"test_resnet: the loader gave {found}; expected two tensors: .images, "):
            timm_csra.tune(model, [batch])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"found targets \(12, 4\) for 12 images.*, and the same form in all batches"):
        timm_csra.tune(model, [(images, LABELS), (images, ONE_HOT)])


def test_a_single_value_is_tried_alone() -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    batches = loader(model)
    single = timm_csra.tune(model, batches, lams=0.3, temperatures=math.inf, scores="log_softmax", folds=3)
    several = timm_csra.tune(model, batches, lams=[0.3], temperatures=[math.inf], scores=["log_softmax"], folds=3)
    assert single == several
    assert single.settings.keys() == {Setting(0.3, (math.inf,), "log_softmax")}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            {"metric": 5},
            r"metric must be the name of a metric, such as 'top1', or a function of logits and targets, got 5 \(int",
        ),
        ({"folds": "3"}, r"folds must be a whole number, at least 3, got '3' \(str\)"),
        ({"folds": 3.5}, r"folds must be a whole number, at least 3, got 3.5 \(float\)"),
        ({"folds": True}, r"folds must be a whole number, at least 3, got True \(bool\)"),
        ({"lams": "0.1"}, r"lam must be a real number, got '0.1' \(str\)"),
        ({"temperatures": "1"}, "temperature must be a positive number, .* got '1'"),
        ({"scores": 1}, r"scores must be 'logits' or 'log_softmax', got 1 \(int\)"),
    ],
    ids=str,
)
def test_settings_of_a_wrong_type(wrong: dict[str, Any], text: str) -> None:
    """Before an image is asked for."""
    model = timm.create_model("test_resnet", num_classes=4).eval()
    batches = iter([pytest.fail])
    with pytest.raises(TypeError, match=text):
        timm_csra.tune(model, batches, **wrong)  # type: ignore[arg-type]
    assert next(batches) is pytest.fail
    scores, targets = synthetic(0)
    if wrong.keys() & {"metric", "folds"}:
        with pytest.raises(TypeError, match=text):
            choose(scores, targets, SETTINGS, **wrong)


def test_whole_numbers_of_numpy_are_folds() -> None:
    scores, targets = synthetic(0)
    assert choose(scores, targets, SETTINGS, folds=np.int64(4)) == choose(scores, targets, SETTINGS, folds=4)


@pytest.mark.parametrize("largest", [0.1, 1.0])
def test_a_larger_lam_may_do_better_where_all_folds_choose_the_largest(largest: float) -> None:
    settings = settings_grid([largest, 0.02], [1.0])
    result = choose(*synthetic(0, 500, signal=2.0), settings)
    assert all(setting.lam == largest for setting in result.nested.settings)
    assert f"all folds choose lam {largest:g}, the largest tried: a larger lam may gain more" in str(result)
    wider = choose(*synthetic(0, 500, signal=2.0), settings_grid([0.02, 1.0, 1000.0], [1.0]))
    assert any(setting.lam < 1000 for setting in wider.nested.settings)
    assert "the largest tried" not in str(wider)


def test_images_that_no_transform_has_prepared() -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    for images, found in (
        (torch.zeros(12, 3, 64, 64, dtype=torch.uint8), r"\(12, 3, 64, 64\) of torch.uint8"),
        (torch.zeros(12, 3, 64, 64, dtype=torch.int64), r"\(12, 3, 64, 64\) of torch.int64"),
        (torch.zeros(12, 64, 64), r"\(12, 64, 64\) of torch.float32"),
        (torch.zeros(()), r"\(\) of torch.float32"),
    ):
        with pytest.raises(TypeError, match=rf"test_resnet: found images {found}; expected floats \(N, C, H, W\), as "):
            timm_csra.tune(model, [(images, LABELS)])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [torch.float64, torch.float32, torch.bfloat16])
def test_images_are_cast_to_the_weights(weights: torch.dtype, images: torch.dtype) -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval().to(weights)
    x = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(images)
    expected = timm_csra.tune(model, [(x.to(weights), LABELS)], folds=3)
    assert timm_csra.tune(model, [(x, LABELS)], folds=3) == expected


def test_empty_batches_are_passed_over() -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    images = torch.randn(12, 3, 64, 64)
    empty = (images[:0], LABELS[:0])
    expected = timm_csra.tune(model, [(images, LABELS)], folds=3)
    assert timm_csra.tune(model, [empty, (images, LABELS), empty], folds=3) == expected
    for batches in ([], [empty, empty]):
        with pytest.raises(
            ValueError, match="test_resnet: found no image to score, expected at least one. A generator can"
        ):
            timm_csra.tune(model, batches)
    for wrong, found in (
        ((images[:0], LABELS), r"\(12,\) for 0 images"),
        ((images[:1], LABELS[0]), r"\(\) for 1 images"),
    ):
        with pytest.raises(ValueError, match=f"test_resnet: found targets {found}"):
            timm_csra.tune(model, [(images, LABELS), wrong])


def test_a_metric_of_ones_own_takes_any_targets() -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    soft = torch.rand(12, 4)

    def agreement(logits: Tensor, targets: Tensor) -> Tensor:
        return -(logits.softmax(dim=1) - targets).abs().mean()

    result = timm_csra.tune(model, [(torch.randn(12, 3, 64, 64), soft)], metric=agreement, folds=3)
    assert result.metric == "agreement"
    assert result.nested.baseline < 0
