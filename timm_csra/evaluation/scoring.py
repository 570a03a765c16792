"""Score images once for all settings: the plain logits and the attention terms do not depend on lam."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..accelerators import on_accelerator, to_cpu
from ..attention import add_attention
from ..config import LOG_SOFTMAX, LOGITS, CSRAConfig
from ..errors import describe
from ..inputs import check_eval
from ..inspection import Explanation
from ..layouts import Head, layout_of, spatial_features
from ..locations import location_attention
from ..patching import check_supported, is_wrapped, plain_head

Term = tuple[str, float]  # kind of scores and temperature of an attention term


class Setting(NamedTuple):
    """One choice of lam, temperatures and kind of scores; see `CSRAConfig`."""

    lam: float
    temperature: tuple[float, ...]
    scores: str = LOGITS

    @property
    def terms(self) -> list[Term]:
        """Kind of scores and temperature of each attention term."""
        return [(self.scores, temperature) for temperature in self.temperature]


ALL = slice(None)  # all images, or all classes
PLAIN = Setting(0.0, (math.inf,))  # with lam = 0 neither temperature nor scores have an effect
DEFAULT = Setting(0.1, (math.inf,))  # the paper's setting
DEFAULT_LOG_SOFTMAX = Setting(0.3, (math.inf,), LOG_SOFTMAX)


def settings_grid(
    lams: Iterable[float],
    temperatures: Iterable[float | tuple[float, ...]],
    scores: Iterable[str] = (LOGITS,),
    also: Iterable[Setting] = (),
) -> list[Setting]:
    """List all combinations and the settings in `also`, validated and without duplicates; `PLAIN` always comes first.

    Example:
        >>> settings_grid([0.2], [1, math.inf])
        [Setting(lam=0.0, temperature=(inf,), scores='logits'), Setting(lam=0.2, temperature=(1.0,), scores='logits'), \
Setting(lam=0.2, temperature=(inf,), scores='logits')]
    """
    configs = [CSRAConfig(*asked) for asked in [*itertools.product(lams, temperatures, scores), *also]]
    grid = {Setting(config.lam, config.temperatures, config.scores) for config in configs if config.lam > 0}
    return [PLAIN, *sorted(grid)]


@dataclass(frozen=True)
class Scores:
    """The model's own logits and its attention terms, on the CPU in float32.

    Attributes:
        base: the plain model's logits, `(n, K)`.
        attention: the attention term of each kind of scores and temperature, `(n, K)`.
        dtype: dtype of the model's logits. The logits of a setting are rounded to it, as in a wrapped model: otherwise
            bf16 would cause ties in the plain logits alone, and these would change the ranks.
        pooled: logits of other ways to use the plain model, by name, `(n, K)` each.
    """

    base: Tensor
    attention: dict[Term, Tensor]
    dtype: torch.dtype = torch.float32
    pooled: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory of the logits in bytes."""
        return sum(logits.nbytes for logits in (self.base, *self.attention.values(), *self.pooled.values()))

    def logits(self, setting: Setting, images: slice = ALL, classes: slice = ALL) -> Tensor:
        """Compute the logits of a model wrapped with `setting`, base + lam * mean of the attention terms: `(n, K)`, or
        a part of them."""
        base = self.base[images, classes]
        if setting.lam == 0:
            return base
        heads = torch.stack([self.attention[term][images, classes] for term in setting.terms])
        return (base + setting.lam * heads.mean(dim=0)).to(self.dtype).float()


def score(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    settings: Sequence[Setting],
    *,
    columns: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
    test_time_pool: bool = False,
) -> tuple[Scores, Tensor]:
    """Run the model once on every image, and keep the plain logits and all attention terms that `settings` need.

    Args:
        model: a timm classifier in eval mode, plain or wrapped (its own settings are not used), on `device`.
        batches: `(images (N, C, H, W), targets (N, ...))`. They are not iterated in inference mode, so that a data set
            may keep its tensors and train on them afterwards.
        settings: the settings whose temperatures and scores are needed.
        columns: indices of the classes to keep, in order; None for all K. Log-probabilities are over all K classes.
        device: the device of `model`.
        amp_dtype: dtype for autocast, or None.
        test_time_pool: also pool as timm's `TestTimePoolHead` does, see `allows_test_time_pool`.

    Returns:
        The scores and the targets of all images, in order, on the CPU.

    Raises:
        ValueError: the model is in training mode, there is no image, logits are not finite (except -inf for classes
            that the plain logits mask), or `forward` returns other logits than the head on the features (checked on a
            few images).
        UnsupportedModelError: the model's locations cannot be scored.
    """
    check_supported(model)
    check_eval(model)
    asked = sorted({term for setting in settings for term in setting.terms})
    autocast = torch.autocast(torch.device(device).type, amp_dtype) if amp_dtype else nullcontext()
    head = plain_head(model)
    kept: list[list[Tensor]] = []
    targets: list[Tensor] = []
    coming: deque[Callable[[], Tensor]] = deque()
    chosen = None if columns is None else torch.as_tensor(columns, device=device)
    accelerated, largest = on_accelerator(device), 0

    def keep(logits: Tensor) -> None:
        if not (logits.isfinite() | (logits.isneginf() & logits[0].isneginf())).all():
            raise ValueError(
                f"{describe(model)}: found NaN or infinite logits; expected finite ones, or -inf for a class that the "
                "plain logits mask too."
            )
        kept.append(list(logits))

    for images, target in batches:
        count, first = len(images), not targets
        images = images.to(device, non_blocking=True)
        if accelerated:  # a smaller last batch is padded: selecting kernels for another batch size can take seconds
            largest = max(largest, count)
            if count < largest:
                images = F.pad(images, (0, 0) * (images.ndim - 1) + (0, largest - count))
        with torch.inference_mode(), autocast:
            features = spatial_features(model, images)
            base = cast(Tensor, head(features))  # a tuple only in distilled training
            (attention,) = location_attention(model, head, features, asked)
            terms = [base, *attention, *([_test_time_pool(model, head, features)] if test_time_pool else [])]
            if first:
                _check_forward(model, images if accelerated else images[:CHECKED])
        logits = torch.stack([term[:count].float() for term in terms])
        coming.append(to_cpu(logits if chosen is None else logits[..., chosen]))
        targets.append(target.cpu())
        if len(coming) > 1:  # the previous batch is checked while the device works on this one
            keep(coming.popleft()())
    for last in coming:
        keep(last())
    if not kept:
        raise ValueError(
            f"{describe(model)}: found no image to score, expected at least one. A generator can be used only once."
        )
    plain, *rest = (torch.cat(parts) for parts in zip(*kept, strict=True))
    pooled = {"test_time_pool": rest.pop()} if test_time_pool else {}
    return Scores(plain, dict(zip(asked, rest, strict=True)), base.dtype, pooled), torch.cat(targets)


WINDOW = 7  # locations, the window of timm's TestTimePoolHead


def allows_test_time_pool(explanation: Explanation) -> bool:
    """Return whether timm's `TestTimePoolHead` applies to a model: its head is linear after average pooling, and its
    grid of locations is at least 7 x 7."""
    return explanation.kind == "exact" and explanation.grid is not None and min(explanation.grid) >= WINDOW


def _test_time_pool(model: nn.Module, head: Head, features: Tensor) -> Tensor:
    """Average the features in windows, score the windows, and average the mean and the maximum of their scores."""
    channels_last = layout_of(model, features).format == "NHWC"
    pooled = F.avg_pool2d(features.permute(0, 3, 1, 2) if channels_last else features, WINDOW, stride=1)
    windows = pooled.permute(0, 2, 3, 1) if channels_last else pooled
    ((highest,),) = location_attention(model, head, windows, PLAIN.terms)
    return (cast(Tensor, head(windows)) + highest) / 2


CHECKED = 4  # images


def _check_forward(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError if the model's `forward`, which users call, returns other logits than those being measured."""
    logits, features, head = model(images), spatial_features(model, images), plain_head(model)
    base = cast(Tensor, head(features))
    if is_wrapped(model):
        config = cast(CSRAConfig, model.csra)
        asked = Setting(config.lam, config.temperatures, config.scores).terms
        (terms,) = location_attention(model, head, features, asked)
        base = add_attention(base, terms, config.lam)
    masked = base.isneginf()
    error = (logits - base).masked_fill(masked & logits.isneginf(), 0).abs().max().item()
    base = base.masked_fill(masked, 0)
    if base.isfinite().all() and not error <= 1e-3 * base.abs().max().item():
        raise ValueError(
            f"{describe(model)}: forward differs from forward_head(forward_features(x)) by {error:.3g}; expected the "
            "same logits, because the gain is measured over those of forward_head. Undo what has changed forward."
        )
