"""NaFlexViT on patches with masks: padded patches are not locations."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_csra

from .families import randomise

POOLS = [
    ("naflexvit_base_patch16_gap", "avg"),
    ("naflexvit_base_patch16_gap", "max"),
    ("naflexvit_base_patch16_gap", "avgmax"),
    ("naflexvit_base_patch16_map", "map"),
    ("naflexvit_base_patch16_siglip", "map"),
]


def small(name: str, pool: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, global_pool=pool, embed_dim=96, depth=2, num_heads=3, num_classes=11)
    return randomise(model).eval()


def patches(image: Tensor, length: int | None = None) -> dict[str, Tensor]:
    """One image `(3, H, W)` as 16x16 patches, padded to `length` with garbage that has to be ignored."""
    rows, columns = image.shape[1] // 16, image.shape[2] // 16
    values = image.reshape(3, rows, 16, columns, 16).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    padding = (length or len(values)) - len(values)
    return {
        "patches": torch.cat([values, torch.full((padding, values.shape[1]), 7.0)])[None],
        "patch_coord": torch.cat([places, torch.zeros(padding, 2, dtype=places.dtype)])[None],
        "patch_valid": (torch.arange(len(values) + padding) < len(values))[None],
    }


def padded_batch(images: list[Tensor], length: int) -> dict[str, Tensor]:
    parts = [patches(image, length) for image in images]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(3, 16 * rows, 16 * columns, generator=generator) for rows, columns in ((4, 6), (3, 3), (5, 2))]


def literal(model: nn.Module, image: Tensor, lam: float, temperature: float) -> Tensor:
    """The formula for one unpadded image and a plain model, `(K,)`: a full-size constant map for every patch."""
    features = model.forward_features(**patches(image))["patches"]
    prefix = model.num_prefix_tokens
    scores = []
    for token in range(prefix, features.shape[1]):
        constant = torch.empty_like(features)
        constant[:] = features[:, token][:, None]
        scores.append(model.forward_head(constant)[0])
    stacked = torch.stack(scores)
    weights = torch.softmax(temperature * stacked, 0) if math.isfinite(temperature) else None
    attention = stacked.amax(0) if weights is None else (weights * stacked).sum(0)
    return model(patches(image))[0] + lam * attention


@pytest.mark.parametrize(("name", "pool"), POOLS)
@torch.no_grad()
def test_padding_has_no_say(name: str, pool: str, images: list[Tensor]) -> None:
    model = small(name, pool)
    batch = padded_batch(images, length=30)
    plain = model(batch)
    expected = {
        (lam, T): torch.stack([literal(model, image, lam, T) for image in images])
        for lam, T in ((0.1, math.inf), (1.0, 2.0))
    }
    timm_csra.wrap(model, lam=0)
    assert torch.equal(model(batch), plain)
    for (lam, temperature), logits in expected.items():
        model.csra.lam, model.csra.temperature = lam, temperature
        torch.testing.assert_close(model(batch), logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(batch), plain, atol=1e-3)
    timm_csra.unwrap(model)
    assert torch.equal(model(batch), plain)


@torch.no_grad()
def test_a_batch_without_padding_is_the_images_themselves(images: list[Tensor]) -> None:
    model = timm_csra.wrap(small(*POOLS[0]), lam=0.5)
    torch.testing.assert_close(model(patches(images[0])), model(images[0][None]), rtol=1e-4, atol=1e-4)


def test_gradients_ignore_padding(images: list[Tensor]) -> None:
    model = timm_csra.wrap(small(*POOLS[0]), lam=0.5, temperature=(1, math.inf))
    batch: dict[str, Any] = padded_batch(images, length=30)
    batch["patches"].requires_grad_()
    model(batch).sum().backward()
    gradient = batch["patches"].grad.abs().sum(-1)
    assert gradient.isfinite().all()
    assert (gradient[batch["patch_valid"]] > 0).all()
    assert (gradient[~batch["patch_valid"]] == 0).all()


def test_score_maps_needs_images(images: list[Tensor]) -> None:
    with pytest.raises(TypeError, match=r"naflexvit_base_patch16_gap: found a dict, expected images \(N, C, H, W\)"):
        timm_csra.score_maps(small(*POOLS[0]), patches(images[0]))
