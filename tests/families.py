"""The architectures that stand for the kinds of timm heads, with random weights, and a literal reference for them."""

import functools
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn


class Family(NamedTuple):
    name: str
    features: str  # layout of what forward_features returns
    prefix: int  # prefix tokens
    kind: str
    size: int  # pixels, the smallest that the architecture takes with several locations


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
]
EXACT = [family for family in FAMILIES if family.kind == "exact"]


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
    """A fresh, randomised model in eval mode; equal calls give equal weights."""
    template = _template(name, **kwargs)
    model = timm.create_model(name, **kwargs).eval()
    model.load_state_dict(template.state_dict())
    return model


def images(family: Family, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, family.size, family.size, generator=torch.Generator().manual_seed(seed))


def literal_scores(model: nn.Module, family: Family, features: Tensor) -> Tensor:
    """Scores `(N, L, K)` by the definition: one full-size constant map per location through the plain head."""
    scores = []
    if family.features == "NCHW":
        for row in range(features.shape[2]):
            for column in range(features.shape[3]):
                constant = torch.empty_like(features)
                constant[:] = features[:, :, row, column][:, :, None, None]
                scores.append(model.forward_head(constant))
    elif family.features == "NHWC":
        for row in range(features.shape[1]):
            for column in range(features.shape[2]):
                constant = torch.empty_like(features)
                constant[:] = features[:, row, column, :][:, None, None, :]
                scores.append(model.forward_head(constant))
    else:
        for token in range(family.prefix, features.shape[1]):
            constant = torch.empty_like(features)
            constant[:] = features[:, token][:, None, :]
            scores.append(model.forward_head(constant))
    return torch.stack(scores, dim=1)


def literal_logits(model: nn.Module, family: Family, x: Tensor, lam: float, temperatures: tuple[float, ...]) -> Tensor:
    """base_c + lam * att_c, by the definition, for a plain model."""
    features = model.forward_features(x)
    scores = literal_scores(model, family, features)
    attention = torch.zeros_like(scores[:, 0])
    for temperature in temperatures:
        if temperature == float("inf"):
            attention += scores.max(dim=1).values
        else:
            weights = torch.exp(temperature * scores - torch.logsumexp(temperature * scores, dim=1, keepdim=True))
            attention += (weights * scores).sum(dim=1)
    return model.forward_head(features) + lam * attention / len(temperatures)
