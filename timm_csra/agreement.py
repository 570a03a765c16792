"""Choose lam without labels: the largest lam at which a model keeps its top class on pictures of one object each.

How large lam may be differs from head to head. On pictures of one object each, wrapping has little to gain, so a change
of the top class there is a sign of harm, and it can be detected without labels.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .attention import add_attention
from .config import CSRAConfig, validate_lam
from .errors import UnsupportedModelError, describe
from .inputs import as_weights, check_eval
from .layouts import overrides, spatial_features
from .locations import location_attention
from .patching import check_supported, plain_head, unwrap, wrap

Model = TypeVar("Model", bound=nn.Module)
LAMS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0)
FEW = 200  # pictures, below which `choose_lam` warns: 2 % of 200 pictures are only four
RESAMPLES = 2000


@dataclass(frozen=True)
class LamChoice:
    """Result of `choose_lam`; `str()` gives a readable summary.

    Attributes:
        lam: the largest lam that passes; 0, the plain model, where the smallest lam tried does not pass.
        agreement: for each lam tried, in ascending order, the share of pictures that keep their top class.
        required: the share that has to keep their top class.
        images: number of pictures.
        spread: the 2.5 % and 97.5 % quantiles of `lam` over bootstrap resamples of the pictures.
        temperature: the paper's T of each attention term.
        scores: the kind of scores, see `CSRAConfig`.
    """

    lam: float
    agreement: Mapping[float, float]
    required: float
    images: int
    spread: tuple[float, float]
    temperature: tuple[float, ...]
    scores: str

    def apply(self, model: Model) -> Model:
        """Wrap the model in place, with this lam, temperature and kind of scores."""
        return wrap(model, self.lam, self.temperature, self.scores)

    def __str__(self) -> str:
        share = f"{100 * self.required:g} % of pictures keep their top class"
        if self.lam:
            verdict = f"Use lam={self.lam:g}: at this lam, and at all smaller ones tried, at least {share}."
        else:
            verdict = (
                f"Use lam=0, the plain model: at lam={min(self.agreement):g}, the smallest tried, fewer than {share}."
            )
        temperatures = "+".join(f"{temperature:g}" for temperature in self.temperature)
        rows = "\n".join(f"    lam {lam:<5g} {100 * share:6.2f} %" for lam, share in self.agreement.items())
        return (
            f"{verdict}\n"
            f"  over resamples of the pictures  lam from {self.spread[0]:g} to {self.spread[1]:g} "
            f"(95 % of resamples, n = {self.images})\n"
            f"  pictures that keep their top class, T {temperatures}, scores {self.scores}\n{rows}"
        )


def choose_lam(
    model: nn.Module,
    loader: Iterable[Any],
    agreement: float = 0.98,
    lams: Iterable[float] | None = None,
    temperature: float | tuple[float, ...] = math.inf,
    scores: str = "log_softmax",
) -> LamChoice:
    """Find the largest lam at which a model keeps its top class on nearly all pictures; no labels are needed.

    A lam passes if at least `agreement * n` of the n pictures keep their top class, among all classes of the head. The
    choice is the largest lam that passes together with all smaller lams tried, because agreement need not fall at every
    step. Where several classes share the highest logit, frequent in bf16, a picture keeps its top class if one of them
    has the highest logit with lam, too. Logits are rounded as in the wrapped model. The model runs once on every
    picture.

    Args:
        model: a timm classifier in eval mode, plain or wrapped, on any device. It is not changed, and its own settings
            are not used.
        loader: yields batches of images `(N, C, H, W)`, floats of any precision, or tuples that begin with them. Give a
            few hundred pictures of one object each, of all kinds that the model was trained on, after the model's
            transform.
        agreement: the share of pictures that have to keep their top class, above 0 and at most 1.
        lams: the values to try, in any order; None for 0.05 to 8.
        temperature: the paper's T, or a tuple of several, whose attention terms are averaged.
        scores: `log_softmax`, for a classifier trained with softmax, or `logits`, for one with a sigmoid per class.

    Returns:
        A `LamChoice`; `apply(model)` wraps the model with it.

    Warns:
        UserWarning: there are fewer than 200 pictures, or the largest lam tried passes.

    Raises:
        UnsupportedModelError: the model cannot be wrapped, or its `forward` does not return what its `forward_head`
            returned.
        TypeError: a setting has the wrong type, or the loader does not yield images of floats.
        ValueError: a setting is out of range, `lams` has duplicates, the model is in training mode, there is no
            picture, or logits are NaN or +inf (-inf is legal: a masked class).

    Example:
        >>> import timm, torch, warnings
        >>> _ = torch.manual_seed(0)
        >>> model = timm.create_model('test_resnet').eval()
        >>> loader = [torch.randn(100, 3, 64, 64) for _ in range(2)]
        >>> choice = choose_lam(model, loader, lams=(0.1, 1e6))
        >>> choice.images, list(choice.agreement)
        (200, [0.1, 1000000.0])
    """
    check_supported(model)
    check_eval(model)
    tried, required = _validate_lams(LAMS if lams is None else lams), _validate_agreement(agreement)
    config = CSRAConfig(tried[-1], temperature, scores)
    parts = [_agrees(model, images, tried, config) for batch in loader if len(images := _images(model, batch))]
    if not parts:
        raise ValueError(
            f"{describe(model)}: the loader gave no picture; expected a few hundred. A generator can be used only once."
        )
    agrees = np.concatenate(parts)
    lam = float(_largest(agrees.sum(axis=0), len(agrees), tried, required))
    spread = _spread(agrees, tried, required)
    shares = dict(zip(tried, agrees.mean(axis=0).tolist(), strict=True))
    if len(agrees) < FEW:
        warnings.warn(
            f"{describe(model)}: found {len(agrees)} pictures, too few to choose lam reliably: over resamples of them "
            f"it goes from {spread[0]:g} to {spread[1]:g}. Use at least {FEW}.",
            stacklevel=2,
        )
    if lam == tried[-1]:
        warnings.warn(
            f"{describe(model)}: at lam={lam:g}, the largest tried, {100 * shares[lam]:.4g} % of pictures keep their "
            f"top class, so a larger lam may pass, too. Try larger ones, such as lams=({lam:g}, {2 * lam:g}, "
            f"{4 * lam:g}).",
            stacklevel=2,
        )
    return LamChoice(lam, shares, required, len(agrees), spread, config.temperatures, config.scores)


def _validate_lams(lams: Any) -> tuple[float, ...]:
    """Return `lams` in ascending order, validated."""
    if not isinstance(lams, Iterable) or isinstance(lams, str):
        raise TypeError(f"lams: found {lams!r}; expected several numbers, such as (0.1, 0.3, 1).")
    tried = tuple(sorted(map(validate_lam, lams)))
    if not tried or tried[0] <= 0 or len(set(tried)) < len(tried):
        shown = ", ".join(f"{lam:g}" for lam in tried) or "none"
        raise ValueError(
            f"lams: found {shown}; expected at least one value, all above 0 (the plain model agrees with itself) and "
            "no two equal."
        )
    return tried


def _validate_agreement(agreement: Any) -> float:
    if isinstance(agreement, bool) or not isinstance(agreement, Real):
        raise TypeError(f"agreement must be a real number, got {agreement!r} ({type(agreement).__name__}).")
    if not 0 < float(agreement) <= 1:  # also catches NaN
        raise ValueError(f"agreement must be a share above 0 and at most 1, such as 0.98, got {agreement!r}.")
    return float(agreement)


def _images(model: nn.Module, batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        inside = f" first in a {type(batch).__name__}" if images is not batch else ""
        raise TypeError(
            f"{describe(model)}: the loader gave {found}{inside}; expected images (N, C, H, W), or (images, anything). "
            "Use a DataLoader to make batches of single images; put a single tensor of images into a list."
        )
    return images


@torch.inference_mode()
def _agrees(model: nn.Module, images: Tensor, lams: tuple[float, ...], config: CSRAConfig) -> NDArray[np.bool_]:
    """Return which pictures keep their top class at each lam: `(N, lams)`."""
    logits, attention = _logits_and_attention(model, as_weights(model, images), config)
    _check_finite(model, logits, 0)
    top = _top(logits)
    kept = []
    for lam in lams:
        wrapped = add_attention(logits, attention, lam)
        _check_finite(model, wrapped, lam)
        kept.append((top & _top(wrapped)).any(dim=1))
    return torch.stack(kept, dim=1).cpu().numpy()


def _top(logits: Tensor) -> Tensor:
    """Return which classes have the highest logit, `(N, K)`: one, or several in a tie."""
    return logits == logits.amax(dim=1, keepdim=True)


def _check_finite(model: nn.Module, logits: Tensor, lam: float) -> None:
    if (logits.isnan() | logits.isposinf()).any():
        remedy = "Try smaller lams, or float32" if lam else "Check the images and the weights"
        raise ValueError(
            f"{describe(model)}: found NaN or +inf among the logits at lam={lam:g}, expected finite ones, or -inf for "
            f"a masked class. {remedy}."
        )


def _logits_and_attention(model: nn.Module, images: Tensor, config: CSRAConfig) -> tuple[Tensor, list[Tensor]]:
    """Compute the plain model's logits `(N, K)` and the attention term of each temperature in one call of its
    `forward`, because a subclass may do something there before the features, such as normalising the images.

    The call runs on a second object with the same parameters, buffers and modules, whose `forward_head` also scores
    the locations; the model itself is not changed.
    """
    plain = cast(Any, object.__new__(type(model)))
    plain.__dict__ = dict(model.__dict__, _compiled_call_impl=None)  # the function of model.compile() calls `model`
    unwrap(plain)
    head, terms = plain_head(plain), [(config.scores, temperature) for temperature in config.temperatures]
    seen: list[tuple[Tensor, list[Tensor]]] = []

    def forward_head(features: Any, *args: Any, **kwargs: Any) -> Any:
        # Locations first, as in a wrapped model, because a head may change the features in place.
        (attention,) = location_attention(model, plain_head(model), features, terms)
        seen.append((cast(Tensor, head(features, *args, **kwargs)), attention))  # a tuple only in distilled training
        return seen[-1][0]

    plain.forward_head = forward_head
    if overrides(type(plain)):  # the features of the plain class have no locations
        plain.forward_features = lambda x: spatial_features(model, x)
    said = plain(images)
    if len(seen) != 1 or (said is not seen[0][0] and not torch.equal(said, seen[0][0])):
        raise UnsupportedModelError(
            f"{describe(model)}: its forward does not return what one call of its forward_head returned, expected "
            "forward_head(forward_features(x)), as in timm's models. Undo what has replaced or changed forward."
        )
    return seen[0]


def _largest(counts: NDArray[np.intp], images: int, lams: tuple[float, ...], required: float) -> NDArray[np.float64]:
    """Return the largest lam that passes together with all smaller ones, or 0. `counts`, `(..., lams)`, are the numbers
    of pictures that keep their top class."""
    # In floats 0.07 * 100 is a little more than 7, which must not require an eighth picture.
    needed = max(1, math.ceil(round(required * images, 6)))
    passed = np.logical_and.accumulate(counts >= needed, axis=-1).sum(axis=-1)
    return np.array([0.0, *lams])[passed]


def _spread(agrees: NDArray[np.bool_], lams: tuple[float, ...], required: float) -> tuple[float, float]:
    """Compute quantiles of the chosen lam over bootstrap resamples. Pictures with equal rows are drawn together, so
    that the order of pictures does not matter and the time hardly depends on their number."""
    rows, counts = np.unique(agrees, axis=0, return_counts=True)
    shares, rng = counts / len(agrees), np.random.default_rng(0)
    resampled = [rng.multinomial(len(agrees), shares) @ rows for _ in range(RESAMPLES)]
    chosen = _largest(np.stack(resampled), len(agrees), lams, required)
    low, high = np.quantile(chosen, [0.025, 0.975], method="inverted_cdf")  # this method returns lams that were tried
    return float(low), float(high)
