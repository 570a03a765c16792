"""Find the locations in the output of `forward_features`, and build constant maps, in which all locations are equal.

`Map` and `Tokens` are all that most timm models need: pooling a constant map gives the constant, so a map of one
location is enough. The other classes are adapters for families whose head needs more; each docstring defines the
constant map of the family. `layout_of` chooses the layout.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import AttentionPool2d, resample_abs_pos_embed
from timm.models.coat import CoaT
from timm.models.crossvit import CrossVit
from timm.models.pit import PoolingVisionTransformer
from torch import Tensor, nn
from torch.fx import Proxy

from .errors import UnsupportedModelError, describe

# A head maps features to logits, or to a tuple of logits (distilled models in training).
Head = Callable[..., Tensor | tuple[Tensor, ...]]


def elements(logits: Any) -> tuple[Tensor, ...]:
    """Return the output of a head as a tuple."""
    return logits if isinstance(logits, tuple) else (logits,)


class Layout:
    """How the locations are arranged in the features.

    Attributes:
        format: the shape of the features in timm's notation, such as `NCHW`.
        prefix_tokens: number of tokens before the patch tokens; they are not locations.
        adapter: name of the adapter; None for the general rule.
    """

    format: str
    prefix_tokens: int = 0
    adapter: str | None = None

    def locations(self, features: Any) -> tuple[Tensor, ...]:
        """Return the features of every location: one tensor `(N, L, C)`, or one for each branch of the head."""
        raise NotImplementedError

    def constant_maps(self, *rows: Tensor, places: int = 1) -> Any:
        """Build M constant maps from rows `(M, C)` for each branch, in the shape that the head takes; prefix tokens are
        set to the location, too. A map has 1 or 4 locations (`places`), unless the layout needs more."""
        raise NotImplementedError

    def pre_logits(self, model: Any, head: Head, *rows: Tensor) -> Tensor:
        """Compute the input of the last layer for M constant maps, `(M, D)`."""
        return head(self.constant_maps(*rows), pre_logits=True)  # type: ignore[return-value]

    def classifier(self, model: Any) -> Any:
        """Return the last layer of the head, or its last layers."""
        return model.get_classifier() if hasattr(model, "get_classifier") else None

    def grid(self, model: Any, features: Any, input_size: tuple[int, int]) -> tuple[int, int] | None:
        """Return the numbers of rows and columns of locations, or None where these form no grid. The grid is that of
        the patch embedding; where it reports none, the L locations get the aspect ratio of the input `(H, W)`."""
        count = self.locations(features)[0].shape[1]
        embedding: Any = getattr(model, "patch_embed", None)
        if hasattr(embedding, "dynamic_feat_size"):
            rows, columns = embedding.dynamic_feat_size(input_size)
            if rows * columns == count:
                return rows, columns
        rows = max(1, round((count * input_size[0] / input_size[1]) ** 0.5))
        return (rows, count // rows) if count % rows == 0 else None


class Map(Layout):
    """A feature map `(N, C, H, W)` or `(N, H, W, C)`."""

    def __init__(self, format: str) -> None:
        self.format = format

    def locations(self, features: Tensor) -> tuple[Tensor, ...]:
        return (features.flatten(2).transpose(1, 2) if self.format == "NCHW" else features.flatten(1, 2),)

    def constant_maps(self, *rows: Tensor, places: int = 1) -> Tensor:
        (x,) = rows
        side = math.isqrt(places)
        if self.format == "NCHW":
            return x[:, :, None, None].expand(-1, -1, side, side)
        return x[:, None, None, :].expand(-1, side, side, -1)

    def grid(self, model: Any, features: Tensor, input_size: tuple[int, int]) -> tuple[int, int]:
        return tuple(features.shape[2:] if self.format == "NCHW" else features.shape[1:3])  # type: ignore


class Tokens(Layout):
    """Tokens `(N, P + L, C)`, the P prefix tokens first."""

    format = "NLC"

    def __init__(self, prefix_tokens: int, adapter: str | None = None) -> None:
        self.prefix_tokens = prefix_tokens
        self.adapter = adapter

    def locations(self, features: Tensor) -> tuple[Tensor, ...]:
        return (features[:, self.prefix_tokens :],)

    def constant_maps(self, *rows: Tensor, places: int = 1) -> Tensor:
        (x,) = rows
        return x[:, None, :].expand(-1, self.prefix_tokens + places, -1)


class AttentionPooledMap(Map):
    """A map pooled by `AttentionPool2d` (CLIP ResNets), whose position embedding gives each position another key and
    value.

    The constant map of location j has the full size: x_j at every position, and their mean, x_j, as the query. With
    positions p = 0 (the query) to L, embedding e_p, and q, k, v the affine projections of one attention head, the input
    of the last layer is

        w_p = softmax_p(q(x_j + e_0) . k(e_p) / sqrt(d))           k(x_j) is the same for every p and cancels
        y_j = v(x_j) + sum_p w_p * (v(e_p) - v(0))                 the weights sum to 1
    """

    adapter = "attention pool with positions"

    def __init__(self, features: Tensor) -> None:
        super().__init__("NCHW")
        self.size = features.shape[2:]

    def constant_maps(self, *rows: Tensor, places: int = 1) -> Tensor:
        (x,) = rows
        return x[:, :, None, None].expand(-1, -1, *self.size)

    def classifier(self, model: Any) -> Any:
        return model.head.proj  # get_classifier of older timm versions does not return it

    def pre_logits(self, model: Any, head: Head, *rows: Tensor) -> Tensor:
        pool, (x,) = model.head, rows
        embedding = resample_abs_pos_embed(
            pool.pos_embed.unsqueeze(0), list(self.size), old_size=list(pool.feat_size), num_prefix_tokens=1
        )[0]
        queries = _project(pool, "q", x + embedding[0]) * pool.scale
        keys = _project(pool, "k", embedding)
        values = _project(pool, "v", embedding) - _project(pool, "v", torch.zeros_like(embedding[:1]))
        weights = torch.einsum("mhd,phd->mhp", queries, keys).softmax(dim=-1)
        pooled = _project(pool, "v", x) + torch.einsum("mhp,phd->mhd", weights.to(values.dtype), values)
        return pool.drop(pooled.flatten(1))


def _project(pool: AttentionPool2d, part: str, x: Tensor) -> Tensor:
    """Compute queries, keys or values, `(M, attention heads, d)`, of `x`, `(M, C)`."""
    projected = getattr(pool, part)(x) if pool.qkv is None else pool.qkv(x).chunk(3, dim=-1)["qkv".index(part)]
    return projected.unflatten(-1, (pool.num_heads, pool.head_dim))


class Branches(Layout):
    """Several grids of tokens, each with a class token first (CoaT with parallel blocks, CrossViT).

    The locations are those of the finest grid. In the constant map of location j, all tokens of a branch, its class
    token included, equal the token of that branch that covers the centre of j.
    """

    prefix_tokens = 1
    adapter = "branches"

    def __init__(self, grids: Sequence[tuple[int, int]]) -> None:
        self.format = f"{len(grids)} x NLC"
        self.grids = grids
        self.finest = max(grids, key=lambda grid: grid[0] * grid[1])

    def locations(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            tokens[:, 1:][:, self._nearest(grid, tokens.device)]
            for tokens, grid in zip(features, self.grids, strict=True)
        )

    def constant_maps(self, *rows: Tensor, places: int = 1) -> list[Tensor]:
        return [x[:, None, :].expand(-1, 1 + places, -1) for x in rows]

    def grid(self, model: Any, features: Sequence[Tensor], input_size: tuple[int, int]) -> tuple[int, int]:
        return self.finest

    def _nearest(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return the indices of the tokens of `grid` that cover the centres of the finest grid's locations, `(L,)`."""
        rows, columns = (
            (2 * torch.arange(fine, device=device) + 1) * coarse // (2 * fine)
            for fine, coarse in zip(self.finest, grid, strict=True)
        )
        return (rows[:, None] * grid[1] + columns).flatten()


class MapWithStates(Layout):
    """Hidden states, then the final map `(N, C, L)`, each with a classifier of its own (EfficientViM).

    States belong to no location: they stay as they are, and the final map becomes constant. The head averages each
    state over its slots first, so the average can replace the state.
    """

    adapter = "map with states"

    def __init__(self, states: int) -> None:
        self.format = f"{states} states, NCL"

    def locations(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        *states, last = features
        averages = (state.mean(-1)[:, None, :].expand(-1, last.shape[2], -1) for state in states)
        return last.transpose(1, 2), *averages

    def constant_maps(self, *rows: Tensor, places: int = 1) -> list[Tensor]:
        x, *states = rows
        return [*(state[:, :, None] for state in states), x[:, :, None].expand(-1, -1, places)]


class PiTFeatures:
    """Adds the feature map to the output of PiT's `forward_features`, which returns the class tokens alone.

    Wrapped, it returns the class tokens followed by the last stage's map through the same norm, `(N, P + L, C)`: PiT's
    head uses the class tokens only, and the tokens of the map are the locations. In the constant map every class token
    equals token j. With lam = 0 it returns what PiT does.
    """

    def forward_features(self, x: Tensor) -> Tensor:
        if self.csra.lam == 0:  # type: ignore[attr-defined]
            return super().forward_features(x)  # type: ignore[misc]
        return _pit_features(self, x)


def _pit_features(model: Any, x: Tensor) -> Tensor:
    tokens, (last,) = model.forward_intermediates(x, indices=1)
    return torch.cat([tokens, model.norm(last.flatten(2).transpose(1, 2))], dim=1)


def overrides(plain: type) -> tuple[type, ...]:
    """Return the classes that override methods other than `forward_head` in the wrapped class of a family."""
    return (PiTFeatures,) if issubclass(plain, PoolingVisionTransformer) else ()


def spatial_features(model: nn.Module, x: Tensor) -> Any:
    """Run `forward_features` so that its output contains the locations, for a wrapped or plain model and any `lam`."""
    return _pit_features(model, x) if isinstance(model, PoolingVisionTransformer) else model.forward_features(x)  # type: ignore


def layout_of(model: nn.Module, features: Any) -> Layout:
    """Return the layout of `features`, the output of `model.forward_features`, by their type and shape and by the class
    of the model.

    Raises:
        UnsupportedModelError: the layout is unknown, or the features have no locations.
    """
    if isinstance(features, (list, tuple)) and all(isinstance(part, Tensor) for part in features):
        if isinstance(model, (CoaT, CrossVit)):
            return Branches(_branch_grids(model, features))
        if all(part.ndim == 3 for part in features) and len(getattr(model, "heads", ())) == len(features):
            return MapWithStates(len(features) - 1)
    if isinstance(features, Proxy):
        raise UnsupportedModelError(
            f"{describe(model)}: torch.fx cannot trace a wrapped model: timm_csra finds the locations by the shape of "
            "the features, and a proxy has no shape. Use torch.export.export, or trace the plain model: unwrap it, or "
            "set model.csra.lam = 0."
        )
    if not isinstance(features, Tensor):
        raise UnsupportedModelError(
            f"{describe(model)}: forward_features returned a {type(features).__name__}, expected one tensor "
            "(N, C, H, W), (N, H, W, C) or (N, L, C). timm_csra does not know this family of heads."
        )
    prefix = 0
    if features.ndim == 3:
        declared = getattr(model, "num_prefix_tokens", None)
        prefix = _class_tokens(model) if declared is None else int(declared)
        if features.shape[1] > prefix:
            return Tokens(prefix, _class_token_family(model) if declared is None and prefix else None)
    if features.ndim == 4:
        if isinstance(getattr(model, "head", None), AttentionPool2d):
            return AttentionPooledMap(features)
        output_fmt = getattr(model, "output_fmt", None)
        channels = getattr(model, "num_features", None)
        last = features.shape[1] != channels and features.shape[3] == channels
        return Map("NHWC" if output_fmt == "NHWC" or (output_fmt is None and last) else "NCHW")
    tokens = f" of which {prefix} are prefix tokens" if features.ndim == 3 else ""
    raise UnsupportedModelError(
        f"{describe(model)}: its features have no locations: forward_features returned "
        f"{tuple(features.shape)}{tokens}, expected (N, C, H, W), (N, H, W, C) or (N, L, C) with L >= 1 locations. "
        "Class-specific residual attention needs an unpooled feature map; use a model that returns one."
    )


def _class_tokens(model: nn.Module) -> int:
    """Count the class tokens of a model that has no `num_prefix_tokens` (CoaT-Lite, VOLO, PiT)."""
    tokens = [p.shape[1] for name, p in model.named_parameters(recurse=False) if name.startswith("cls_token")]
    return tokens[0] if tokens else 0


def _class_token_family(model: nn.Module) -> str:
    return "class tokens alone" if isinstance(model, PoolingVisionTransformer) else "undeclared class token"


def _branch_grids(model: Any, features: Sequence[Tensor]) -> list[tuple[int, int]]:
    if isinstance(model, CrossVit):
        embeds = list(model.patch_embed)
        return [(e.img_size[0] // e.patch_size[0], e.img_size[1] // e.patch_size[1]) for e in embeds]
    return [tuple(getattr(model, f"patch_embed{i}").grid_size) for i in (2, 3, 4)]
