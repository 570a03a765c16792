"""The classifier's product in parts: always the same numbers as the rule, whatever the head does around it."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_csra
from timm_csra import locations
from timm_csra.attention import class_attention
from timm_csra.locations import location_attention, location_scores

TEMPERATURES = (1.0, math.inf)


def model_of(name: str = "test_resnet", **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=300, **arguments).eval()
    nn.init.normal_(model.get_classifier().weight)
    return model


class Recorder:
    """How the classifier's products were made: classes of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.classes: list[int] = []
        self.by_classes = locations._by_classes
        monkeypatch.setattr(locations, "_by_classes", self)

    def __call__(self, classifier: nn.Linear, *rest: object) -> object:
        self.classes.append(classifier.out_features)
        return self.by_classes(classifier, *rest)


def check(model: nn.Module, features: Tensor, valid: Tensor | None = None) -> None:
    """Against all scores at once, and the formula on them."""
    scores = location_scores(model, model.forward_head, features)
    found = location_attention(model, model.forward_head, features, TEMPERATURES, valid)
    for terms, every in zip(found, scores, strict=True):
        for term, temperature in zip(terms, TEMPERATURES, strict=True):
            torch.testing.assert_close(term, class_attention(every, temperature, valid), rtol=1e-4, atol=1e-4)


NAMES = [
    "test_resnet",
    "test_convnext",
    "test_vit",
    "test_vit2",
    "test_vit3",
    "mobilenetv3_small_050",
    "deit_tiny_patch16_224",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("product", [1, 2**30], ids=["64 classes at a time", "all at once"])
@torch.inference_mode()
def test_parts_of_the_classes(name: str, product: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "PRODUCT", product)
    monkeypatch.setattr(locations, "INPUTS", 2**12)  # and of the locations
    recorder = Recorder(monkeypatch)
    model = model_of(name)
    check(
        model,
        model.forward_features(torch.randn(2, 3, 160, 160) if "deit" not in name else torch.randn(2, 3, 224, 224)),
    )
    assert recorder.classes and set(recorder.classes) == {300}


@torch.inference_mode()
def test_padding_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "PRODUCT", 1)
    model = model_of("test_vit2")
    features = model.forward_features(torch.randn(2, 3, 160, 160))
    valid = torch.rand(2, features.shape[1] - model.num_prefix_tokens) < 0.5
    check(model, features, valid)


def scaled(x: Tensor) -> Tensor:
    return 3 * x


def in_place(x: Tensor) -> Tensor:
    return x.mul_(3)


@pytest.mark.parametrize(
    "after", [scaled, in_place, torch.relu, nn.Softmax(-1)], ids=["scaled", "in place", "relu", "softmax"]
)
@torch.inference_mode()
def test_what_comes_after_the_classifier_is_applied(
    after: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    model = model_of()
    plain = model.forward_head

    def head(features: Tensor) -> Tensor:
        return after(plain(features))

    features = model.forward_features(torch.randn(2, 3, 160, 160))
    scores = location_scores(model, head, features)[0]
    torch.testing.assert_close(scores, after(location_scores(model, plain, features)[0].clone()))
    ((term,),) = location_attention(model, head, features, (math.inf,))
    torch.testing.assert_close(term, scores.amax(1))
    assert not recorder.classes


@torch.inference_mode()
def test_a_classifier_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    model = model_of()
    plain = model.forward_head

    def head(features: Tensor) -> Tensor:
        plain(features)
        return plain(2 * features)

    features = model.forward_features(torch.randn(2, 3, 160, 160))
    ((term,),) = location_attention(model, head, features, (math.inf,))
    torch.testing.assert_close(term, location_scores(model, head, features)[0].amax(1))
    assert not recorder.classes


@torch.inference_mode()
def test_hooks_see_and_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    model = model_of()
    features = model.forward_features(torch.randn(2, 3, 160, 160))
    expected = 2 * location_scores(model, model.forward_head, features)[0].amax(1)
    seen = []
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.shape) or 2 * output)
    ((term,),) = location_attention(model, model.forward_head, features, (math.inf,))
    torch.testing.assert_close(term, expected)
    assert seen
    assert not recorder.classes


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
    ((term,),) = location_attention(model, model.forward_head, features, (math.inf,))
    assert torch.equal(features, before)
    torch.testing.assert_close(term, model.fc(2 * features.flatten(2).transpose(1, 2)).amax(1))


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_a_linear_layer(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either library, with gradients, and under autocast."""
    layer = nn.Linear(300, 70, bias=bias)
    rows = torch.randn(50, 300)
    expected = layer.double()(rows.double()).float()
    layer.float()
    made = []
    if locations._has_onednn():
        operator = torch.ops.mkldnn._linear_pointwise
        fake = SimpleNamespace(_linear_pointwise=lambda *args: made.append(len(args[0])) or operator(*args))
        monkeypatch.setattr(torch.ops, "mkldnn", fake)
    with torch.inference_mode():
        torch.testing.assert_close(locations.product(rows, layer.weight, layer.bias), expected)
        assert made == [50] * locations._has_onednn()
        with torch.autocast("cpu", torch.bfloat16):
            assert locations.product(rows, layer.weight, layer.bias).dtype == torch.bfloat16
    assert locations.product(rows, layer.weight, layer.bias).requires_grad
    with torch.inference_mode():
        monkeypatch.setattr(locations, "_has_onednn", lambda: False)
        torch.testing.assert_close(locations.product(rows, layer.weight, layer.bias), expected)
    assert len(made) <= 1


def test_gradients_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "PRODUCT", 1)
    model = model_of("test_vit2").double()
    x = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    gradients = []
    for attention in (
        lambda features: location_attention(model, model.forward_head, features, (2.0,))[0][0],
        lambda features: class_attention(location_scores(model, model.forward_head, features)[0], 2.0),
    ):
        model.zero_grad()
        attention(model.forward_features(x)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("trained", ["fc.weight", "fc.bias", "conv1.0.weight"])
def test_gradients_of_a_model_that_is_frozen_but_for_one_parameter(trained: str) -> None:
    """In float32, where inference takes another library, which has no gradient."""
    model = model_of().requires_grad_(False)
    parameter = model.get_parameter(trained).requires_grad_()
    x = torch.randn(2, 3, 96, 96)
    found, expected = (
        torch.autograd.grad(attention(model.forward_features(x)).square().sum(), parameter)[0]
        for attention in (
            lambda features: location_attention(model, model.forward_head, features, (2.0,))[0][0],
            lambda features: class_attention(location_scores(model, model.forward_head, features)[0], 2.0),
        )
    )
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_transforms_of_torch_func(grad_mode: type) -> None:
    """Forward-mode derivatives against those in float64, where one library does everything; and vmap."""
    model = timm_csra.wrap(model_of(), lam=0.5, temperature=2.0)
    double = timm_csra.wrap(model_of().double(), lam=0.5, temperature=2.0)
    x, direction = torch.randn(2, 2, 3, 96, 96)
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
def test_layouts_and_types_take_it_too(
    layout: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    model = timm_csra.wrap(model_of().to(memory_format=layout, dtype=dtype), lam=1.0)
    x = torch.randn(2, 3, 160, 160).to(memory_format=layout, dtype=dtype)
    logits = model(x)
    assert logits.dtype == dtype
    assert recorder.classes == [300]
    maps = timm_csra.score_maps(model, x)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    expected = timm_csra.unwrap(model)(x) + maps.amax((2, 3))
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_bounded_memory_on_cuda(cuda: torch.device, dtype: torch.dtype) -> None:
    """21,841 classes on 14 x 14 locations, batch 64: the same numbers, and a tenth of the memory of all scores."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=21841).eval().to(cuda, dtype)
    features = model.forward_features(torch.randn(64, 3, 448, 448, device=cuda, dtype=dtype))
    peaks, terms = [], []
    for attention in (
        lambda: location_attention(model, model.forward_head, features, TEMPERATURES)[0],
        lambda: [class_attention(location_scores(model, model.forward_head, features)[0], t) for t in TEMPERATURES],
    ):
        attention()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        terms.append([term.cpu().float() for term in attention()])
        peaks.append(torch.cuda.max_memory_allocated() - before)
    for ours, reference in zip(*terms, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2 * float(reference.abs().max()))
    assert peaks[0] < peaks[1] / 5
