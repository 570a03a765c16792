"""Where the locations are in what `forward_features` returns, and how a map looks in which all of them are equal.

`Map` and `Tokens` are all that most timm models need: pooling a constant map gives the constant, so a map of one
location is enough. The other classes are the families whose head needs more, each with the definition of its constant
map. `layout_of` chooses.
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

# A head: features to logits, or to a tuple of logits (distilled models in training).
Head = Callable[..., Tensor | tuple[Tensor, ...]]


def elements(logits: Any) -> tuple[Tensor, ...]:
    """What a head returned, as a tuple."""
    return logits if isinstance(logits, tuple) else (logits,)


class Layout:
    """One way in which features hold locations.

    Attributes:
        format: the shape of the features, in timm's letters.
        prefix_tokens: tokens before the locations, which are no locations.
        adapter: the family that needs it; None for the general rule.
    """

    format: str
    prefix_tokens: int = 0
    adapter: str | None = None

    def locations(self, features: Any) -> tuple[Tensor, ...]:
        """Give what the head sees of each location: one `(N, L, C)`, or one for each of its branches."""
        raise NotImplementedError

    def constant_maps(self, *rows: Tensor, places: int = 1) -> Any:
        """Make M constant maps of `(M, C)` for each branch, in the shape that the head takes; prefix tokens become the
        location too. A map has 1 or 4 `places`, unless the layout needs more."""
        raise NotImplementedError

    def pre_logits(self, model: Any, head: Head, *rows: Tensor) -> Tensor:
        """Compute what the last layer gets of M constant maps, `(M, D)`."""
        return head(self.constant_maps(*rows), pre_logits=True)  # type: ignore[return-value]

    def classifier(self, model: Any) -> Any:
        """Find the last layer of the head, or layers."""
        return model.get_classifier() if hasattr(model, "get_classifier") else None

    def grid(self, model: Any, features: Any, input_size: tuple[int, int]) -> tuple[int, int] | None:
        """Find rows and columns of locations, None where they form none. Tokens lie as the patch embedding puts them;
        where it does not say so, on the grid of L cells with the input's `(H, W)` aspect."""
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
    """Tokens `(N, L, C)`, the prefix tokens first."""

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
    """A map that `AttentionPool2d` pools (CLIP ResNets): its embedding makes each position another key and value.

    The constant map of location j is the full one: x_j at every position, and their mean, x_j, as the query. With
    positions p = 0 (the query's) to L, embedding e_p, and q, k, v the affine projections of one attention head, the
    last layer gets

        w_p = softmax_p(q(x_j + e_0) . k(e_p) / sqrt(d))           k(x_j) adds the same to every p and cancels
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
        return model.head.proj  # older versions of timm do not find it themselves

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
    """Compute queries, keys or values of `(M, C)`: `(M, attention heads, d)`."""
    projected = getattr(pool, part)(x) if pool.qkv is None else pool.qkv(x).chunk(3, dim=-1)["qkv".index(part)]
    return projected.unflatten(-1, (pool.num_heads, pool.head_dim))


class Branches(Layout):
    """Several grids of tokens, each behind its class token (CoaT with parallel blocks, CrossViT).

    The locations are those of the finest grid. The constant map of location j has in every branch the one token that
    lies nearest to j's centre, as every token of that branch, its class token included.
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
        """For each location of the finest grid, which token of `grid` covers its centre: `(L,)`."""
        rows, columns = (
            (2 * torch.arange(fine, device=device) + 1) * coarse // (2 * fine)
            for fine, coarse in zip(self.finest, grid, strict=True)
        )
        return (rows[:, None] * grid[1] + columns).flatten()


class MapWithStates(Layout):
    """Hidden states, then the final map `(N, C, L)`, each with a classifier of its own (EfficientViM).

    States belong to no place and stay as they are; the final map becomes constant. The head averages each state over
    its slots first, so the average stands for the state.
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
    """PiT's `forward_features` drops the map and returns the class tokens alone.

    Wrapped, it returns the class tokens followed by the last stage's map through the same norm, `(N, L, C)`: PiT's
    head takes the first tokens, and the map is where the locations are. Under the constant map every class token
    becomes token j. With lam = 0 it returns what PiT does.
    """

    def forward_features(self, x: Tensor) -> Tensor:
        if self.csra.lam == 0:  # type: ignore[attr-defined]
            return super().forward_features(x)  # type: ignore[misc]
        return _pit_features(self, x)


def _pit_features(model: Any, x: Tensor) -> Tensor:
    tokens, (last,) = model.forward_intermediates(x, indices=1)
    return torch.cat([tokens, model.norm(last.flatten(2).transpose(1, 2))], dim=1)


def overrides(plain: type) -> tuple[type, ...]:
    """What the wrapped class of a family overrides beside `forward_head`."""
    return (PiTFeatures,) if issubclass(plain, PoolingVisionTransformer) else ()


def spatial_features(model: nn.Module, x: Tensor) -> Any:
    """`forward_features` with the locations in it, for a wrapped or plain model, whatever its `lam`."""
    return _pit_features(model, x) if isinstance(model, PoolingVisionTransformer) else model.forward_features(x)  # type: ignore


def layout_of(model: nn.Module, features: Any) -> Layout:
    """The layout of `features`, which `model.forward_features` returned: by what they are, then by the class.

    Raises:
        UnsupportedModelError: they are nothing that is known, or hold no location.
    """
    if isinstance(features, (list, tuple)) and all(isinstance(part, Tensor) for part in features):
        if isinstance(model, (CoaT, CrossVit)):
            return Branches(_branch_grids(model, features))
        if all(part.ndim == 3 for part in features) and len(getattr(model, "heads", ())) == len(features):
            return MapWithStates(len(features) - 1)
    if isinstance(features, Proxy):
        raise UnsupportedModelError(
            f"{describe(model)}: torch.fx cannot trace a wrapped model: its locations are found by the shape of the "
            "features, and a proxy has none. Use torch.export.export, or trace the plain model: unwrap it, or set "
            "model.csra.lam = 0."
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
        f"{describe(model)}: no location is left in its features: forward_features returned "
        f"{tuple(features.shape)}{tokens}, expected (N, C, H, W), (N, H, W, C) or (N, L, C) with L >= 1 locations. "
        "Class-specific residual attention needs an unpooled feature map; use a model that keeps one."
    )


def _class_tokens(model: nn.Module) -> int:
    """How many class tokens a model has that counts none in `num_prefix_tokens` (CoaT-Lite, VOLO, PiT)."""
    tokens = [p.shape[1] for name, p in model.named_parameters(recurse=False) if name.startswith("cls_token")]
    return tokens[0] if tokens else 0


def _class_token_family(model: nn.Module) -> str:
    return "class tokens alone" if isinstance(model, PoolingVisionTransformer) else "undeclared class token"


def _branch_grids(model: Any, features: Sequence[Tensor]) -> list[tuple[int, int]]:
    if isinstance(model, CrossVit):
        embeds = list(model.patch_embed)
        return [(e.img_size[0] // e.patch_size[0], e.img_size[1] // e.patch_size[1]) for e in embeds]
    return [tuple(getattr(model, f"patch_embed{i}").grid_size) for i in (2, 3, 4)]
