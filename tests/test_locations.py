"""Scores made for some rows at a time: always the same numbers as the rule, and bounded memory."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_csra
from timm_csra import locations
from timm_csra.attention import class_attention
from timm_csra.heads import parts_of
from timm_csra.layouts import layout_of
from timm_csra.locations import location_attention, location_scores
from timm_csra.patching import plain_head

KINDS = ("logits", "log_softmax")
TERMS = [(kind, T) for kind in KINDS for T in (1.0, math.inf, 5.0)]


def model_of(name: str = "test_resnet", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=300, **arguments).eval()
    classifier = model.get_classifier()
    nn.init.normal_(classifier.weight, std=1 / math.sqrt(classifier.weight.shape[1]))
    return model


def last_layer(model: nn.Module, x: Tensor) -> nn.Module | None:
    """What the library makes the product with; None for the general rule."""
    layout = layout_of(model, features := model.forward_features(x))
    return parts_of(model, plain_head(model), layout, layout.locations(features)).classifier


def literal(scores: Tensor, kind: str, temperature: float, valid: Tensor | None = None) -> Tensor:
    scores = scores if kind == "logits" else scores.log_softmax(-1)
    return class_attention(scores, temperature, valid)


def check(model: nn.Module, features: Tensor, valid: Tensor | None = None) -> None:
    """Against all scores at once, and the formula on them."""
    (scores,) = location_scores(model, model.forward_head, features)
    (found,) = location_attention(model, model.forward_head, features, TERMS, valid)
    for term, (kind, temperature) in zip(found, TERMS, strict=True):
        torch.testing.assert_close(term, literal(scores, kind, temperature, valid), rtol=1e-4, atol=1e-4)


NAMES = [
    "test_resnet",
    "test_convnext",
    "test_mambaout",
    "test_vit",
    "test_vit2",
    "test_vit3",
    "mobilenetv3_small_050",
    "resnetv2_18",  # whose classifier is a convolution
    "deit_tiny_distilled_patch16_224",  # of which the general rule is all that applies
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scores", [1, 2**12, 2**30], ids=["a row at a time", "13 rows", "all at once"])
@torch.inference_mode()
def test_parts_of_the_rows(name: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "SCORES", scores)
    model = model_of(name) if "deit" not in name else timm.create_model(name, num_classes=300).eval()
    x = torch.randn(2, 3, 224, 224) if "deit" in name else torch.randn(2, 3, 160, 160)
    check(model, model.forward_features(x))
    assert (last_layer(model, x) is None) == ("deit" in name)


@pytest.mark.parametrize(("count", "size", "lengths"), [(0, 5, [0]), (7, 3, [2, 2, 3]), (6, 3, [3, 3]), (4, 9, [4])])
def test_parts_are_as_even_as_they_can_be(count: int, size: int, lengths: list[int]) -> None:
    spans = locations._even(count, size)
    assert [len(range(count)[span]) for span in spans] == lengths
    assert [i for span in spans for i in range(count)[span]] == list(range(count))


@torch.inference_mode()
def test_padding_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "SCORES", 2**12)
    model = model_of("test_vit2")
    features = model.forward_features(torch.randn(2, 3, 160, 160))
    valid = torch.rand(2, features.shape[1] - model.num_prefix_tokens) < 0.5
    valid[0, :40] = False  # whole parts of an image may be padding
    check(model, features, valid)


BIASES = [lambda: torch.randn(1).expand(300), lambda: torch.randn(600)[::2], lambda: torch.randn(300), lambda: None]


@pytest.mark.parametrize("bias", BIASES, ids=["expanded", "strided", "contiguous", "none"])
@pytest.mark.parametrize(
    "weight", [lambda: torch.randn(96, 300).t(), lambda: torch.randn(600, 96)[::2]], ids=["t", "s"]
)
@torch.inference_mode()
def test_weights_and_biases_of_any_strides(bias: Any, weight: Any) -> None:
    model, tensor = model_of(), bias()
    model.fc.weight = nn.Parameter(weight())
    model.fc.bias = None if tensor is None else nn.Parameter(tensor)
    features = model.forward_features(torch.randn(2, 3, 96, 96))
    assert tensor is None or model.fc.bias.stride() == tensor.stride()
    rows = features.flatten(2).transpose(1, 2).double()
    expected = rows @ model.fc.weight.double().t() + (0 if tensor is None else tensor.double())
    ((term,),) = location_attention(model, model.forward_head, features, [("logits", math.inf)])
    torch.testing.assert_close(term.double(), expected.amax(1), rtol=1e-5, atol=1e-4)


class PoolAndDouble(nn.Module):
    """What a head may do in place with what it has pooled."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).mul_(2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.inference_mode()
def test_heads_that_work_in_place_leave_the_features_alone(layout: torch.memory_format) -> None:
    model = model_of()
    model.global_pool = PoolAndDouble()
    features = model.forward_features(torch.randn(2, 3, 160, 160)).to(memory_format=layout)
    before = features.clone()
    ((term,),) = location_attention(model, model.forward_head, features, [("logits", math.inf)])
    assert torch.equal(features, before)
    torch.testing.assert_close(term, model.fc(2 * features.flatten(2).transpose(1, 2)).amax(1))


def both_ways(model: nn.Module, kind: str) -> list[Any]:
    """The attention of T = 2 as the library makes it, and from all scores at once."""
    return [
        lambda features: location_attention(model, model.forward_head, features, [(kind, 2.0)])[0][0],
        lambda features: literal(location_scores(model, model.forward_head, features)[0], kind, 2.0),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_all_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "SCORES", 2**12)
    model = model_of("test_vit2").double()
    x = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    gradients = []
    for attention in both_ways(model, kind):
        model.zero_grad()
        attention(model.forward_features(x)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("trained", ["fc.weight", "fc.bias", "conv1.0.weight"])
def test_gradients_of_a_model_that_is_frozen_but_for_one_parameter(trained: str) -> None:
    model = model_of().requires_grad_(False)
    parameter = model.get_parameter(trained).requires_grad_()
    x = torch.randn(2, 3, 96, 96)
    found, expected = (
        torch.autograd.grad(attention(model.forward_features(x)).square().sum(), parameter)[0]
        for attention in both_ways(model, "logits")
    )
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("called_before", [False, True])
def test_transforms_of_torch_func(grad_mode: type, called_before: bool) -> None:
    """Forward-mode derivatives against those in float64; and vmap."""
    model = timm_csra.wrap(model_of(), lam=0.5, temperature=2.0)
    double = timm_csra.wrap(model_of().double(), lam=0.5, temperature=2.0)
    x, direction = torch.randn(2, 2, 3, 96, 96)
    if called_before:
        model(x), double(x.double())
    with grad_mode():
        _, expected = torch.func.jvp(double, (x.double(),), (direction.double(),))
        _, found = torch.func.jvp(model, (x,), (direction,))
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-3, atol=1e-3 * expected.detach().abs().max().item()
        )
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, direction))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, found)
        one_by_one = torch.func.vmap(lambda image: model(image[None])[0])(x)
        torch.testing.assert_close(one_by_one, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_memory_formats_and_dtypes(layout: torch.memory_format, dtype: torch.dtype) -> None:
    model = timm_csra.wrap(model_of().to(memory_format=layout, dtype=dtype), lam=1.0)
    x = torch.randn(2, 3, 160, 160).to(memory_format=layout, dtype=dtype)
    assert last_layer(model, x) is model.fc
    logits = model(x)
    assert logits.dtype == dtype
    maps = timm_csra.score_maps(model, x)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    expected = timm_csra.unwrap(model)(x) + maps.amax((2, 3))
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


PEAK = """
import math, sys, timm, torch
from pathlib import Path
from timm_csra.locations import location_attention

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

name, terms = sys.argv[1], eval(sys.argv[2])
model = timm.create_model(name, num_classes=21841).eval()
with torch.inference_mode():
    features = torch.randn(16, model.num_features, 14, 14)
    location_attention(model, model.forward_head, features[:1, :, :2, :2], terms)  # what libraries allocate once
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    before = status("VmRSS")
    location_attention(model, model.forward_head, features, terms)
    print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are those of Linux: this did NOT run")
@pytest.mark.parametrize("name", ["test_resnet", "resnetv2_18"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_many_classes(name: str, kind: str) -> None:
    """21,841 classes: at most a tenth of the scores of all locations, which take 261 MB for 16 images of 14 x 14; beside
    them the terms, and what the head gives its classifier, are there in any case."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    arguments = [sys.executable, "-c", PEAK, name, f"[({kind!r}, math.inf)]"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    terms, inputs = 16 * 21841 * 4, 16 * 196 * {"test_resnet": 96, "resnetv2_18": 512}[name] * 4
    naive = 16 * 196 * 21841 * 4 / 2**20
    assert float(done.stdout) - 2 * (terms + inputs) / 2**20 <= naive / 10
    assert naive > 260


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_bounded_memory_on_cuda(cuda: torch.device, dtype: torch.dtype) -> None:
    """21,841 classes on 14 x 14 locations, batch 64: the same numbers, and a tenth of the memory of all scores."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=21841).eval().to(cuda, dtype)
    features = model.forward_features(torch.randn(64, 3, 448, 448, device=cuda, dtype=dtype))
    terms = [("logits", 1.0), ("logits", math.inf)]
    peaks, found = [], []
    for attention in (
        lambda: location_attention(model, model.forward_head, features, terms)[0],
        lambda: [literal(location_scores(model, model.forward_head, features)[0], *term) for term in terms],
    ):
        attention()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append([term.cpu().float() for term in attention()])
        peaks.append(torch.cuda.max_memory_allocated() - before)
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2 * float(reference.abs().max()))
    assert peaks[0] < peaks[1] / 5
