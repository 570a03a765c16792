"""The architectures that stand for the kinds of timm heads, with random weights, and a literal reference for them."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.models.pit import PoolingVisionTransformer
from torch import Tensor, nn


class Family(NamedTuple):
    name: str
    features: str  # layout of what forward_features returns
    prefix: int  # prefix tokens
    kind: str
    size: int  # pixels, the smallest that `create` takes with several locations


FAMILIES = [
    Family("test_resnet", "NCHW", 0, "exact", 96),
    Family("test_efficientnet", "NCHW", 0, "exact", 96),
    Family("test_byobnet", "NCHW", 0, "exact", 96),
    Family("test_nfnet", "NCHW", 0, "exact", 96),
    Family("test_convnext", "NCHW", 0, "nonlinear", 96),
    Family("test_mambaout", "NHWC", 0, "nonlinear", 96),
    Family("test_coatnet", "NCHW", 0, "exact", 160),
    Family("test_vit", "NLC", 1, "token", 160),
    Family("test_vit2", "NLC", 1, "nonlinear", 160),
    Family("test_vit3", "NLC", 1, "token", 160),
    Family("deit_tiny_distilled_patch16_224", "NLC", 2, "token", 224),
    Family("swin_tiny_patch4_window7_224", "NHWC", 0, "exact", 224),
    Family("resnetv2_18", "NCHW", 0, "exact", 96),
    Family("mobilenetv3_small_050", "NCHW", 0, "nonlinear", 96),
    Family("xcit_nano_12_p16_224", "NLC", 1, "token", 224),
    Family("levit_128s", "NLC", 0, "exact", 224),
    # Families whose head needs an adapter.
    Family("resnet50_clip", "NCHW", 0, "token", 96),
    Family("coat_lite_tiny", "NLC", 1, "token", 96),
    Family("coat_tiny", "branches", 1, "token", 64),
    Family("crossvit_tiny_240", "branches", 1, "token", 240),
    Family("efficientvim_m1", "states", 0, "exact", 224),
    Family("efficientvim_m1_dist", "states", 0, "exact", 224),
    Family("pit_ti_224", "NLC", 1, "token", 224),
    Family("pit_ti_distilled_224", "NLC", 2, "token", 224),
    Family("volo_d1_224", "NLC", 1, "nonlinear", 64),
]
# Fewer blocks and pixels than by default, which change nothing of the head but the number of locations;
# `benchmarks/test_kinds.py` takes the architectures as they are.
FEWER: dict[str, dict[str, Any]] = {
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1)},
    "xcit_nano_12_p16_224": {"depth": 2},
    "levit_128s": {"depth": (1, 1, 1)},
    "coat_lite_tiny": {"serial_depths": (1, 1, 1, 1), "img_size": 96},
    "coat_tiny": {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1, "img_size": 64},
    "crossvit_tiny_240": {"depth": ((1, 1, 0),)},
    "efficientvim_m1": {"depths": (1, 1, 1)},
    "efficientvim_m1_dist": {"depths": (1, 1, 1)},
    "volo_d1_224": {"img_size": 64},
}
# The tables of tests and docs are about timm 1.0.31; an older one lacks some architectures and arguments.
OLDER = tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31)
EXACT = [family for family in FAMILIES if family.kind == "exact" and family.features != "states"]  # one map


def randomise(model: nn.Module) -> nn.Module:
    """Give every constant tensor (heads that start at zero, norms, statistics) random values, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.numel() > 1 and (tensor == tensor.flatten()[0]).all():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
                tensor += (0.1 * noise).clamp(-0.5, 0.5).to(tensor.dtype)
    return model


@functools.cache
def _template(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs)).eval()


def create(name: str, **kwargs: object) -> nn.Module:
    """A fresh, randomised model in eval mode, with `FEWER` blocks; equal calls give equal weights. Skips what an older
    timm lacks."""
    if OLDER and not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} does not have {name}: this did NOT run")
    return copy.deepcopy(_template(name, **FEWER.get(name, {}) | kwargs))


def smaller(architecture: str, size: int) -> int:
    """Pixels that give a model of any size several locations, at a fraction of the cost of its own."""
    cfg = timm.get_pretrained_cfg(architecture)
    least = (cfg.min_input_size or (3, 128, 128))[-1]
    return size if cfg.fixed_input_size else min(size, max(128, least))


def images(family: Family, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, family.size, family.size, generator=torch.Generator().manual_seed(seed))


def spatial_features(model: nn.Module, x: Tensor) -> Any:
    """What `forward_features` of a plain model returns, with the locations in it."""
    if not isinstance(model, PoolingVisionTransformer):
        return model.forward_features(x)
    # The last stage returns its map and the class tokens; only the latter go on, through the norm.
    last: list[Tensor] = []
    with model.transformers[-1].register_forward_hook(lambda module, args, output: last.append(output[0])):
        tokens = model.forward_features(x)
    return torch.cat([tokens, model.norm(last[0].flatten(2).transpose(1, 2))], dim=1)


def constant_maps(model: nn.Module, family: Family, features: Any) -> Iterator[Any]:
    """By the definition: for each location, full-size features in which every location looks like it."""
    if family.features == "NCHW":
        for row in range(features.shape[2]):
            for column in range(features.shape[3]):
                constant = torch.empty_like(features)
                constant[:] = features[:, :, row, column][:, :, None, None]
                yield constant
    elif family.features == "NHWC":
        for row in range(features.shape[1]):
            for column in range(features.shape[2]):
                constant = torch.empty_like(features)
                constant[:] = features[:, row, column, :][:, None, None, :]
                yield constant
    elif family.features == "NLC":
        for token in range(family.prefix, features.shape[1]):
            constant = torch.empty_like(features)
            constant[:] = features[:, token][:, None, :]
            yield constant
    elif family.features == "branches":
        # Square grids behind one class token each; the finest has the locations, and of every branch the token whose
        # centre is nearest stands at all places of that branch, the class token's included.
        sides = [math.isqrt(branch.shape[1] - 1) for branch in features]
        finest = max(sides)
        for row in range(finest):
            for column in range(finest):
                constants = []
                for branch, side in zip(features, sides, strict=True):
                    distances = torch.tensor(
                        [[abs((i + 0.5) / side - (at + 0.5) / finest) for i in range(side)] for at in (row, column)]
                    )
                    near_row, near_column = distances.argmin(dim=1).tolist()
                    constant = torch.empty_like(branch)
                    constant[:] = branch[:, 1 + near_row * side + near_column][:, None, :]
                    constants.append(constant)
                yield constants
    else:
        # Hidden states first, which are no places; then the final map (N, C, L).
        *states, last = features
        for place in range(last.shape[2]):
            constant = torch.empty_like(last)
            constant[:] = last[:, :, place][:, :, None]
            yield [*states, constant]


def literal_scores(model: nn.Module, family: Family, features: Any) -> Tensor:
    """Scores `(N, L, K)` by the definition: one full-size constant map per location through the plain head."""
    return torch.stack([model.forward_head(constant) for constant in constant_maps(model, family, features)], dim=1)


def literal_logits(model: nn.Module, family: Family, x: Tensor) -> Callable[[float, tuple[float, ...]], Tensor]:
    """base_c + lam * att_c of lam and temperatures, by the definition, for a plain model."""
    features = spatial_features(model, x)
    return functools.partial(paper, model.forward_head(features), literal_scores(model, family, features))


def paper(base: Tensor, scores: Tensor, lam: float, temperatures: tuple[float, ...]) -> Tensor:
    """The formula, of logits `(N, K)` and scores `(N, L, K)`."""
    attention = torch.zeros_like(base)
    for temperature in temperatures:
        if temperature == float("inf"):
            attention += scores.max(dim=1).values
        else:
            weights = torch.exp(temperature * scores - torch.logsumexp(temperature * scores, dim=1, keepdim=True))
            attention += (weights * scores).sum(dim=1)
    return base + lam * attention / len(temperatures)
