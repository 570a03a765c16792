"""The formula: class-specific residual attention over per-location class scores.

Zhu & Wu, "Residual Attention: A Simple but Effective Method for Multi-Label Recognition", ICCV 2021
(arXiv 2108.02456), equations 1 to 5 and, for several heads, 6; without the weight normalisation of trained heads.
"""

import math
from collections.abc import Sequence

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
    present = scores if valid is None else scores.masked_fill(~valid.unsqueeze(-1), -math.inf)
    highest = present.amax(dim=1, keepdim=True)
    if math.isinf(temperature):
        return highest.squeeze(1)
    # The softmax does not change when the highest score is subtracted; a huge T then cannot overflow.
    # The product with T is in float32 at least, as autocast does for a softmax.
    shifted = (present - highest).to(torch.promote_types(scores.dtype, torch.float32))
    weights = (shifted * min(temperature, torch.finfo(shifted.dtype).max)).softmax(dim=1)
    return (weights * scores).sum(dim=1).to(scores.dtype)


def mean_class_attention(scores: Tensor, temperatures: Sequence[float], valid: Tensor | None = None) -> Tensor:
    """The attention terms of several heads, averaged so that lam keeps its meaning: `(N, L, K) -> (N, K)`."""
    return torch.stack([class_attention(scores, temperature, valid) for temperature in temperatures]).mean(dim=0)


def add_attention(
    logits: Tensor, scores: Tensor, lam: float, temperatures: Sequence[float], valid: Tensor | None = None
) -> Tensor:
    """logit_c = base_c + lam * att_c: the model's own `logits` `(N, K)` and `scores` `(N, L, K)` give `(N, K)`.

    The dtype is that of `logits`; under autocast the sum itself is made in float32.
    """
    attention = mean_class_attention(scores, temperatures, valid)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(wide) + lam * attention.to(wide)).to(logits.dtype)
