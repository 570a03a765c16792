"""Choose lam, T and the kind of scores for one's own checkpoint and pictures by nested cross-validation, and recommend
them only if they gain on images that were not used for the choice."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..config import SCORES
from ..patching import wrap
from .batches import checked
from .metrics import MULTI_LABEL, SINGLE_LABEL, Metric, evaluate
from .samples import Evaluation, Logits, Weights
from .scoring import ALL, PLAIN, Scores, Setting, score, settings_grid
from .statistics import Comparison, Table, chosen, folds_of

Model = TypeVar("Model", bound=nn.Module)
LAMS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
TEMPERATURES = (1.0, 5.0, math.inf)
OwnMetric = Callable[[Tensor, Tensor], Any]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class TuneResult:
    """Result of `tune`; `str()` gives a readable summary.

    Attributes:
        metric: name of the metric.
        images: number of images; `nested.n` of them count for the metric.
        nested: the gain of the chosen settings on images that were not used for the choice, with a paired 95 %
            confidence interval; in percent and percentage points, or in the units of the user's metric.
            `nested.settings` are the settings chosen for the folds.
        chosen: the setting that is chosen on all folds.
        settings: the mean gain over folds and its standard error, for each setting.
    """

    metric: str
    images: int
    nested: Comparison
    chosen: Setting
    settings: Mapping[Setting, tuple[float, float]] = field(repr=False)

    @property
    def helps(self) -> bool:
        """Whether the confidence interval of the nested gain lies above 0."""
        return self.nested.interval is not None and self.nested.interval[0] > 0

    @property
    def recommended(self) -> Setting:
        """`chosen` if it helps, else the plain model."""
        return self.chosen if self.helps else PLAIN

    @property
    def lam(self) -> float:
        return self.recommended.lam

    @property
    def temperature(self) -> tuple[float, ...]:
        return self.recommended.temperature

    @property
    def scores(self) -> str:
        return self.recommended.scores

    def apply(self, model: Model) -> Model:
        """Wrap the model in place with the recommended setting; with lam = 0 its logits do not change."""
        return wrap(model, self.lam, self.temperature, self.scores)

    def __str__(self) -> str:
        nested, chosen = self.nested, self.chosen
        reason = f"no interval: {nested.no_interval}" if nested.no_interval else "no interval"
        interval = reason if nested.interval is None else "[{:+.2f}, {:+.2f}]".format(*nested.interval)
        gain = f"{self.metric} {nested.baseline:.2f} -> {nested.value:.2f}, {nested.gain:+.2f} {interval}"
        if self.helps:
            use = f"lam={chosen.lam:g}, temperature={chosen.temperature}, scores={chosen.scores!r}"
            verdict = f"CSRA helps here: use {use}."
        elif nested.interval is not None and nested.interval[1] < 0:
            verdict = "CSRA does harm here: use lam=0, the plain model."
        else:
            verdict = "No evidence that CSRA helps here: use lam=0, the plain model."
        ranked = sorted(self.settings.items(), key=lambda item: -item[1][0])[:5]
        rows = "\n".join(
            f"    {setting.scores:<11} lam {setting.lam:<5g} T {_heads(setting):<8} {mean:+.2f} +- {error:.2f}"
            for setting, (mean, error) in ranked
        )
        largest = max(setting.lam for setting in self.settings)
        edge = (
            f"  all folds choose lam {largest:g}, the largest tried: a larger lam may gain more\n"
            if all(setting.lam == largest for setting in nested.settings)
            else ""
        )
        return (
            f"{verdict}\n  on held-out images  {gain} (n = {nested.n}, {len(nested.settings)} folds)\n"
            f"  settings of the folds  {', '.join(map(_named, nested.settings))}\n{edge}"
            f"  best of {len(self.settings)} settings by cross-validation, gain and standard error over folds\n{rows}"
        )


def _heads(setting: Setting) -> str:
    return "+".join(f"{temperature:g}" for temperature in setting.temperature)


def _named(setting: Setting) -> str:
    return f"{setting.scores} {setting.lam:g}" if setting.lam else "0"


def tune(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    metric: str | OwnMetric | None = None,
    lams: float | Iterable[float] | None = None,
    temperatures: float | Iterable[float | tuple[float, ...]] | None = None,
    scores: str | Iterable[str] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> TuneResult:
    """Choose lam, temperature and kind of scores for a model on labelled pictures, and measure what the choice gains.

    The model runs once on every image, which is then scored for every setting. The images are divided into folds. For
    each fold, a setting is chosen on the other folds and measured on the fold (nested cross-validation): among the
    settings with the best setting's kind of scores, the one with the smallest lam whose mean gain is within one
    standard error of the best (Breiman et al., "Classification and Regression Trees", 1984, 3.4.3). The plain model is
    one of the settings. Nothing is trained, so the metrics of a fold can be used for every choice made without it.

    Args:
        model: a timm classifier in eval mode, plain or wrapped. It is not changed, and its own settings are not used.
        loader: yields `(images (N, C, H, W), targets)`. Images are floats of any precision. Targets are class indices
            `(N,)`, or `(N, K)` over the head's K classes with 1 for each class in the picture, 0 for the others and -1
            for classes that are not judged; for a metric of your own, anything that it takes. Give more than a few
            hundred images, if you can.
        metric: `top1` or `top5`; for several labels `mAP`, `lrap`, `r_precision`, `CF1_top3` or `OF1_top3`; or a
            function of logits `(n, K)` and targets whose higher values are better. None for `top1` or `mAP`.
        lams: the values to try, several or one; None for 0.02 to 2.
        temperatures: the temperatures to try with each lam, several or one. A tuple among them averages the attention
            terms of its values. None for 1, 5 and infinity.
        scores: the kinds of scores to try, "logits", "log_softmax"; None for both.
        folds: number of folds, at least 3.
        seed: random seed of the folds and of the bootstrap.

    Returns:
        A `TuneResult`. It recommends lam = 0 unless the confidence interval of the nested gain lies above 0.

    Raises:
        UnsupportedModelError: the model cannot be wrapped.
        TypeError: a setting has the wrong type, the loader does not yield two tensors, or images are not floats.
        ValueError: there is no setting to try, there are too few images for the folds, targets do not fit the model,
            the metric does not fit the targets, or the model is in training mode.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model('test_resnet', num_classes=3).eval()
        >>> loader = [(torch.randn(10, 3, 64, 64), torch.arange(10) % 3)]
        >>> tune(model, loader, folds=3).lam
        0.0
    """
    _check_types(metric, folds)
    settings = settings_grid(
        LAMS if lams is None else _several(lams),
        TEMPERATURES if temperatures is None else _several(temperatures),
        SCORES if scores is None else _several(scores),
    )
    device = next(model.parameters()).device
    found, targets = score(model, checked(model, loader, callable(metric)), settings, device=device)
    return choose(found, targets, settings, metric=metric, folds=folds, seed=seed)


def _several(values: Any) -> Iterable[Any]:
    """Return the values to try; a single value or name becomes a tuple of one."""
    return values if isinstance(values, Iterable) and not isinstance(values, str) else (values,)


def _check_types(metric: Any, folds: Any) -> None:
    if not (metric is None or isinstance(metric, str) or callable(metric)):
        raise TypeError(
            "metric must be the name of a metric, such as 'top1', or a function of logits and targets, "
            f"got {metric!r} ({type(metric).__name__})."
        )
    if isinstance(folds, bool) or not isinstance(folds, Integral):
        raise TypeError(f"folds must be a whole number, at least 3, got {folds!r} ({type(folds).__name__}).")


def choose(
    scores: Scores,
    targets: Tensor,
    settings: Sequence[Setting],
    *,
    metric: str | OwnMetric | None = None,
    folds: int = 5,
    seed: int = 0,
    combine: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> TuneResult:
    """Choose a setting as `tune` does, from scores that have been computed before.

    Args:
        scores: scores of all settings, see `score`.
        targets: targets of all images.
        settings: the settings to try, see `settings_grid`.
        metric: see `tune`.
        folds: see `tune`.
        seed: see `tune`.
        combine: maps logits of the head's classes to logits of the classes of the targets.
    """
    _check_types(metric, folds)
    if folds < 3 or len(targets) < 2 * folds:
        raise ValueError(f"found {len(targets)} images for {folds} folds; expected at least 3 folds of 2 images.")
    if not set(settings) - {PLAIN}:
        raise ValueError("found no setting to try but the plain model; expected a lam above 0 and a temperature.")
    name, function = _metric(metric, targets)

    def evaluation(setting: Setting) -> Evaluation:
        def logits(images: slice = ALL, classes: slice = ALL) -> Tensor:
            return combine(scores.logits(setting, images))[:, classes]

        found = evaluate(logits, targets, {name: function})
        if not found:
            classes = logits(slice(0, 1)).shape[1]
            raise ValueError(
                f"metric: found {name}, which does not apply to these targets with {classes} classes: it would count "
                "every class as predicted, or the classes have enough positives for mAP. Use another metric."
            )
        return found[name]

    parts = folds_of(targets.numpy() if targets.ndim == 1 else len(targets), seed, folds)
    table = Table.of(name, {setting: evaluation(setting) for setting in settings}, parts)
    nested = nested_gain(table, seed)
    values = np.stack([table.values[setting] for setting in table.settings])
    (number,) = _one_standard_error(table.settings, values[..., None])
    gain, error = (found[:, 0] for found in _gains(table.settings, values[..., None]))
    summary = {
        setting: (float(gain[i]), float(error[i])) for i, setting in enumerate(table.settings) if setting != PLAIN
    }
    return TuneResult(name, len(targets), nested, table.settings[number], summary)


def nested_gain(table: Table, seed: int) -> Comparison:
    """Compute the gain of nested cross-validation: the setting for each fold is chosen on the other folds. The parts of
    `table` are those of `folds_of`."""
    return chosen(table, "nested", partial(_on_other_folds, table.settings), seed)


def _metric(metric: str | OwnMetric | None, targets: Tensor) -> tuple[str, Metric]:
    known = SINGLE_LABEL if targets.ndim == 1 else MULTI_LABEL
    if metric is None:
        metric = next(iter(known))
    if not isinstance(metric, str):
        own = metric
        return getattr(own, "__name__", "metric"), lambda logits, targets: _Own(own, logits, targets)
    if metric not in known:
        kind = "class indices (N,)" if targets.ndim == 1 else "several labels (N, K)"
        raise ValueError(f"metric: found {metric!r} for targets that are {kind}; expected {', '.join(known)}.")
    return metric, known[metric]


@dataclass(frozen=True)
class _Own:
    """The evaluation of a metric function of the user's own."""

    function: OwnMetric
    logits: Logits
    targets: Tensor
    classes: ClassVar[None] = None
    no_interval: ClassVar[None] = None

    @property
    def n(self) -> int:
        return len(self.targets)

    def weighted(self, weights: Weights) -> NDArray[np.float64]:
        logits, counts = self.logits(), torch.from_numpy(weights.astype(np.intp)).T
        samples = (torch.repeat_interleave(count) for count in counts)
        return np.array([float(self.function(logits[rows], self.targets[rows])) for rows in samples])


def _gains(settings: Sequence[Setting], values: Values) -> tuple[Values, Values]:
    """Compute the mean over folds of the gain over the plain model, and its standard error, both `(S, B)`; NaN where
    the metric is undefined."""
    gains = values - values[settings.index(PLAIN)]
    return gains.mean(axis=1), gains.std(axis=1, ddof=1) / math.sqrt(gains.shape[1])


def _on_other_folds(settings: Sequence[Setting], values: Values) -> NDArray[np.intp]:
    """Choose the setting for each fold on the other folds: a `Rule`."""
    folds = range(values.shape[1])
    return np.stack([_one_standard_error(settings, np.delete(values, fold, axis=1)) for fold in folds])


def _one_standard_error(settings: Sequence[Setting], values: Values) -> NDArray[np.intp]:
    """Choose the smallest lam whose gain is within one standard error of the best, and its best temperature, among the
    settings with the best setting's kind of scores: the same lam has another effect with the other kind.

    Args:
        settings: S settings, in order of lam.
        values: the metric in each of B resamples, `(S, folds, B)`.

    Returns:
        Indices of the chosen settings, `(B,)`; 0, the plain model, where the metric is undefined.
    """
    gains, errors = _gains(settings, values)
    gains = np.where(np.isnan(gains), -np.inf, gains)
    highest = gains.argmax(axis=0)
    enough = np.take_along_axis(gains - errors, highest[None], axis=0)
    kinds = np.array([SCORES.index(setting.scores) for setting in settings])
    plain = np.array([setting == PLAIN for setting in settings])[:, None]
    near = ((kinds[:, None] == kinds[highest]) | plain) & (gains >= enough)
    lams = np.array([setting.lam for setting in settings])[:, None]
    smallest = np.where(near, lams, np.inf).min(axis=0)
    return np.where(near & (lams == smallest), gains, -np.inf).argmax(axis=0)
