"""The formula: class-specific residual attention over per-location class scores.

Zhu & Wu, "Residual Attention: A Simple but Effective Method for Multi-Label Recognition", ICCV 2021
(arXiv 2108.02456), equations 1 to 5 and, for several temperatures, 6; without the weight
normalisation of trained heads.

The scores of all locations need not be in memory at once: `Attention` holds the contribution of some of the locations,
and `merge` combines the contributions of two groups of locations exactly, for every T.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def class_attention(scores: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """Reduce the scores of all locations to one attention term for each class.

        att_c = sum_j softmax_j(T * s_c(j)) * s_c(j)        T = inf: max_j s_c(j)

    Args:
        scores: class scores s_c(j) of every location, `(N, L, K)`; `-inf` (a masked class) is legal.
        temperature: the paper's T, positive or `inf`. The softmax runs over the L locations.
        valid: mask of the locations that are not padding, `(N, L)` booleans, at least one True for each image; None for
            all.

    Returns:
        `(N, K)`, between the mean (T -> 0) and the maximum (T = inf) over locations, in the dtype of `scores`.

    Example:
        >>> class_attention(torch.tensor([[[1.0], [3.0]]]), math.inf)
        tensor([[3.]])
    """
    return Attention.of(scores, (temperature,), valid).terms((temperature,))[0]


class Attention(NamedTuple):
    """The contribution of some of the locations, for one or several temperatures.

    All sums are over these locations, with w_j = exp(T * (s_j - highest)), which cannot overflow for any T:

    Attributes:
        highest: max_j s_j, `(N, K)`, in the dtype of the scores.
        weights: sum_j w_j for each finite T, `(N, K)`, in float32 or wider, as autocast computes a softmax.
        weighted: sum_j w_j * (s_j - highest) for each finite T, `(N, K)`.
    """

    highest: Tensor
    weights: tuple[Tensor, ...]
    weighted: tuple[Tensor, ...]

    @classmethod
    def of(cls, scores: Tensor, temperatures: Sequence[float], valid: Tensor | None = None) -> "Attention":
        """Reduce the scores of some locations, `(N, l, K)`; see `class_attention`. `valid` may exclude all of them."""
        if valid is not None:
            scores = scores.masked_fill(~valid.unsqueeze(-1), -math.inf)
        highest = scores.amax(dim=1)
        if not (finite := _finite(temperatures)):
            return cls(highest, (), ())
        wide = torch.promote_types(scores.dtype, torch.float32)
        below = _difference(scores.to(wide), highest.to(wide).unsqueeze(1))
        w = [_exp(temperature, below) for temperature in finite]
        return cls(highest, tuple(x.sum(dim=1) for x in w), tuple((x * below).sum(dim=1) for x in w))

    def merge(self, other: "Attention", temperatures: Sequence[float]) -> "Attention":
        """Add the contribution of other locations of the same images."""
        highest = torch.maximum(self.highest, other.highest)
        a, b = self._relative_to(highest, temperatures), other._relative_to(highest, temperatures)
        weights = tuple(x + y for x, y in zip(a.weights, b.weights, strict=True))
        return Attention(highest, weights, tuple(x + y for x, y in zip(a.weighted, b.weighted, strict=True)))

    def _relative_to(self, highest: Tensor, temperatures: Sequence[float]) -> "Attention":
        """Express the same sums relative to a higher maximum."""
        weights, weighted = [], []
        for temperature, old, moment in zip(_finite(temperatures), self.weights, self.weighted, strict=True):
            drop = _difference(self.highest.to(old.dtype), highest.to(old.dtype))
            scale = _exp(temperature, drop)
            weights.append(scale * old)
            weighted.append(scale * moment + weights[-1] * drop)
        return Attention(highest, tuple(weights), tuple(weighted))

    def terms(self, temperatures: Sequence[float]) -> list[Tensor]:
        """Return the attention term of each temperature, `(N, K)`, in the dtype of the scores."""
        parts = zip(self.weights, self.weighted, strict=True)
        softened = ((self.highest + weighted / weights).to(self.highest.dtype) for weights, weighted in parts)
        return [self.highest if math.isinf(temperature) else next(softened) for temperature in temperatures]


def _finite(temperatures: Sequence[float]) -> list[float]:
    return [temperature for temperature in temperatures if not math.isinf(temperature)]


def _difference(scores: Tensor, highest: Tensor) -> Tensor:
    """Compute scores - highest, finite even where the scores are -inf: masked classes and padding then get the weight
    exp(-large) = 0, and a class that is masked at every location keeps its maximum, -inf."""
    return (scores - highest).nan_to_num(nan=0.0, neginf=torch.finfo(scores.dtype).min)


def _exp(temperature: float, below: Tensor) -> Tensor:
    return (below * min(temperature, torch.finfo(below.dtype).max)).exp()


def add_attention(logits: Tensor, attention: Sequence[Tensor], lam: float) -> Tensor:
    """Compute logit_c = base_c + lam * att_c.

    Args:
        logits: the plain model's logits, `(N, K)`.
        attention: the attention term of each temperature, `(N, K)`. Several terms are averaged, so that lam means the
            same for any number of temperatures.
        lam: weight of the attention term.

    Returns:
        `(N, K)` in the dtype of `logits`; the sum is computed in float32 or wider.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    mean = attention[0] if len(attention) == 1 else torch.stack(list(attention)).mean(dim=0)
    return (logits.to(wide) + lam * mean.to(wide)).to(logits.dtype)
