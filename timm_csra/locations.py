"""From the last feature map to the class scores of every location, by one rule for every head.

The score of location j is what the model's own head says when every location looks like j (the constant map). The head
itself runs on N * L constant maps, with norms, hidden layers and activations applied as trained, and no table of
families is needed; `layouts.py` says how small such a map may be, and knows the families that need more than that.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import Attention
from .errors import UnsupportedModelError, describe
from .layouts import Head, Layout, layout_of

BUDGET = 2**18  # scores, or features, of one image that are in memory at a time


def location_attention(
    model: nn.Module, head: Head, features: Any, temperatures: Sequence[float], valid: Tensor | None = None
) -> tuple[list[Tensor], ...]:
    """The attention term of each temperature, in bounded memory: the scores of all locations are never held at once.

    Args:
        model: the model that `features` come from.
        head: its own `forward_head`.
        features: what `forward_features` returned.
        temperatures: the paper's T of each head.
        valid: which of the L locations are no padding, `(N, L)`; None for all.

    Returns:
        For each element of what `head` returns (one, or two in distilled training) a list of `(N, K)`, one for each
        temperature. `BUDGET` bounds the memory of inference; with gradients, autograd keeps what it needs beside it.

    Raises:
        UnsupportedModelError: see `location_scores`.
    """
    layout = layout_of(model, features)
    locations = layout.locations(features)
    count, channels = locations[0].shape[1:]
    size = max(1, BUDGET // max(cast(int, model.num_classes), channels))  # not of N: a compiled graph takes any batch
    found: tuple[Attention, ...] = ()
    for start in range(0, count, size):
        span = slice(start, start + size)
        scores = _scores(model, head, layout, tuple(branch[:, span] for branch in locations))
        here = tuple(Attention.of(part, temperatures, None if valid is None else valid[:, span]) for part in scores)
        found = tuple(a.merge(b, temperatures) for a, b in zip(found, here, strict=True)) if found else here
    return tuple(attention.terms(temperatures) for attention in found)


def location_scores(model: nn.Module, head: Head, features: Any) -> tuple[Tensor, ...]:
    """Class scores of every location by the rule, all at once.

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
    layout = layout_of(model, features)
    return _scores(model, head, layout, layout.locations(features))


def _scores(model: nn.Module, head: Head, layout: Layout, locations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with _without_side_effects(model), _pointwise(layout):
        scores = layout.scores(head, *(branch.flatten(0, 1) for branch in locations))
    elements = scores if isinstance(scores, tuple) else (scores,)
    for element in elements:
        if element.ndim != 2:
            raise UnsupportedModelError(
                f"{describe(model)}: its head returns {tuple(element.shape)}, expected logits (N, K). "
                "Create the model with pooling (global_pool='avg'), not with global_pool=''."
            )
    return tuple(element.unflatten(0, (-1, locations[0].shape[1])) for element in elements)


def _pointwise(layout: Layout) -> AbstractContextManager[Any]:
    """Where a head may convolve maps of one location; a compiler finds that out for itself."""
    return _Pointwise() if layout.format == "NCHW" and not torch.compiler.is_compiling() else nullcontext()


class _Pointwise(TorchFunctionMode):
    """A 1x1 convolution of a map of one location is a matrix product, and on a CPU three times faster as one."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.conv2d and not kwargs and len(args) == 7:  # as nn.Conv2d calls it
            x, weight, bias, _, padding, _, groups = args
            plain = groups == 1 and padding == (0, 0) and type(weight) is nn.Parameter  # not a quantised one
            if plain and x.shape[2:] == weight.shape[2:] == (1, 1):
                return F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]
        return func(*args, **(kwargs or {}))


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
