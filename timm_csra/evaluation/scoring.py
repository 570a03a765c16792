"""Score once: base and attention logits do not depend on lam, so one forward pass serves every setting."""

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

Term = tuple[str, float]  # what an attention term is made of: the scores, and T


class Setting(NamedTuple):
    """One choice of lam, of the temperatures of the heads, and of the scores; see `CSRAConfig`."""

    lam: float
    temperature: tuple[float, ...]
    scores: str = LOGITS

    @property
    def terms(self) -> list[Term]:
        """What the heads need."""
        return [(self.scores, temperature) for temperature in self.temperature]


ALL = slice(None)  # images, or classes
PLAIN = Setting(0.0, (math.inf,))  # lam = 0: neither temperature nor scores matter
DEFAULT = Setting(0.1, (math.inf,))  # the paper's
DEFAULT_LOG_SOFTMAX = Setting(0.3, (math.inf,), LOG_SOFTMAX)


def settings_grid(
    lams: Iterable[float],
    temperatures: Iterable[float | tuple[float, ...]],
    scores: Iterable[str] = (LOGITS,),
    also: Iterable[Setting] = (),
) -> list[Setting]:
    """All combinations, and what is wanted `also`, validated, without duplicates; `PLAIN` is there and comes first.

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
        base: `(n, K)`, the plain model's logits.
        attention: for each kind of scores and temperature T the attention term att, `(n, K)`.
        pooled: logits of other ways to use the plain model, `(n, K)` each, by name.
        dtype: of the model's logits. Those of a setting are rounded to it, as a wrapped model's are: otherwise bf16
            would tie the plain logits alone, and ranks would differ for no other reason.
    """

    base: Tensor
    attention: dict[Term, Tensor]
    dtype: torch.dtype = torch.float32
    pooled: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """How much memory the logits take."""
        return sum(logits.nbytes for logits in (self.base, *self.attention.values(), *self.pooled.values()))

    def logits(self, setting: Setting, images: slice = ALL, classes: slice = ALL) -> Tensor:
        """What a model wrapped with `setting` says: base + lam * mean over heads of att, `(n, K)`, or a part of it."""
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
    """Run every image once and keep what all `settings` need.

    Args:
        model: a timm classifier in eval mode, plain or wrapped (its own settings are not used), on `device`.
        batches: `(images (N, C, H, W), targets (N, ...))`. Only the model runs in inference mode: what a data set keeps
            of them can be trained on afterwards.
        settings: which temperatures and scores are needed.
        columns: classes of the head to keep, in order; None for all K. Log-probabilities are over all K.
        device: where `model` is.
        amp_dtype: autocast to this dtype, or None.
        test_time_pool: also pool as timm's `TestTimePoolHead` does, see `allows_test_time_pool`.

    Returns:
        The scores and the targets of all images, in order, on the CPU.

    Raises:
        ValueError: a model in training mode, no image at all, logits that are not finite (but for -inf of classes that
            the plain logits mask), or a `forward` that gives other logits than the head on the features (checked on a
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
        if accelerated:  # choosing kernels for another batch size takes seconds, longer than many batches
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
        if len(coming) > 1:  # the device works on the batch of now while that of before is looked at
            keep(coming.popleft()())
    for last in coming:
        keep(last())
    if not kept:
        raise ValueError(
            f"{describe(model)}: no image to score. Expected at least one; a generator can be used only once."
        )
    plain, *rest = (torch.cat(parts) for parts in zip(*kept, strict=True))
    pooled = {"test_time_pool": rest.pop()} if test_time_pool else {}
    return Scores(plain, dict(zip(asked, rest, strict=True)), base.dtype, pooled), torch.cat(targets)


WINDOW = 7  # locations, what timm's TestTimePoolHead takes


def allows_test_time_pool(explanation: Explanation) -> bool:
    """Whether timm's `TestTimePoolHead` means anything for a model: its head is linear, and its grid of locations holds
    a window of 7 x 7."""
    return explanation.kind == "exact" and explanation.grid is not None and min(explanation.grid) >= WINDOW


def _test_time_pool(model: nn.Module, head: Head, features: Tensor) -> Tensor:
    """Features are averaged in windows, and the mean and the maximum over the windows' scores are averaged."""
    channels_last = layout_of(model, features).format == "NHWC"
    pooled = F.avg_pool2d(features.permute(0, 3, 1, 2) if channels_last else features, WINDOW, stride=1)
    windows = pooled.permute(0, 2, 3, 1) if channels_last else pooled
    ((highest,),) = location_attention(model, head, windows, PLAIN.terms)
    return (cast(Tensor, head(windows)) + highest) / 2


CHECKED = 4  # images


def _check_forward(model: nn.Module, images: Tensor) -> None:
    """What is measured must be the model as users call it, by its own `forward`."""
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
            "same logits. A gain over such a baseline would mean nothing."
        )
