"""The formula: class-specific residual attention over per-location class scores.

Zhu & Wu, "Residual Attention: A Simple but Effective Method for Multi-Label Recognition", ICCV 2021
(arXiv 2108.02456), equations 1 to 5 and, for several heads, 6; without the weight normalisation of trained heads.

The scores of all locations need not be there at once: `Attention` is what a part of the locations says, and two parts
make one, exactly, whatever T is.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def class_attention(scores: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """What the most convinced locations say, class by class.

        att_c = sum_j softmax_j(T * s_c(j)) * s_c(j)        T = inf: max_j s_c(j)

    Args:
        scores: class scores s_c(j) of every location, `(N, L, K)`.
        temperature: the paper's T, positive or `inf`. The softmax runs over the L locations.
        valid: which locations there are, `(N, L)` booleans, at least one for each image; None for all. The others are
            padding and have no say.

    Returns:
        `(N, K)`, between the mean (T -> 0) and the maximum (T = inf) over locations, in the dtype of `scores`.

    Example:
        >>> class_attention(torch.tensor([[[1.0], [3.0]]]), math.inf)
        tensor([[3.]])
    """
    return Attention.of(scores, (temperature,), valid).terms((temperature,))[0]


class Attention(NamedTuple):
    """The attention of some of the locations, for one or several temperatures.

    With w_j = exp(T * (s_j - highest)), which no T can make overflow, and sums over these locations:

    Attributes:
        highest: max_j s_j, `(N, K)`, in the dtype of the scores.
        weights: for each finite T sum_j w_j, `(N, K)`, in float32 at least, as autocast does for a softmax.
        weighted: for each finite T sum_j w_j * (s_j - highest).
    """

    highest: Tensor
    weights: tuple[Tensor, ...]
    weighted: tuple[Tensor, ...]

    @classmethod
    def of(cls, scores: Tensor, temperatures: Sequence[float], valid: Tensor | None = None) -> "Attention":
        """Of the locations in `scores` `(N, l, K)`; see `class_attention`. `valid` may leave none of these."""
        if valid is not None:  # a finite score for padding, so that differences are finite too
            scores = scores.masked_fill(~valid.unsqueeze(-1), torch.finfo(scores.dtype).min)
        highest = scores.amax(dim=1)
        if not (finite := _finite(temperatures)):
            return cls(highest, (), ())
        wide = torch.promote_types(scores.dtype, torch.float32)
        below = scores.to(wide) - highest.to(wide).unsqueeze(1)
        w = [_exp(temperature, below) for temperature in finite]
        if valid is not None:
            w = [x.masked_fill(~valid.unsqueeze(-1), 0) for x in w]
        return cls(highest, tuple(x.sum(dim=1) for x in w), tuple((x * below).sum(dim=1) for x in w))

    @classmethod
    def of_classes(cls, parts: Iterable["Attention"], classes: int) -> "Attention":
        """Of all K classes, from that of the same locations for some classes each, in order. Each part is copied as it
        comes and let go: small results kept between large scores would leave memory in pieces."""
        start, whole = 0, None
        for part in parts:
            whole = part._empty(classes) if whole is None else whole
            span = slice(start, start + part.highest.shape[1])
            whole.highest[:, span] = part.highest
            for mine, theirs in zip(whole.weights + whole.weighted, part.weights + part.weighted, strict=True):
                mine[:, span] = theirs
            start = span.stop
        assert whole is not None and start == classes
        return whole

    def _empty(self, classes: int) -> "Attention":
        """As many tensors of these dtypes, for K classes."""

        def of(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(tensor.new_empty(len(tensor), classes) for tensor in tensors)

        return Attention(of([self.highest])[0], of(self.weights), of(self.weighted))

    def merge(self, other: "Attention", temperatures: Sequence[float]) -> "Attention":
        """Of the locations of both."""
        highest = torch.maximum(self.highest, other.highest)
        a, b = self._below(highest, temperatures), other._below(highest, temperatures)
        weights = tuple(x + y for x, y in zip(a.weights, b.weights, strict=True))
        return Attention(highest, weights, tuple(x + y for x, y in zip(a.weighted, b.weighted, strict=True)))

    def _below(self, highest: Tensor, temperatures: Sequence[float]) -> "Attention":
        """The same sums relative to a higher score."""
        weights, weighted = [], []
        for temperature, old, moment in zip(_finite(temperatures), self.weights, self.weighted, strict=True):
            drop = self.highest.to(old.dtype) - highest.to(old.dtype)
            scale = _exp(temperature, drop)
            weights.append(scale * old)
            weighted.append(scale * moment + weights[-1] * drop)
        return Attention(highest, tuple(weights), tuple(weighted))

    def terms(self, temperatures: Sequence[float]) -> list[Tensor]:
        """The attention term of each temperature, `(N, K)`, in the dtype of the scores."""
        parts = zip(self.weights, self.weighted, strict=True)
        softened = ((self.highest + weighted / weights).to(self.highest.dtype) for weights, weighted in parts)
        return [self.highest if math.isinf(temperature) else next(softened) for temperature in temperatures]


def _finite(temperatures: Sequence[float]) -> list[float]:
    return [temperature for temperature in temperatures if not math.isinf(temperature)]


def _exp(temperature: float, below: Tensor) -> Tensor:
    return (below * min(temperature, torch.finfo(below.dtype).max)).exp()


def add_attention(logits: Tensor, attention: Sequence[Tensor], lam: float) -> Tensor:
    """logit_c = base_c + lam * att_c.

    Args:
        logits: the model's own, `(N, K)`.
        attention: the attention term of each head, `(N, K)`; several are averaged, so that lam keeps its meaning.
        lam: their weight.

    Returns:
        `(N, K)` in the dtype of `logits`; under autocast the sum itself is made in float32.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    mean = attention[0] if len(attention) == 1 else torch.stack(list(attention)).mean(dim=0)
    return (logits.to(wide) + lam * mean.to(wide)).to(logits.dtype)
