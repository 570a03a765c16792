"""From the last feature map to the class scores of every location, by one rule for every head.

The score of location j is what the model's own head says when every location looks like j. Pooling such a constant
map gives the constant, so a map of one location is enough: the head runs on `N * L` maps of size 1x1, with norms,
hidden layers and activations applied as trained, and no table of families is needed.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import UnsupportedModelError

# A head: features to logits, or to a tuple of logits (distilled models in training).
Head = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def describe(model: nn.Module) -> str:
    """How error texts call a model: its timm architecture, else its class."""
    cfg = getattr(model, "pretrained_cfg", None)
    return (cfg.get("architecture") if isinstance(cfg, dict) else None) or type(model).__name__


@dataclass(frozen=True)
class FeatureLayout:
    """Where the locations are in what `forward_features` returns: `(N, C, H, W)`, `(N, H, W, C)` or `(N, L, C)`."""

    format: str
    prefix_tokens: int = 0

    def locations(self, features: Tensor) -> Tensor:
        """The feature vectors of all locations, without prefix tokens: `(N, L, C)`."""
        if self.format == "NCHW":
            return features.flatten(2).transpose(1, 2)
        if self.format == "NHWC":
            return features.flatten(1, 2)
        return features[:, self.prefix_tokens :]

    def one_location_maps(self, locations: Tensor) -> Tensor:
        """`(M, C)` feature vectors as M maps of one location each; prefix tokens become that location too."""
        if self.format == "NCHW":
            return locations[:, :, None, None]
        if self.format == "NHWC":
            return locations[:, None, None, :]
        return locations[:, None, :].expand(-1, 1 + self.prefix_tokens, -1)

    def grid(self, features: Tensor, input_size: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of locations; for tokens, the grid of `L` cells with the input's `(H, W)` aspect."""
        if self.format == "NCHW":
            return features.shape[2], features.shape[3]
        if self.format == "NHWC":
            return features.shape[1], features.shape[2]
        count = features.shape[1] - self.prefix_tokens
        rows = max(1, round((count * input_size[0] / input_size[1]) ** 0.5))
        return (rows, count // rows) if count % rows == 0 else None


def feature_layout(model: nn.Module, features: Any) -> FeatureLayout:
    """Find the layout of `features`, which `model.forward_features` returned.

    Raises:
        UnsupportedModelError: `features` are no single tensor, or hold no location.
    """
    if not isinstance(features, Tensor):
        raise UnsupportedModelError(
            f"{describe(model)}: forward_features returned a {type(features).__name__}, expected one tensor "
            "(N, C, H, W), (N, H, W, C) or (N, L, C). timm_csra does not support this family of heads yet."
        )
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if features.ndim == 3 and features.shape[1] > prefix:
        return FeatureLayout("NLC", prefix)
    if features.ndim == 4:
        declared = getattr(model, "output_fmt", None)
        channels = getattr(model, "num_features", None)
        last = features.shape[3] == channels and features.shape[1] != channels
        return FeatureLayout("NHWC" if declared == "NHWC" or (declared is None and last) else "NCHW")
    tokens = f" of which {prefix} are prefix tokens" if features.ndim == 3 else ""
    raise UnsupportedModelError(
        f"{describe(model)}: no location is left in its features: forward_features returned "
        f"{tuple(features.shape)}{tokens}, expected (N, C, H, W), (N, H, W, C) or (N, L, C) with L >= 1 locations. "
        "Class-specific residual attention needs an unpooled feature map; use a model that keeps one."
    )


def location_scores(model: nn.Module, head: Head, features: Tensor) -> tuple[Tensor, ...]:
    """Class scores of every location by the rule.

    Args:
        model: the model that `features` come from.
        head: its own `forward_head`.
        features: what `forward_features` returned.

    Returns:
        One `(N, L, K)` tensor for each element of what `head` returns: one, or two in distilled training.

    Raises:
        UnsupportedModelError: the features hold no location, the head returns no `(N, K)` logits, or it holds a
            batch norm in training mode.
    """
    layout = feature_layout(model, features)
    locations = layout.locations(features)
    with _without_side_effects(model):
        scores = head(layout.one_location_maps(locations.flatten(0, 1)))
    elements = scores if isinstance(scores, tuple) else (scores,)
    for element in elements:
        if element.ndim != 2:
            raise UnsupportedModelError(
                f"{describe(model)}: its head returns {tuple(element.shape)}, expected logits (N, K). "
                "Create the model with pooling (global_pool='avg'), not with global_pool=''."
            )
    return tuple(element.unflatten(0, (-1, locations.shape[1])) for element in elements)


def _without_side_effects(model: nn.Module) -> AbstractContextManager[Any]:
    """Nothing in evaluation; in training, the guard against changing random state and buffers."""
    training = model.training or any(child.training for child in model.children())
    return _TrainingGuard(model) if training else nullcontext()


class _TrainingGuard(TorchFunctionMode):
    """Run a head in training mode as often as wanted: dropout becomes the identity, batch norm is refused."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.batch_norm:
            call = inspect.signature(F.batch_norm).bind(*args, **kwargs).arguments
            if call.get("training"):
                self._refuse(call.get("running_mean"))
        if func is F.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)

    def _refuse(self, running_mean: Tensor | None) -> None:
        for name, module in self.model.named_modules():
            if running_mean is not None and getattr(module, "running_mean", None) is running_mean:
                counter = getattr(module, "num_batches_tracked", None)
                if counter is not None:
                    counter.sub_(1)  # the module counted this call before it was refused
                raise UnsupportedModelError(
                    f"{describe(self.model)}: its head holds the batch norm `{name}` in training mode; scoring the "
                    f"locations would change its running statistics. Put it in eval before the forward pass: "
                    f"model.get_submodule({name!r}).eval(), or set model.csra.lam = 0 while training."
                )
        raise UnsupportedModelError(
            f"{describe(self.model)}: its head normalises by the statistics of the batch, which the other locations "
            "would change. Put the head in eval, or set model.csra.lam = 0 while training."
        )


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
