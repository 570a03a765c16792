"""Models that their user has changed, before or after wrapping: another pooling, size, classifier, precision."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

import timm_csra
from timm_csra import UnsupportedModelError

from .families import OLDER, Family, create, images, literal_logits, literal_scores, paper, randomise, spatial_features


class Variant(NamedTuple):
    family: Family  # its kind is the variant's
    arguments: dict[str, Any]


def variant(name: str, features: str, prefix: int, kind: str, size: int, **arguments: Any) -> Any:
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    return pytest.param(Variant(Family(name, features, prefix, kind, size), arguments), id=f"{name}-{text}")


POOLS = [
    variant("test_resnet", "NCHW", 0, "nonlinear", 96, global_pool="max"),
    variant("test_resnet", "NCHW", 0, "nonlinear", 96, global_pool="avgmax"),
    variant("test_resnet", "NCHW", 0, "nonlinear", 96, global_pool="catavgmax"),
    variant("test_resnet", "NCHW", 0, "exact", 96, global_pool="fast"),
    variant("test_efficientnet", "NCHW", 0, "nonlinear", 96, global_pool="catavgmax"),
    variant("test_byobnet", "NCHW", 0, "nonlinear", 96, global_pool="fastcatavgmax"),
    variant("test_convnext", "NCHW", 0, "nonlinear", 96, global_pool="max"),
    variant("test_mambaout", "NHWC", 0, "nonlinear", 96, global_pool="avgmax"),
    variant("swin_tiny_patch4_window7_224", "NHWC", 0, "nonlinear", 224, global_pool="max", depths=(1, 1, 2, 1)),
    variant("test_vit", "NLC", 1, "nonlinear", 160, global_pool="avg"),
    variant("test_vit", "NLC", 1, "exact", 160, global_pool="avg", fc_norm=False),
    variant("test_vit", "NLC", 1, "nonlinear", 160, global_pool="max"),
    variant("test_vit", "NLC", 1, "nonlinear", 160, global_pool="avgmax"),
    variant("test_vit", "NLC", 1, "token", 160, global_pool="map"),
    variant("test_vit", "NLC", 1, "token", 160, global_pool="prr"),
    variant("test_vit", "NLC", 2, "token", 160, reg_tokens=1),
    variant("test_vit2", "NLC", 1, "token", 160, global_pool="map"),
    variant("vit_small_patch16_rope_224", "NLC", 1, "token", 224, global_pool="map", depth=2),
    variant("vit_small_patch16_rope_224", "NLC", 1, "nonlinear", 224, global_pool="avg", depth=2),
    variant("beit_base_patch16_224", "NLC", 1, "token", 224, global_pool="token", depth=2, embed_dim=96, num_heads=2),
    variant("xcit_nano_12_p16_224", "NLC", 1, "exact", 224, global_pool="avg", depth=2),
    variant("cait_xxs24_224", "NLC", 1, "exact", 224, global_pool="avg", depth=2),
    variant("convit_tiny", "NLC", 1, "exact", 224, global_pool="avg"),
    variant("deit_tiny_distilled_patch16_224", "NLC", 2, "token", 224, global_pool="token"),
    variant("coat_lite_tiny", "NLC", 1, "exact", 96, global_pool="avg", img_size=96),
    variant("coat_tiny", "branches", 1, "exact", 64, global_pool="avg", img_size=64),
    # 20 x 20 and 14 x 14 tokens: the nearest token of the coarse grid serves one or two of the fine one.
    variant("crossvit_tiny_240", "branches", 1, "nonlinear", 240, global_pool="avg"),
    variant("volo_d1_224", "NLC", 1, "nonlinear", 96, global_pool="avg", img_size=96),
    variant("volo_d1_224", "NLC", 1, "token", 96, use_aux_head=False, img_size=96),
    variant("mvitv2_small_cls", "NLC", 1, "exact", 224, global_pool="avg"),
    variant("samvit_base_patch16_224", "NCHW", 0, "nonlinear", 224, global_pool="max", depth=2, embed_dim=96),
]

CHANGES = [
    variant("test_resnet", "NCHW", 0, "exact", 96, num_classes=20),
    variant("test_vit", "NLC", 1, "token", 160, num_classes=1),
    variant("resnet50_clip", "NCHW", 0, "token", 128, img_size=128, num_classes=20),
    variant("test_resnet", "NCHW", 0, "exact", 96, in_chans=1),
    variant("test_vit", "NLC", 1, "token", 96, img_size=96),
    variant("test_vit", "NLC", 1, "token", 224, dynamic_img_size=True),
    variant("swin_tiny_patch4_window7_224", "NHWC", 0, "exact", 288, img_size=288, depths=(1, 1, 2, 1)),
    variant("crossvit_tiny_240", "branches", 1, "token", 120, img_size=120),
    variant("coat_tiny", "branches", 1, "token", 96, img_size=96),
    variant("pit_ti_224", "NLC", 1, "token", 160, img_size=160),
    variant("volo_d1_224", "NLC", 1, "nonlinear", 128, img_size=128),
    variant("efficientvim_m1", "states", 0, "exact", 320),
    variant("test_resnet", "NCHW", 0, "exact", 96, output_stride=16),
    variant("test_resnet", "NCHW", 0, "exact", 96, scriptable=True),
    variant("test_efficientnet", "NCHW", 0, "exact", 96, exportable=True),
    variant("mobilenetv3_small_050", "NCHW", 0, "nonlinear", 96, num_classes=20, in_chans=1, exportable=True),
]


@pytest.mark.parametrize("changed", POOLS + CHANGES)
@torch.no_grad()
def test_created_otherwise(changed: Variant) -> None:
    """Every promise that the architectures as timm creates them are tested for."""
    family, arguments = changed
    model = _create(family.name, arguments)
    x = _images(family, arguments)
    plain, keys, expected = model(x), list(model.state_dict()), literal_logits(model, family, x)(0.3, (math.inf, 2.0))
    timm_csra.wrap(model, lam=0)
    assert torch.equal(model(x), plain)
    model.csra.lam, model.csra.temperature = 0.3, (math.inf, 2.0)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert list(model.state_dict()) == keys
    maps = timm_csra.score_maps(model, x)
    explanation = timm_csra.explain(model, family.size)
    assert (explanation.kind, explanation.prefix_tokens) == (family.kind, family.prefix)
    assert explanation.grid == tuple(maps.shape[2:])
    assert explanation.num_classes == maps.shape[1] == model.num_classes
    assert torch.equal(timm_csra.unwrap(model)(x), plain)


@torch.no_grad()
def test_branches_of_wide_pictures() -> None:
    """Grids of 8 x 12, 4 x 6 and 2 x 3 locations, so that rows and columns cannot be confused."""
    model = _create("coat_tiny", {"img_size": (64, 96), "serial_depths": (1, 1, 1, 1), "parallel_depth": 1})
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    features = model.forward_features(x)
    assert [branch.shape[1] for branch in features] == [1 + 8 * 12, 1 + 4 * 6, 1 + 2 * 3]
    scores = []
    for row in range(8):
        for column in range(12):
            near = (row * 12 + column, row // 2 * 6 + column // 2, row // 4 * 3 + column // 4)
            constant = [b[:, 1 + at][:, None].expand_as(b) for b, at in zip(features, near, strict=True)]
            scores.append(model.forward_head(constant))
    expected = paper(model(x), torch.stack(scores, dim=1), 0.3, (math.inf, 2.0))
    maps = timm_csra.score_maps(model, x)
    torch.testing.assert_close(maps, torch.stack(scores, dim=2).unflatten(2, (8, 12)), rtol=1e-4, atol=1e-4)
    timm_csra.wrap(model, 0.3, (math.inf, 2.0))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


WIDE = [  # features, prefix tokens, arguments, and the grid of a picture of twice the width
    ("test_resnet", "NCHW", 0, {}, (3, 6)),
    ("test_mambaout", "NHWC", 0, {}, (3, 6)),
    ("test_vit", "NLC", 1, {"img_size": (96, 192)}, (6, 12)),
    ("test_vit", "NLC", 1, {"dynamic_img_size": True}, (6, 12)),
    ("coat_lite_tiny", "NLC", 1, {"img_size": (96, 192)}, (3, 6)),
    ("xcit_nano_12_p16_224", "NLC", 1, {"depth": 2}, (6, 12)),
    ("pit_ti_224", "NLC", 1, {"img_size": (96, 192)}, (3, 6)),
    ("volo_d1_224", "NLC", 1, {"img_size": (96, 192)}, (6, 12)),
    ("resnet50_clip", "NCHW", 0, {"img_size": (96, 192)}, (3, 6)),
]


@pytest.mark.parametrize(
    ("name", "features", "prefix", "arguments", "grid"),
    WIDE,
    ids=[f"{name}-{list(more)}" for name, _, _, more, _ in WIDE],
)
@torch.no_grad()
def test_maps_of_wide_pictures(
    name: str, features: str, prefix: int, arguments: dict[str, Any], grid: tuple[int, int]
) -> None:
    model = _create(name, arguments)
    if OLDER and name == "resnet50_clip":
        pytest.skip(f"timm {timm.__version__} takes its positions for a square: this did NOT run")
    x = torch.randn(1, 3, 96, 192, generator=torch.Generator().manual_seed(0))
    expected = literal_scores(model, Family(name, features, prefix, "", 0), spatial_features(model, x))
    maps = timm_csra.score_maps(model, x)
    torch.testing.assert_close(maps, expected.transpose(1, 2).unflatten(2, grid), rtol=1e-4, atol=1e-4)


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    try:
        return randomise(timm.create_model(name, **arguments)).eval()
    except (TypeError, AssertionError, RuntimeError) as error:
        if not OLDER:
            raise
        pytest.skip(f"timm {timm.__version__} does not create it: this did NOT run: {error}")


def _images(family: Family, arguments: dict[str, Any], count: int = 2) -> Tensor:
    return images(family, count)[:, : arguments.get("in_chans", 3)]


RESET = ["test_resnet", "test_convnext", "test_mambaout", "test_vit", "test_vit3", "levit_128s", "resnet50_clip"]
RESET += ["coat_tiny", "crossvit_tiny_240", "efficientvim_m1_dist", "pit_ti_distilled_224", "volo_d1_224"]
SIZES = {"levit_128s": 224, "resnet50_clip": 224, "crossvit_tiny_240": 240, "test_resnet": 96, "test_convnext": 96}
SIZES |= {"coat_tiny": 64, "volo_d1_224": 64}  # as `create` makes them


@pytest.mark.parametrize("name", RESET)
@torch.no_grad()
def test_reset_classifier_before_and_after_wrapping(name: str) -> None:
    size = SIZES.get(name, 160 if name.startswith("test_") else 224)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = create(name)
    before.reset_classifier(10)
    randomise(before).eval()
    after = timm_csra.wrap(create(name), lam=0.3)
    after(x)
    after.reset_classifier(10)
    after.eval()  # an older timm adds its classifier in training mode
    after.load_state_dict(before.state_dict())
    assert after(x).shape == (1, 10)
    timm_csra.wrap(before, lam=0.3)
    assert torch.equal(after(x), before(x))
    assert timm_csra.unwrap(after).num_classes == 10
    after.reset_classifier(0)
    with pytest.raises(UnsupportedModelError, match=f"{name}: found num_classes=0, no classifier"):
        timm_csra.wrap(after)


@torch.no_grad()
def test_reset_classifier_may_change_the_pooling_of_a_wrapped_model() -> None:
    model = timm_csra.wrap(create("test_resnet"), lam=0.3)
    model.reset_classifier(10, "catavgmax")
    family = Family("test_resnet", "NCHW", 0, "nonlinear", 96)
    logits = model(images(family))
    plain = timm_csra.unwrap(model)
    torch.testing.assert_close(logits, literal_logits(plain, family, images(family))(0.3, (math.inf,)))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_mambaout", "efficientvim_m1"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    size = SIZES.get(name, 160 if name.startswith("test_") else 224)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = timm_csra.wrap(create(name), lam=0.3)
        model.set_grad_checkpointing(checkpointing)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for without, with_ in zip(*gradients, strict=True):
        torch.testing.assert_close(with_, without, rtol=1e-4, atol=1e-4 * max(without.abs().max().item(), 1e-6))


@pytest.mark.parametrize(
    ("name", "size"), [("fastvit_t8", 128), ("repvit_m1", 96), ("levit_128s", 224), ("repghostnet_050", 96)]
)
@torch.no_grad()
def test_reparameterized_before_and_after_wrapping(name: str, size: int) -> None:
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = timm_csra.wrap(create(name), lam=0.3)
    expected = model(x)
    after = reparameterize_model(model)  # a copy
    assert timm_csra.is_wrapped(after) and len(after.state_dict()) < len(model.state_dict())
    before = timm_csra.wrap(reparameterize_model(timm_csra.unwrap(model)), lam=0.3)
    error = {"rtol": 1e-3, "atol": 1e-3 * expected.abs().max().item()}
    torch.testing.assert_close(after(x), expected, **error)
    torch.testing.assert_close(before(x), expected, **error)


@torch.no_grad()
def test_data_parallel_around_a_wrapped_model() -> None:
    model = timm_csra.wrap(create("test_resnet"), lam=0.3)
    x = images(Family("test_resnet", "NCHW", 0, "exact", 96))
    expected = model(x)
    parallel = nn.DataParallel(model)
    torch.testing.assert_close(parallel(x), expected)
    # What DataParallel makes for each GPU: a shallow copy of every module, with the tensors of that GPU.
    replica = model._replicate_for_data_parallel()
    assert timm_csra.is_wrapped(replica) and replica.csra is model.csra
    replica._modules = {name: copy.copy(module) for name, module in model._modules.items()}
    torch.testing.assert_close(replica(x), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2", "test_convnext", "coat_tiny", "resnet50_clip"])
@torch.no_grad()
def test_int8_weights_before_and_after_wrapping(name: str) -> None:
    if not hasattr(nn.functional, "ScalingType"):  # which torchao 0.18 wants
        pytest.skip(f"torch {torch.__version__} is too old for torchao: this test did NOT run")
    from torchao import quantization

    size = SIZES.get(name, 160)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = create(name)
    exact = timm_csra.wrap(copy.deepcopy(model), lam=0.3)
    expected = exact(x)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    quantization.quantize_(exact, quantization.Int8WeightOnlyConfig())
    plain = model(x)
    timm_csra.wrap(model, lam=0)
    assert torch.equal(model(x), plain)
    model.csra.lam = 0.3
    assert torch.equal(exact(x), model(x))
    assert not torch.equal(model(x), expected)  # int8 it is
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert timm_csra.explain(model, size).kind == timm_csra.explain(create(name), size).kind


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = create("test_resnet")

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x).sigmoid()


@torch.no_grad()
def test_inside_another_module() -> None:
    detector = Detector().eval()
    x = images(Family("test_resnet", "NCHW", 0, "exact", 96))
    state, plain = detector.state_dict(), detector(x)
    timm_csra.wrap(detector.backbone, lam=0.3)
    assert torch.equal(detector(x), timm_csra.wrap(create("test_resnet"), lam=0.3)(x).sigmoid())
    assert list(detector.state_dict()) == list(state)
    detector.load_state_dict(state)
    twin = copy.deepcopy(detector)
    timm_csra.unwrap(detector.backbone)
    assert torch.equal(detector(x), plain)
    assert timm_csra.is_wrapped(twin.backbone)


def test_the_plain_part_is_traced_symbolically() -> None:
    """As torchvision's feature extraction and quantisation by torch.fx do."""
    model = timm_csra.wrap(create("test_resnet"), lam=0)
    x = images(Family("test_resnet", "NCHW", 0, "exact", 96))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: torch.jit.script(timm_csra.wrap(create("test_resnet", scriptable=True))),
        "test_resnet: a wrapped model cannot be scripted by torch.jit.script .*torch.export.export.*or unwrap",
    ),
    (
        lambda: torch.fx.symbolic_trace(timm_csra.wrap(create("test_resnet"))),
        "test_resnet: torch.fx cannot trace a wrapped model: .*Use torch.export.export.*or set model.csra.lam = 0",
    ),
    (
        lambda: timm_csra.wrap(timm.create_model("test_vit", features_only=True)),
        "FeatureGetterNet is not a timm classifier: .*It contains one: wrap.model.model. instead",
    ),
    (
        lambda: timm_csra.wrap(timm.create_model("test_resnet", features_only=True)),
        "FeatureListNet is not a timm classifier",
    ),
]


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning", "ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("attempt", "text"), REFUSALS, ids=["scripted", "symbolic", "features_only", "features_only_list"]
)
def test_refused_with_the_reason(attempt: Callable[[], Any], text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        attempt()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning", "ignore:.torch.jit.trace:DeprecationWarning")
@torch.no_grad()
def test_traced() -> None:
    model = timm_csra.wrap(create("test_resnet", scriptable=True), lam=0.3)
    x = images(Family("test_resnet", "NCHW", 0, "exact", 96))
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
