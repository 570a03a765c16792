"""What is found out about a head: where the shortcut holds, who sees what of it, and what is refused."""

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.byobnet import ByobNet
from timm.models.resnet import ResNet
from torch import Tensor, nn

import timm_csra
from timm_csra import UnsupportedModelError, heads
from timm_csra.locations import location_attention, location_scores

from .families import FAMILIES, create, images
from .test_locations import last_layer, model_of

x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(3))
MAXIMUM = [("logits", math.inf)]


class Changed(ResNet):
    """A head that does something beside `pre_logits` and classifier."""

    @staticmethod
    def change(self: Any, logits: Tensor, features: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits = super().forward_head(x, pre_logits)
        return logits if pre_logits else self.change(self, logits, x)


CHANGES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "scaled": lambda self, logits, x: 3 * logits,
    "in place": lambda self, logits, x: logits.mul_(3),
    "relu": lambda self, logits, x: logits.relu(),
    "softmax": lambda self, logits, x: logits.softmax(-1),
    "used twice": lambda self, logits, x: ResNet.forward_head(self, 2 * x),
    "another bias": lambda self, logits, x: F.linear(ResNet.forward_head(self, x, True), self.fc.weight, -self.fc.bias),
    "functional": lambda self, logits, x: F.linear(ResNet.forward_head(self, x, True), self.fc.weight, self.fc.bias),
    "a temperature that is 1 at first": lambda self, logits, x: logits / self.calibration,
    "a bound that is not reached at first": lambda self, logits, x: logits.clamp(-self.bound, self.bound),
    "in place, nothing at first": lambda self, logits, x: logits.mul_(self.calibration),
    "two places": lambda self, logits, x: logits + 0.5 * self.fc(self.global_pool(x.square())),
}


@pytest.mark.parametrize("zero", [False, True], ids=["trained", "zero weights"])
@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_what_a_head_does_beside_its_classifier_counts(change: str, zero: bool) -> None:
    model = model_of()
    nn.init.normal_(model.fc.bias)
    model.__class__ = type("Changed", (Changed,), {"change": staticmethod(CHANGES[change])})
    model.calibration, model.bound = 1.0, 1e9
    timm_csra.unwrap(timm_csra.wrap(model))(x)
    assert last_layer(model, x) is None
    model.calibration, model.bound = 0.5, 0.1
    trained = model.fc.weight.detach().clone()
    if zero:  # what is found out must hold for weights that come later
        model.fc.weight.zero_()
        timm_csra.wrap(copy.copy(model))(x)
        model.fc.weight.copy_(trained)
    assert last_layer(model, x) is None
    features = model.forward_features(x)
    rows = features.flatten(2).transpose(1, 2)
    scores = torch.stack([model.forward_head(row[:, :, None, None]) for row in rows.unbind(1)], 1)
    ((term,),) = location_attention(model, model.forward_head, features, MAXIMUM)
    torch.testing.assert_close(term, scores.amax(1), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_changes_after_the_first_forward_are_seen() -> None:
    model = timm_csra.wrap(model_of(), lam=1.0)
    model(x)

    def check() -> None:
        logits, maps = model(x), timm_csra.score_maps(model, x)
        model.csra.lam = 0
        torch.testing.assert_close(logits, model(x) + maps.amax((2, 3)), rtol=1e-4, atol=1e-4)
        model.csra.lam = 1.0

    model.fc = nn.Sequential(nn.Linear(96, 300), nn.ReLU(), nn.Linear(300, 300)).eval()
    check()
    model.fc = nn.Linear(96, 300)
    check()
    model.fc.forward = lambda x: F.linear(x, model.fc.weight).relu()
    check()
    del model.fc.forward
    model.fc.__class__ = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * F.linear(x, self.weight)})
    check()
    model.global_pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    check()


def seen_by(model: nn.Module, module: nn.Module, change: float = 1.0) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert inputs[0].numel() and inputs[0].isfinite().all()
        shapes.append(tuple(output.shape))
        return change * output

    module.register_forward_hook(hook)
    return shapes


@torch.inference_mode()
def test_a_hook_in_the_head_sees_both_and_changes_both() -> None:
    model = timm_csra.wrap(model_of(), lam=1.0)
    expected = model(x)
    shapes = seen_by(model, model.fc, change=2.0)
    torch.testing.assert_close(model(x), 2 * expected, rtol=1e-4, atol=1e-4)
    assert sorted(shapes) == [(2, 300), (50, 300)]  # the base, and 2 images of 5 x 5 locations


@torch.inference_mode()
def test_hooks_outside_the_head_fire_once() -> None:
    model = timm_csra.wrap(model_of(), lam=1.0)
    shapes = [seen_by(model, model), seen_by(model, model.layer4), seen_by(model, model.layer4[-1].act2)]
    model(x)
    assert shapes == [[(2, 300)], [(2, 96, 5, 5)], [(2, 96, 5, 5)]]


@torch.inference_mode()
def test_global_hooks_see_tensors_of_the_model_alone() -> None:
    plain, model = model_of(), timm_csra.wrap(model_of(), lam=1.0)
    expected = model(x)
    for called_before in (True, False):
        calls: list[tuple[str, tuple[int, ...]]] = []

        def hook(module: nn.Module, inputs: Any, output: Any, calls: Any = calls) -> Any:
            assert all(part.numel() for part in inputs if isinstance(part, Tensor))
            calls.append((type(module).__name__, tuple(output.shape)))
            return 2 * output if isinstance(module, nn.Linear) else None

        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            plain(x)
            of_plain = list(calls)
            calls.clear()
            torch.testing.assert_close(model(x), 2 * expected, rtol=1e-4, atol=1e-4)
            assert not [call for call in of_plain if call not in calls and not call[0].startswith("ResNet")]
            assert sorted(shape for name, shape in calls if name == "Linear") == [(2, 300), (50, 300)]
            assert len(calls) == len(of_plain) + 4  # pool, its two parts and classifier on the locations
        finally:
            handle.remove()
        model = timm_csra.wrap(model_of(), lam=1.0)
        assert called_before or torch.equal(model(x), expected)


class Prefixed(ByobNet):
    """A subclass that changes what its attention pool gives."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return 3 * super().forward_head(x, pre_logits)


@torch.no_grad()
def test_hooks_and_subclasses_of_an_attention_pool_count_for_locations_too() -> None:
    family = next(family for family in FAMILIES if family.name == "resnet50_clip")
    model = create("resnet50_clip")
    inputs = images(family, count=1)
    plain, maps = model(inputs), timm_csra.score_maps(model, inputs)
    timm_csra.wrap(model, lam=0.5)
    torch.testing.assert_close(model(inputs), plain + 0.5 * maps.amax((2, 3)), rtol=1e-4, atol=1e-5)
    shapes = seen_by(model, model.head, change=2.0)
    torch.testing.assert_close(model(inputs), 2 * (plain + 0.5 * maps.amax((2, 3))), rtol=1e-4, atol=1e-5)
    assert len(shapes) == 2
    model = create("resnet50_clip")
    model.__class__ = Prefixed
    timm_csra.wrap(model, lam=0.5)
    torch.testing.assert_close(model(inputs), 3 * (plain + 0.5 * maps.amax((2, 3))), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_nothing_is_left_in_models_and_nothing_keeps_them() -> None:
    model = timm_csra.wrap(model_of(), lam=1.0)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = list(model.state_dict())
    expected = model(x)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert list(model.state_dict()) == state
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin not in heads._examined
        assert torch.equal(twin(x), expected)
    reference = weakref.ref(model)
    del model, twin, before
    gc.collect()
    assert reference() is None


class Rows(nn.Module):
    """A layer that takes rows and nothing else, in the words of whoever wrote it."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2
        return x


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(1024), Rows()], ids=["batch norm", "assertion"])
@torch.no_grad()
def test_heads_that_take_no_whole_map(layer: nn.Module) -> None:
    model = create("mobilenetv3_small_050").eval()
    model.flatten = nn.Sequential(nn.Flatten(), layer.eval())
    maps, plain = timm_csra.score_maps(model, x), model(x)
    torch.testing.assert_close(timm_csra.wrap(model, 0.5)(x), plain + 0.5 * maps.amax((2, 3)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_model_that_has_diverged_says_nan_as_plain_timm() -> None:
    model = create("test_convnext")
    model.head.norm.weight[3] = math.nan
    assert timm_csra.wrap(model)(x).isnan().all() and timm_csra.unwrap(model)(x).isnan().all()


def test_lam_zero_looks_at_nothing() -> None:
    model = timm_csra.wrap(model_of(), lam=0)
    model(x)
    assert model not in heads._examined


class SumPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))


class LogSumExpPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.logsumexp((2, 3))


class MeanAndDeviation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) + x.std((2, 3))


class FlattenAll(nn.Module):
    """Locations side by side: each has weights of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).unflatten(1, (96, 25)).mean(2)


class SumOfRoots(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().sqrt().sum((2, 3)) + 0 * x.sqrt().sum((2, 3))


class OfTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) - x.mean((0, 2, 3))


POOLS = [
    (SumPool, "test_resnet: its head returned other logits for a constant map of 2x2 locations than for one location"),
    (LogSumExpPool, "other logits for a constant map of 2x2 locations .*Expected a pooling .*Replace that part"),
    (MeanAndDeviation, "other logits for a constant map of 2x2 locations"),
    (FlattenAll, "test_resnet: its head cannot run on maps of one and of 2x2 locations: .*Expected a pooling"),
    (SumOfRoots, "other logits for a constant map of 2x2 locations"),
    (OfTheBatch, "other logits for a constant map of 2x2 locations .*no use of other images"),
]


@pytest.mark.parametrize(("pool", "text"), POOLS, ids=[pool.__name__ for pool, _ in POOLS])
@pytest.mark.parametrize("zero", [False, True], ids=["trained", "zero weights"])
@torch.no_grad()
def test_pooling_that_depends_on_the_number_of_locations_is_refused(
    pool: type[nn.Module], text: str, zero: bool
) -> None:
    model = model_of()
    model.global_pool = pool()
    if zero:
        model.fc.weight.zero_()
    timm_csra.wrap(model)
    for function in (model, lambda images: timm_csra.score_maps(model, images)):
        with pytest.raises(UnsupportedModelError, match=text):
            function(x)
    assert timm_csra.explain(model, 160).unsupported
    model.csra.lam = 0
    assert model(x).shape == (2, 300)


@torch.no_grad()
def test_masked_classes_are_legal() -> None:
    model = timm_csra.wrap(model_of(), lam=0.5, temperature=(2.0, math.inf))
    expected = model(x)
    model.fc.bias[7] = -math.inf
    logits = model(x)
    assert (logits[:, 7] == -math.inf).all()
    others = [c for c in range(300) if c != 7]
    torch.testing.assert_close(logits[:, others], expected[:, others])


def test_general_rule_and_shortcut_agree_on_what_timm_makes() -> None:
    """For each family the shortcut, where it is taken, is the rule: literally in test_families.py; here with hooks."""
    for name in ("test_convnext", "test_mambaout", "test_vit3", "mobilenetv3_small_050", "resnetv2_18"):
        model = timm_csra.wrap(create(name), lam=0.5, temperature=(1.0, math.inf))
        inputs = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            shortcut = model(inputs)
            assert last_layer(timm_csra.unwrap(model), inputs) is not None
            timm_csra.wrap(model, lam=0.5, temperature=(1.0, math.inf))
            model.get_classifier().register_forward_hook(lambda *_: None)
            torch.testing.assert_close(model(inputs), shortcut, rtol=1e-4, atol=1e-5)


def test_scores_of_a_function_that_is_no_method() -> None:
    """The general rule takes any head."""
    model = model_of()
    with torch.no_grad():
        features = model.forward_features(x)
        scores = location_scores(model, lambda features: -model.forward_head(features), features)[0]
        torch.testing.assert_close(scores, -location_scores(model, model.forward_head, features)[0])


class Later(Changed):
    """Its head goes by an attribute that a user sets after the first forward pass."""

    calibration: float | Tensor | None = None
    mode = "mean"

    @staticmethod
    def change(self: Any, logits: Tensor, features: Tensor) -> Tensor:
        return logits if self.calibration is None else logits / self.calibration


@pytest.mark.parametrize("values", [(2.0, 0.5), (torch.tensor(2.0), torch.tensor(0.5)), (2, None)], ids=str)
@torch.inference_mode()
def test_attributes_that_change_after_the_first_forward_count(values: tuple[Any, Any]) -> None:
    model = model_of()
    model.__class__ = Later
    timm_csra.wrap(model, lam=0.3)
    model(x)
    for value in values:
        model.calibration = value.clone() if isinstance(value, Tensor) else value  # which is one of inference mode
        maps = timm_csra.score_maps(model, x)
        plain = timm_csra.unwrap(copy.deepcopy(model))(x)
        torch.testing.assert_close(model(x), plain + 0.3 * maps.amax((2, 3)))


class Pool(nn.Module):
    mode = "mean"

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3)) if self.mode == "sum" else x.mean((2, 3))


@torch.inference_mode()
def test_a_pooling_that_changes_after_the_first_forward_is_refused() -> None:
    model = model_of()
    model.global_pool = Pool()
    timm_csra.wrap(model, lam=0.3)(x)
    model.global_pool.mode = "sum"
    with pytest.raises(UnsupportedModelError, match="returned other logits for a constant map of 2x2 locations"):
        model(x)


class Scaled(ResNet):
    def forward_head(self, x: Tensor, pre_logits: bool = False, scale: float = 1.0) -> Tensor:
        return scale * super().forward_head(x, pre_logits)


@torch.inference_mode()
def test_arguments_of_a_head_that_the_locations_would_be_scored_without_are_refused() -> None:
    model = model_of()
    model.__class__ = Scaled
    features = model.forward_features(x)
    timm_csra.wrap(model, lam=0.0)
    torch.testing.assert_close(model.forward_head(features, scale=2.0), 2 * model.forward_head(features))
    model.csra.lam = 0.3
    with pytest.raises(UnsupportedModelError, match="forward_head was called with scale; expected no arguments but"):
        model.forward_head(features, scale=2.0)
