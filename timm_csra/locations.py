"""From the last feature map to the class scores of every location, by one rule for every head.

The score of location j is the model's own logit for a constant map: a feature map in which every location equals
location j. The head runs on N * L constant maps, with its norms, hidden layers and activations as trained, so no table
of families is needed. `layouts.py` decides how small a constant map may be, and has adapters for the families whose
head needs more than one location.

Where the head is `pre_logits` followed by one linear layer (`heads.py` checks that), the head runs up to that layer,
and the layer is applied to each location. In eager mode some rows are scored at a time and reduced over locations
immediately, so the scores of all locations and classes are never in memory together.
"""

from __future__ import annotations  # torch.compile in older torch versions cannot evaluate generic annotations

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

# How many scores are computed at a time. On a CPU 32 MB in float32: products with fewer rows are slower, because each
# product reads the weights of all classes (up to 21,841) again. An accelerator needs more to be busy.
SCORES, SCORES_OF_ACCELERATORS = 2**23, 2**24

Term = tuple[str, float]  # kind of scores (see CSRAConfig) and temperature


def location_attention(
    model: nn.Module, head: Head, features: Any, terms: Sequence[Term], valid: Tensor | None = None
) -> tuple[list[Tensor], ...]:
    """Compute attention terms; in eager inference, without holding the scores of all locations in memory.

    Args:
        model: the model that `features` come from.
        head: the model's own `forward_head`.
        features: the output of `forward_features`.
        terms: kind of scores and temperature of each term.
        valid: mask of the locations that are not padding, `(N, L)` booleans; None for all.

    Returns:
        For each output of `head` (one, or two in distilled training) a list of tensors `(N, K)`, one for each term, in
        the dtype of the logits; terms of `log_softmax` are in float32 or wider.

    Raises:
        UnsupportedModelError: see `location_scores`.
    """
    layout = layout_of(model, features)
    locations = layout.locations(features)
    temperatures = {kind: [T for other, T in terms if other == kind] for kind, _ in terms}
    parts = parts_of(model, head, layout, locations)
    groups: list[list[list[Tensor]]] = []  # for each group of images, for each output of the head: the terms
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
    """Compute the logits of every location with the whole head on constant maps, all locations at once.

    Args:
        model: the model that `features` come from.
        head: the model's own `forward_head`.
        features: the output of `forward_features`.

    Returns:
        One `(N, L, K)` tensor for each output of `head`: one, or two in distilled training.

    Raises:
        UnsupportedModelError: the features have no locations, the head does not return logits `(N, K)`, or its logits
            for a constant map depend on the size of the map.
    """
    layout = layout_of(model, features)
    locations = layout.locations(features)
    with parts_of(model, head, layout, locations).evaluating(model):
        return _rows(_by_head(model, head, layout), locations)


def _rows(function: Callable[..., Any], locations: tuple[Tensor, ...]) -> Any:
    """Apply a function of rows `(M, C)` to locations `(N, L, C)`; return `(N, L, K)` for each `(M, K)` it returns."""
    shape = locations[0].shape[:2]
    found = function(*(branch.flatten(0, 1) for branch in locations))
    return tuple(x.unflatten(0, shape) for x in found) if isinstance(found, tuple) else found.unflatten(0, shape)


def _by_head(model: nn.Module, head: Head, layout: Layout) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that scores rows `(M, C)` by running the whole head on constant maps."""

    def score(*rows: Tensor) -> tuple[Tensor, ...]:
        logits = elements(head(layout.constant_maps(*rows)))
        for element in logits:
            if element.ndim != 2:
                raise UnsupportedModelError(
                    f"{describe(model)}: its head returned {tuple(element.shape)}, expected logits (N, K). "
                    "Create the model with pooling (global_pool='avg'), not with global_pool=''."
                )
        return logits

    return score


def _by_classifier(classifier: nn.Linear | nn.Conv2d) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function that applies the last layer alone to rows of `pre_logits`, `(M, D)`."""
    if isinstance(classifier, nn.Linear):
        return lambda rows: (classifier(rows),)
    if type(classifier) is nn.Conv2d and "forward" not in vars(classifier) and type(classifier.weight) is nn.Parameter:
        weight, bias = classifier.weight.flatten(1), classifier.bias
        return lambda rows: (F.linear(rows, weight, bias),)  # takes half the time of the convolution on CPUs
    return lambda rows: (classifier(rows[:, :, None, None]).flatten(1),)  # quantised, or its forward was replaced


def _spans(locations: Tensor, width: int) -> tuple[list[slice], list[slice]]:
    """Divide images and locations into the slices that are scored at a time, for `width` scores per location. A
    recorded graph scores everything at once, because it has to work for other input sizes, too."""
    if is_recorded():
        return [slice(None)], [slice(None)]
    count, places, channels = locations.shape
    rows = max(1, (SCORES if locations.device.type == "cpu" else SCORES_OF_ACCELERATORS) // max(width, channels))
    return _even(count, max(1, rows // places)), _even(places, rows)


def _even(count: int, size: int) -> list[slice]:
    """Divide `count` items into as few slices of at most `size` as possible, of nearly equal length; at least one."""
    parts = max(1, -(-count // size))
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def as_kind(kind: str, logits: Tensor) -> Tensor:
    """Turn logits `(..., K)` into a kind of scores, see CSRAConfig; log-probabilities are in float32 or wider."""
    if kind == LOGITS:
        return logits
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _attention(
    score: Callable[..., tuple[Tensor, ...]],
    locations: tuple[Tensor, ...],
    temperatures: dict[str, list[float]],
    valid: Tensor | None,
) -> list[list[Attention]]:
    """Score some locations of some images and reduce them: for each output of the head, for each kind of scores.

    A separate function, so that these scores are freed before the next ones are computed."""
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
    """Return the attention terms of all kinds of scores in one list, in the order of `terms`."""
    found = {
        (kind, T): term
        for (kind, Ts), of_kind in zip(temperatures.items(), attention, strict=True)
        for T, term in zip(Ts, of_kind.terms(Ts), strict=True)
    }
    return [found[term] for term in terms]
