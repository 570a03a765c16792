"""From the last feature map to the class scores of every location, by one rule for every head.

The score of location j is what the model's own head says when every location looks like j (the constant map). The head
itself runs on N * L constant maps, with norms, hidden layers and activations applied as trained, and no table of
families is needed; `layouts.py` says how small such a map may be, and knows the families that need more than that.

Where the head is its `pre_logits` followed by one linear layer (`heads.py` finds that out), the head runs up to that
layer. In eager mode the scores are made for some rows at a time and reduced over the locations at once: those of all
locations and classes are never held together.
"""

from __future__ import annotations  # the compiler of older versions of torch evaluates no generic ones

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .config import LOGITS
from .errors import UnsupportedModelError, describe
from .heads import is_recorded, on_whole_map, parts_of
from .layouts import Head, Layout, elements, layout_of

# Scores of a batch that are made at a time. On a CPU 32 MB in float32: products with fewer rows take longer, because
# each reads the weights of 21,841 classes again. Elsewhere what keeps the device busy.
SCORES, SCORES_OF_ACCELERATORS = 2**23, 2**24

Term = tuple[str, float]  # kind of scores, see CSRAConfig, and temperature


def location_attention(
    model: nn.Module, head: Head, features: Any, terms: Sequence[Term], valid: Tensor | None = None
) -> tuple[list[Tensor], ...]:
    """Compute attention terms, in eager inference without ever holding the scores of all locations.

    Args:
        model: the model that `features` come from.
        head: its own `forward_head`.
        features: what `forward_features` returned.
        terms: kind of scores and temperature of each term.
        valid: which of the L locations are none of padding, `(N, L)` booleans; None for all.

    Returns:
        For each element of what `head` returns (one, or two in distilled training) a list of `(N, K)`, one for each
        term, in the dtype of the logits; those of `log_softmax` in float32 at least.

    Raises:
        UnsupportedModelError: see `location_scores`.
    """
    layout = layout_of(model, features)
    locations = layout.locations(features)
    temperatures = {kind: [T for other, T in terms if other == kind] for kind, _ in terms}
    parts = parts_of(model, head, layout, locations)
    groups: list[list[list[Tensor]]] = []  # of images: for each element of the logits the terms
    with parts.evaluating(model):
        score, width = _by_head(model, head, layout), cast(int, model.num_classes)
        if parts.classifier is not None:
            score, width = _by_classifier(parts.classifier), len(parts.classifier.weight)
            if parts.instead:
                locations = layout.locations(on_whole_map(model, head, parts.instead, features))
            else:
                locations = (_rows(lambda *rows: layout.pre_logits(model, head, *rows), locations),)
        images, places = _spans(locations[0], width * (1 if set(temperatures) == {LOGITS} else 2))
        for some in images:
            whole: list[list[Attention]] = []
            for here in places:
                mask = None if valid is None else valid[some, here]
                part = _attention(score, tuple(branch[some, here] for branch in locations), temperatures, mask)
                whole = _merged(whole, part, temperatures) if whole else part
            groups.append([_in_order(terms, temperatures, element) for element in whole])
    return tuple(
        [torch.cat(of_groups) if len(of_groups) > 1 else of_groups[0] for of_groups in zip(*element, strict=True)]
        for element in zip(*groups, strict=True)
    )


def location_scores(model: nn.Module, head: Head, features: Any) -> tuple[Tensor, ...]:
    """Compute the logits of every location by the rule, all at once.

    Args:
        model: the model that `features` come from.
        head: its own `forward_head`.
        features: what `forward_features` returned.

    Returns:
        One `(N, L, K)` tensor for each element of what `head` returns: one, or two in distilled training.

    Raises:
        UnsupportedModelError: the features hold no location, the head returns no `(N, K)` logits, or its logits of a
            constant map depend on the size of the map.
    """
    layout = layout_of(model, features)
    locations = layout.locations(features)
    with parts_of(model, head, layout, locations).evaluating(model):
        return _rows(_by_head(model, head, layout), locations)


def _rows(function: Callable[..., Any], locations: tuple[Tensor, ...]) -> Any:
    """Apply a function of rows `(M, C)` to locations `(N, L, C)`: `(N, L, K)` for each `(M, K)` that it returns."""
    shape = locations[0].shape[:2]
    found = function(*(branch.flatten(0, 1) for branch in locations))
    return tuple(x.unflatten(0, shape) for x in found) if isinstance(found, tuple) else found.unflatten(0, shape)


def _by_head(model: nn.Module, head: Head, layout: Layout) -> Callable[..., tuple[Tensor, ...]]:
    """The rule: the whole head on constant maps."""

    def score(*rows: Tensor) -> tuple[Tensor, ...]:
        logits = elements(head(layout.constant_maps(*rows)))
        for element in logits:
            if element.ndim != 2:
                raise UnsupportedModelError(
                    f"{describe(model)}: its head returns {tuple(element.shape)}, expected logits (N, K). "
                    "Create the model with pooling (global_pool='avg'), not with global_pool=''."
                )
        return logits

    return score


def _by_classifier(classifier: nn.Linear | nn.Conv2d) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The last layer alone, on what `pre_logits` gave."""
    if isinstance(classifier, nn.Linear):
        return lambda rows: (classifier(rows),)
    if type(classifier) is nn.Conv2d and "forward" not in vars(classifier) and type(classifier.weight) is nn.Parameter:
        weight, bias = classifier.weight.flatten(1), classifier.bias
        return lambda rows: (F.linear(rows, weight, bias),)  # half the time of a convolution, on CPUs
    return lambda rows: (classifier(rows[:, :, None, None]).flatten(1),)  # quantised, or changed


def _spans(locations: Tensor, width: int) -> tuple[list[slice], list[slice]]:
    """Which images and which of their locations are scored at a time, if `width` numbers are made of each location. A
    recorded graph takes all at once: it has to serve other sizes than those of its inputs."""
    if is_recorded():
        return [slice(None)], [slice(None)]
    count, places, channels = locations.shape
    rows = max(1, (SCORES if locations.device.type == "cpu" else SCORES_OF_ACCELERATORS) // max(width, channels))
    return _even(count, max(1, rows // places)), _even(places, rows)


def _even(count: int, size: int) -> list[slice]:
    """Divide `count` into as few parts of at most `size` as there can be, of nearly equal length; one for none."""
    parts = max(1, -(-count // size))
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def as_kind(kind: str, logits: Tensor) -> Tensor:
    """Turn logits `(..., K)` into scores of a kind, see CSRAConfig; log-probabilities are in float32 at least."""
    if kind == LOGITS:
        return logits
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _attention(
    score: Callable[..., tuple[Tensor, ...]],
    locations: tuple[Tensor, ...],
    temperatures: dict[str, list[float]],
    valid: Tensor | None,
) -> list[list[Attention]]:
    """Score some locations of some images, and reduce them: for each element of the logits each kind of scores. In a
    function of its own, so that the scores are gone before others are made."""
    return [
        [Attention.of(as_kind(kind, scores), Ts, valid) for kind, Ts in temperatures.items()]
        for scores in _rows(score, locations)
    ]


def _merged(
    whole: list[list[Attention]], part: list[list[Attention]], temperatures: dict[str, list[float]]
) -> list[list[Attention]]:
    return [
        [a.merge(b, Ts) for a, b, Ts in zip(of_whole, of_part, temperatures.values(), strict=True)]
        for of_whole, of_part in zip(whole, part, strict=True)
    ]


def _in_order(
    terms: Sequence[Term], temperatures: dict[str, list[float]], attention: Sequence[Attention]
) -> list[Tensor]:
    """The attention of each kind of scores as one list, in the order of `terms`."""
    found = {
        (kind, T): term
        for (kind, Ts), of_kind in zip(temperatures.items(), attention, strict=True)
        for T, term in zip(Ts, of_kind.terms(Ts), strict=True)
    }
    return [found[term] for term in terms]
