"""wrap, unwrap and what they refuse; settings at run time; threads."""

import copy
import re
import threading
import types
import warnings
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import timm_csra
from timm_csra import UnsupportedModelError

from .families import create

x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(3))


def test_wrapping_again_replaces_the_settings() -> None:
    model = timm_csra.wrap(create("test_resnet"), lam=0.5, temperature=2)
    once = type(model)
    assert timm_csra.wrap(model) is model
    assert type(model) is once
    assert model.csra == timm_csra.CSRAConfig()
    assert timm_csra.is_wrapped(model)
    assert not timm_csra.is_wrapped(timm_csra.unwrap(model))
    assert timm_csra.unwrap(model) is model


@torch.no_grad()
def test_assignment_takes_effect_at_the_next_forward() -> None:
    model = timm_csra.wrap(create("test_resnet"), lam=0.3)
    expected = model(x)
    timm_csra.wrap(model, lam=0.1)
    assert not torch.equal(model(x), expected)
    model.csra.lam = 0.3
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_lam_zero_calls_the_head_of_the_model_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm_csra.wrap(create("test_resnet"), lam=0)
    own, seen = timm.models.resnet.ResNet.forward_head, []

    def counting(self: nn.Module, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        seen.append(tuple(features.shape))
        return own(self, features, pre_logits)

    monkeypatch.setattr(timm.models.resnet.ResNet, "forward_head", counting)
    model(x)
    assert seen == [(2, 96, 3, 3)]
    model.csra.lam = 0.1
    model(x)
    assert seen[-2:] == [(2 * 3 * 3, 96, 1, 1), (2, 96, 3, 3)]
    assert all(shape[0] <= 2 for shape in seen[1:-2])  # the first time it is looked at, on a copy
    once = len(seen)
    model(x)
    assert seen[once:] == [(2 * 3 * 3, 96, 1, 1), (2, 96, 3, 3)]


@torch.no_grad()
def test_classes_of_the_same_model_do_not_share_settings() -> None:
    first, second = timm_csra.wrap(create("test_resnet"), 0.1), timm_csra.wrap(create("test_resnet"), 0.9)
    assert type(first) is type(second)
    assert (first.csra.lam, second.csra.lam) == (0.1, 0.9)
    assert not torch.equal(first(x), second(x))


@torch.no_grad()
def test_threads_do_not_disturb_each_other() -> None:
    one, other = timm_csra.wrap(create("test_vit2")), timm_csra.wrap(create("test_vit2"), 0.7, (1, 5))
    batches = [torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = {(id(m), i): m(batch) for m in (one, other) for i, batch in enumerate(batches)}
    wrong: list[object] = []

    def work(model: nn.Module, start: int) -> None:
        for step in range(12):
            i = (start + step) % len(batches)
            with torch.no_grad():  # the mode is per thread
                if not torch.allclose(model(batches[i]), expected[id(model), i], atol=1e-6):
                    wrong.append((model.csra, i))

    threads = [threading.Thread(target=work, args=(m, s)) for m in (one, one, other, other) for s in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def no_pooling() -> nn.Module:
    return timm.create_model("test_vit", global_pool="")


def positions_in_the_pool() -> nn.Module:
    model = timm.create_model("test_vit3")
    model.attn_pool = timm.layers.AttentionPoolLatent(96, num_heads=3, pos_embed="abs", feat_size=100)
    return model


def own_head() -> nn.Module:
    model = timm.create_model("test_resnet")
    model.forward_head = types.MethodType(lambda self, x, pre_logits=False: x.mean((2, 3)), model)
    return model


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet")


REFUSED = [
    (lambda: timm.create_model("test_resnet", num_classes=0), r"test_resnet: found num_classes=0.*reset_classifier"),
    (no_pooling, r"test_vit: found global_pool=''.*expected logits \(N, K\).*global_pool='avg'"),
    (own_head, r"test_resnet: found a forward_head set on the instance.*del model.forward_head"),
    (lambda: nn.Linear(2, 2), r"Linear is not a timm classifier: expected .*forward_features.*timm.create_model"),
    (lambda: "resnet50", r"str is not a timm classifier"),
    (lambda: timm.create_model("test_resnet", features_only=True), "FeatureListNet is not a timm classifier"),
    (lambda: nn.DataParallel(create("test_resnet")), r"DataParallel is not a timm.*wrap\(model.module\) instead"),
    (lambda: torch.compile(create("test_resnet")), r"OptimizedModule.*wrap\(model._orig_mod\) instead"),
    (Detector, r"Detector is not a timm classifier.*wrap\(model.backbone\) instead"),
    (lambda: nn.Sequential(Detector()), r"wrap\(model.get_submodule\('0.backbone'\)\) instead"),
    (
        positions_in_the_pool,
        r"test_vit3: found an attention pool with a position embedding, `attn_pool`.*except `model.head`.*without pos",
    ),
]


@pytest.mark.parametrize(("build", "text"), REFUSED, ids=[text.split(":")[0].split(" ")[0] for _, text in REFUSED])
def test_refused_models(build: object, text: str) -> None:
    model = build()  # type: ignore[operator]
    plain = type(model)
    for function in (timm_csra.wrap, lambda m: timm_csra.score_maps(m, x)):
        with pytest.raises(UnsupportedModelError, match=text):
            function(model)
    assert type(model) is plain
    explanation = timm_csra.explain(model)
    assert explanation.unsupported
    assert "cannot be wrapped" in str(explanation)


def test_refused_at_the_forward_pass() -> None:
    model = timm_csra.wrap(create("test_resnet"))
    model.reset_classifier(0)
    with pytest.raises(UnsupportedModelError, match="test_resnet: found num_classes=0, no classifier"):
        model(x)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)

    model = timm_csra.wrap(create("test_resnet"))
    model.forward_features = types.MethodType(lambda self, x: torch.zeros(len(x), 96), model)
    with pytest.raises(
        UnsupportedModelError, match=r"its features have no locations.*returned \(2, 96\), expected \(N, C, H, W\)"
    ):
        model(x)

    model.forward_features = types.MethodType(lambda self, x: {"x": x}, model)
    with pytest.raises(
        UnsupportedModelError, match="test_resnet: forward_features returned a dict, expected one tensor"
    ):
        timm_csra.score_maps(model, x)


class Bypassing(timm.models.resnet.ResNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.global_pool(self.forward_features(x)))


@torch.no_grad()
def test_a_forward_that_does_not_reach_the_head_is_told_once() -> None:
    model = create("test_resnet")
    model.__class__ = Bypassing
    plain = model(x)
    timm_csra.wrap(model, lam=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        model.csra.lam = 0.3
        timm_csra.score_maps(model, x, return_logits=True)  # calls the head, but not the model's forward
        with pytest.raises(
            UserWarning, match="test_resnet: its forward did not call forward_head, so wrapping has no effect"
        ):
            model(x)
        assert torch.equal(model(x), plain)
        for works in (create("test_resnet"), create("test_vit2")):
            timm_csra.wrap(works)(torch.randn(1, 3, 160, 160))


@pytest.mark.parametrize("compiled_first", [False, True])
@torch.no_grad()
def test_a_model_compiled_in_place_is_told_nothing(compiled_first: bool) -> None:
    model = create("test_resnet")
    expected = timm_csra.wrap(copy.deepcopy(model), lam=0.3)(x)
    if compiled_first:
        model.compile(backend="eager")
    timm_csra.wrap(model, lam=0.3)
    if not compiled_first:
        model.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("size", ["224", 224.0, (224,), -5, (0, 0), True, (1, 2, 3, 4), None, 97])
def test_explain_refuses_sizes_that_are_none(size: Any) -> None:
    model = create("test_vit")
    if size is None:
        assert timm_csra.explain(model, size).input_size == (3, 160, 160)
        return
    text = r"cannot run on 3x97x97: " if size == 97 else rf"input_size: found {re.escape(repr(size))}; expected pixels"
    with pytest.raises(ValueError, match=text):
        timm_csra.explain(model, size)


@pytest.mark.parametrize(
    ("name", "arguments", "size", "grid"),
    [
        ("test_vit", {"patch_size": (16, 8), "img_size": (96, 96)}, (96, 96), (6, 12)),
        ("test_vit", {"patch_size": (8, 16), "dynamic_img_size": True}, (64, 160), (8, 10)),
        ("test_vit", {"dynamic_img_size": True, "dynamic_img_pad": True}, (70, 100), (5, 7)),
    ],
)
@torch.no_grad()
def test_maps_of_patches_that_are_not_square(name: str, arguments: dict, size: tuple, grid: tuple) -> None:
    model = timm.create_model(name, **arguments).eval()
    images = torch.randn(1, 3, *size)
    maps = timm_csra.score_maps(model, images)
    assert maps.shape[2:] == grid
    tokens = model.forward_features(images)[:, 1:]
    torch.testing.assert_close(maps[0, :, 1, 2], model.forward_head(tokens[:, [grid[1] + 2]].expand(1, 2, -1))[0])


def test_unwrap_undoes_nothing_of_others() -> None:
    model = timm_csra.wrap(timm.create_model("test_vit").eval(), lam=0.3)
    parametrize.register_parametrization(model, "pos_embed", nn.Identity())
    assert timm_csra.is_wrapped(model)
    with pytest.raises(
        TypeError,
        match="test_vit: found the class ParametrizedCSRAVisionTransformer, expected CSRAVisionTransformer as wrap left",
    ):
        timm_csra.unwrap(model)
    assert model.csra.lam == 0.3
    parametrize.remove_parametrizations(model, "pos_embed")
    assert type(timm_csra.unwrap(model)).__name__ == "VisionTransformer"


def test_explain_reads_well() -> None:
    text = str(timm_csra.explain(create("test_resnet"), 160))
    assert text.splitlines()[0] == "test_resnet: can be wrapped"
    assert "kind              exact (linear after average pooling" in text
    assert "locations         5 x 5 for an input of 3x160x160" in text
    assert "extra MACs        2.40 M" in text  # 25 locations x 96 channels x 1000 classes
    assert (
        "settings          not wrapped. For pictures of several objects: if the model was trained with softmax cross"
        in text
    )
    wrapped = timm_csra.wrap(create("test_resnet"), lam=0.3, scores="log_softmax")
    text = str(timm_csra.explain(wrapped, 160))
    assert "settings          CSRAConfig(lam=0.3, temperature=(inf,), scores='log_softmax')" in text


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["levit_128s", "efficientformer_l1", "tiny_vit_5m_224", "test_vit3"])
def test_explain_leaves_no_trace_in_caches(name: str, grad_mode: type) -> None:
    """In eval mode these keep attention biases in a dictionary of the module."""
    model = create(name)
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    with grad_mode():
        before = timm_csra.explain(model)
        logits = model(images)
        assert type(logits) is torch.Tensor
        assert torch.equal(logits, create(name)(images))
        assert timm_csra.explain(timm_csra.wrap(model, lam=0)) == replace(before, settings=timm_csra.CSRAConfig(0))
        assert torch.equal(model(images), logits)


def test_explain_changes_nothing_and_needs_no_weights() -> None:
    model = timm.create_model("test_efficientnet").train()
    model.bn1.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    timm_csra.explain(model)
    assert model.training and not model.bn1.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.device("meta"):
        on_meta = timm.create_model("test_efficientnet")
    assert timm_csra.explain(on_meta) == timm_csra.explain(model)
