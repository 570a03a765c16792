"""From the last feature map to the class scores of every location, by one rule for every head.

The score of location j is what the model's own head says when every location looks like j (the constant map). The head
itself runs on N * L constant maps, with norms, hidden layers and activations applied as trained, and no table of
families is needed; `layouts.py` says how small such a map may be, and knows the families that need more than that.

Where a linear classifier comes last in the head, as it mostly does, its product is made for some classes at a time and
reduced over the locations at once: the same numbers, without ever holding the scores of all classes and locations.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Linear
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .attention import Attention
from .errors import UnsupportedModelError, describe
from .layouts import Head, Layout, layout_of

BUDGET = 2**18  # scores of one image that are in memory at a time, and features that a head works on
INPUTS = 2**20  # features of one image that its classifier gets at a time
# Scores of a batch that the classifier makes at a time: on a CPU what its cache holds (8 MB in float32), elsewhere what
# keeps the device busy.
PRODUCT, PRODUCT_OF_ACCELERATORS = 2**21, 2**24


def location_attention(
    model: nn.Module,
    head: Head,
    features: Any,
    terms: Sequence[float | tuple[str, float]],
    valid: Tensor | None = None,
) -> tuple[list[Tensor], ...]:
    """Stand-in: `(scores, T)` pairs, or temperatures alone as today's callers give them."""
    pairs = [term if isinstance(term, tuple) else ("logits", term) for term in terms]
    kinds = {kind for kind, _ in pairs}
    if kinds <= {"logits"}:
        return _logit_attention(model, head, features, [temperature for _, temperature in pairs], valid)

    def attention(scores: Tensor, kind: str, temperature: float) -> Tensor:
        if kind == "log_softmax":
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
        return Attention.of(scores, (temperature,), valid).terms((temperature,))[0]

    elements = location_scores(model, head, features)
    return tuple([attention(element, *pair) for pair in pairs] for element in elements)


def _logit_attention(
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
    classifier = _linear_classifier(model, layout)
    # Locations at a time, not a function of N: a compiled graph takes any batch.
    size = INPUTS // channels if classifier else BUDGET // max(cast(int, model.num_classes), channels)
    size = max(1, size)
    found: tuple[Attention, ...] = ()
    for start in range(0, count, size):
        span = slice(start, start + size)
        part = tuple(branch[:, span] for branch in locations)
        some = None if valid is None else valid[:, span]
        inputs = _classifier_inputs(model, head, layout, part, classifier) if classifier else None
        if classifier and inputs is not None:
            here: tuple[Attention, ...] = (_by_classes(classifier, inputs, temperatures, some),)
        else:
            here = tuple(Attention.of(x, temperatures, some) for x in _scores(model, head, layout, part))
        found = tuple(a.merge(b, temperatures) for a, b in zip(found, here, strict=True)) if found else here
    return tuple(attention.terms(temperatures) for attention in found)


def _by_classes(
    classifier: nn.Linear, inputs: Tensor, temperatures: Sequence[float], valid: Tensor | None
) -> Attention:
    """The attention of locations `(N, l, D)` as the classifier sees them, some classes at a time."""
    weight, bias, rows = classifier.weight, classifier.bias, inputs.flatten(0, 1)
    size = max(64, (PRODUCT if rows.device.type == "cpu" else PRODUCT_OF_ACCELERATORS) // max(1, len(rows)))

    def parts() -> Iterator[Attention]:
        for start in range(0, len(weight), size):
            span = slice(start, start + size)
            scores = product(rows, weight[span], None if bias is None else bias[span])
            yield Attention.of(scores.unflatten(0, inputs.shape[:2]), temperatures, valid)

    return next(parts()) if size >= len(weight) else Attention.of_classes(parts(), len(weight))


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear. In float32 on a CPU by oneDNN, as PyTorch does convolutions and what it compiles: its other library
    takes up to twice as long on some processors. That operator has no derivative, and no autocast."""
    exact = rows.dtype == weight.dtype == torch.float32 and rows.device.type == "cpu"
    tensors = (rows, weight) if bias is None else (rows, weight, bias)
    if not exact or torch.is_autocast_enabled("cpu") or _differentiated(tensors) or not _has_onednn():
        return F.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether a derivative may be asked for, in reverse mode, in forward mode, or by a transform of torch.func."""
    reverse = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    forward = any(unpack_dual(tensor).tangent is not None for tensor in tensors)
    return reverse or forward or torch._C._are_functorch_transforms_active()


def _has_onednn() -> bool:
    usable = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return bool(usable) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
    scores = _said(model, head, layout, locations)
    elements = scores if isinstance(scores, tuple) else (scores,)
    for element in elements:
        if element.ndim != 2:
            raise UnsupportedModelError(
                f"{describe(model)}: its head returns {tuple(element.shape)}, expected logits (N, K). "
                "Create the model with pooling (global_pool='avg'), not with global_pool=''."
            )
    return tuple(element.unflatten(0, (-1, locations[0].shape[1])) for element in elements)


def _said(model: nn.Module, head: Head, layout: Layout, locations: tuple[Tensor, ...]) -> Any:
    with _without_side_effects(model), _one_location(locations):
        return layout.scores(head, *(branch.flatten(0, 1) for branch in locations))


def _linear_classifier(model: Any, layout: Layout) -> nn.Linear | None:
    """The classifier whose product may be made in parts: a plain linear layer that nobody watches. Compilers and
    tracers see the whole head instead: how large a part is depends on N."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if recorded or layout.adapter is not None or not hasattr(model, "get_classifier"):
        return None
    classifier = model.get_classifier()
    plain = type(classifier) in (nn.Linear, Linear) and type(classifier.weight) is nn.Parameter  # not a quantised one
    return classifier if plain and not classifier._forward_hooks else None


def _classifier_inputs(
    model: nn.Module, head: Head, layout: Layout, locations: tuple[Tensor, ...], classifier: nn.Linear
) -> Tensor | None:
    """What the classifier gets of each location, `(N, l, D)`; None where the head does not end with it."""
    try:
        with _UpTo(classifier) as until:
            said = _said(model, head, layout, locations)
    except _GoesOn:
        return None
    if until.inputs is None or said is not until.nothing or until.inputs.ndim != 2:
        return None
    return until.inputs.unflatten(0, (-1, locations[0].shape[1]))


class _GoesOn(Exception):
    """The head does something after its classifier."""


class _UpTo(TorchFunctionMode):
    """Run a head without the product of its classifier, whose inputs are kept."""

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        self.weight = classifier.weight
        self.inputs: Tensor | None = None
        self.nothing = torch.empty(0)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.inputs is not None and any(leaf is self.nothing for leaf in tree_leaves((args, kwargs))):
            raise _GoesOn
        if func is F.linear and len(args) == 3 and args[1] is self.weight:
            if self.inputs is not None:
                raise _GoesOn
            self.inputs = args[0]
            return self.nothing
        return func(*args, **(kwargs or {}))


def _one_location(locations: tuple[Tensor, ...]) -> AbstractContextManager[Any]:
    """What is cheaper for maps of one location."""
    if torch.compiler.is_compiling():  # a compiler finds that out for itself
        return nullcontext()
    if torch.jit.is_tracing():  # whose graph must serve other strides too
        return _OneLocation(copied=False)
    return _OneLocation(all(min(x.shape[:2]) > 1 and x.stride(0) != x.shape[1] * x.stride(1) for x in locations))


class _OneLocation(TorchFunctionMode):
    """On a map of one location, a 1x1 convolution is a matrix product, on a CPU three times faster as one, and its mean
    is the map: the copy that pooling makes is left out where flattening (N, l) has made one (`copied`), so that what a
    head does in place cannot reach the features."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.copied = copied

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.conv2d and not kwargs and len(args) == 7:  # as nn.Conv2d calls it
            x, weight, bias, _, padding, _, groups = args
            plain = groups == 1 and padding == (0, 0) and type(weight) is nn.Parameter  # not a quantised one
            if plain and x.shape[2:] == weight.shape[2:] == (1, 1):
                return F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]
        if func is Tensor.mean and self.copied and len(args) == 2 and not (kwargs or {}).keys() - {"keepdim"}:
            x, dims = args
            if isinstance(dims, (tuple, list)) and all(x.shape[dim] == 1 for dim in dims):
                return x if kwargs and kwargs["keepdim"] else x.squeeze(dims)
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
