"""Measure the time and memory of wrapping, compared with the plain model and with alternatives.

All variants of a model run in one process, each once in every round and in random order, so that other load on the
machine affects all of them alike. A ratio is the time of a variant over that of the plain model in the same round; the
command prints the median over the rounds and its 95 % interval (binomial, scipy). The floor is the ratio of
multiply-accumulates; `least` is the ratio that this machine needs for the plain model and the product of the classifier
with all locations, and nothing else. Weights are random.

  plain     the model
  naive     the four lines of the paper: the classifier on all locations of the batch at once, mean and maximum; for
            linear classifiers without norm or hidden layer between pool and classifier
  testpool  timm's TestTimePoolHead
  wrapped   timm_csra.wrap(model)
  log_softmax  timm_csra.wrap(model, lam=0.3, scores="log_softmax")

With --sweep it also measures what `python -m benchmarks.sweep` does with a batch: one forward pass, the attention terms
of all default settings (T 1, 5 and inf), timm's test-time pooling where that applies, and collecting all these logits.
The time does not include what the sweep does once for a cell, a check of the model on a few images.

  sweep_logits  --scores logits
  sweep     both kinds of scores, the sweep's default

`added` is the median over rounds of the time that the wrapped model takes longer than the plain one, with its interval;
with --batch-size 1 it is what wrapping adds to the latency of a single image.
"""

import argparse
import copy
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats
from timm.layers import TestTimePoolHead
from torch import Tensor, nn

import timm_csra
from timm_csra.evaluation.scoring import allows_test_time_pool

from .argument_types import natural, positive
from .memory import in_process, peak_of
from .sweep_pass import PASSES, batch_seconds, default_settings

MODELS = (
    "resnet50,efficientnet_b0,tf_efficientnet_lite0,convnext_tiny,swin_tiny_patch4_window7_224,vit_small_patch16_224,"
    "regnety_016,mobilenetv3_small_100"
)
VARIANTS = ("plain", "naive", "testpool", "wrapped", "log_softmax")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Images = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Ratio:
    """Ratio or difference of the times of two variants: the median over rounds, and its 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """Cost of one model.

    Attributes:
        seconds: median time of a batch, for each variant that applies.
        ratios: time of each variant over that of the plain model.
        over_naive: time of the wrapped model over that of `naive`, where that applies.
        over_logits: time with log-probabilities over that with logits, both wrapped.
        over_sweep_logits: with --sweep, time of a sweep's pass with both kinds of scores over that with logits alone.
        added: seconds that a batch takes longer wrapped than plain.
        least: time of the plain model plus the product of its classifier with all locations, over the plain model's.
        floor: (MACs of the model + MACs of scoring its locations) / MACs of the model.
        megabytes: with --memory, peak memory of one batch above that of the model.
    """

    model: str
    kind: str | None
    input_size: tuple[int, ...]
    floor: float
    seconds: dict[str, float]
    ratios: dict[str, Ratio]
    over_naive: Ratio | None
    over_logits: Ratio
    over_sweep_logits: Ratio | None
    added: Ratio
    least: Ratio | None
    megabytes: dict[str, float]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write OUT. Returns 0, or 2 if the arguments are wrong."""
    args = _parser().parse_args(arguments)
    screen, log = Console(width=None if sys.stdout.isatty() else 400), Console(stderr=True)
    names = args.models.split(",")
    if unknown := [name for name in names if not timm.is_model(name)]:
        log.print(f"benchmarks.overhead: --models: timm has no architecture {', '.join(unknown)}.", highlight=False)
        return 2
    if args.sweep and args.compile:
        log.print(
            "benchmarks.overhead: leave out --sweep or --compile: a sweep does not compile models.", highlight=False
        )
        return 2
    costs = [measure(name, args) for name in track(names, "models", console=log, transient=True)]
    screen.print(_table(costs))
    screen.print(f"{_machine(args)}, {args.rounds} rounds.", highlight=False, soft_wrap=True)
    screen.print(f"A product of two 2,048 x 2,048 matrices: {_peak(args):,.0f} GFLOP/s.", highlight=False)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"machine": _machine(args), "arguments": {k: str(v) for k, v in vars(args).items()}}
        args.out.write_text(json.dumps(about | {"costs": [asdict(cost) for cost in costs]}, indent=1) + "\n")
        _plot(costs, args.out.with_suffix(".png"))
        screen.print(f"{args.out} and {args.out.with_suffix('.png')}", highlight=False, soft_wrap=True)
    return 0


def measure(name: str, args: argparse.Namespace) -> Cost:
    """Measure the time, and with `--memory` the memory, of every variant of one architecture."""
    model = _model(name, args)
    explanation = timm_csra.explain(model, args.img_size)
    assert explanation.input_size is not None
    x = _images(explanation.input_size, args)
    calls = {variant: call for variant in VARIANTS if (call := _call(model, variant, explanation, args)) is not None}
    timers: dict[str, Callable[[Tensor], float]] = {variant: partial(_seconds, call) for variant, call in calls.items()}
    if "naive" in calls:
        timers["product"] = partial(_seconds, _product(model, explanation, args))
    if args.sweep:
        for variant, scores in PASSES.items():
            timers[variant] = partial(batch_seconds, model, explanation, default_settings(scores), args.device)
    seconds: dict[str, list[float]] = {variant: [] for variant in timers}
    with torch.inference_mode():
        for timer in timers.values():
            for _ in range(args.warmup):
                timer(x)
        for _ in range(args.rounds):
            for variant in random.sample(list(timers), len(timers)):
                seconds[variant].append(timers[variant](x))
    times = {variant: np.array(values) for variant, values in seconds.items()}
    products = times.pop("product", None)
    megabytes = {variant: in_process(_megabytes, name, variant, args) for variant in calls} if args.memory else {}
    return Cost(
        name,
        explanation.kind,
        explanation.input_size,
        1 + explanation.extra_macs / explanation.macs,
        {variant: float(np.median(values)) for variant, values in times.items()},
        {variant: _ratio(values / times["plain"]) for variant, values in times.items() if variant != "plain"},
        _ratio(times["wrapped"] / times["naive"]) if "naive" in times else None,
        _ratio(times["log_softmax"] / times["wrapped"]),
        _ratio(times["sweep"] / times["sweep_logits"]) if args.sweep else None,
        _ratio(times["wrapped"] - times["plain"]),
        None if products is None else _ratio(1 + products / times["plain"]),
        megabytes,
    )


def _ratio(ratios: np.ndarray) -> Ratio:
    interval = stats.quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
    return Ratio(float(np.median(ratios)), float(interval.low), float(interval.high))


def _seconds(call: Images, x: Tensor) -> float:
    synchronize = torch.accelerator.synchronize if x.device.type != "cpu" else lambda: None
    synchronize()
    started = time.perf_counter()
    call(x)
    synchronize()
    return time.perf_counter() - started


def _model(name: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    more = {"num_classes": args.num_classes} if args.num_classes else {}
    if args.img_size and timm.get_pretrained_cfg(name).fixed_input_size:
        more["img_size"] = args.img_size
    layout = torch.channels_last if args.channels_last else torch.preserve_format
    model = timm.create_model(name, **more).eval()
    return model.to(args.device, DTYPES[args.dtype]).to(memory_format=layout)


def _images(size: tuple[int, ...], args: argparse.Namespace) -> Tensor:
    layout = torch.channels_last if args.channels_last else torch.preserve_format
    return torch.randn(args.batch_size, *size).to(args.device, DTYPES[args.dtype]).to(memory_format=layout)


def _call(
    model: nn.Module, variant: str, explanation: timm_csra.Explanation, args: argparse.Namespace
) -> Images | None:
    """Return the variant as a function of a batch, or None if it does not apply. All but timm's share the weights."""
    if variant == "plain":
        call: Images = model
    elif variant == "wrapped":
        call = timm_csra.wrap(copy.copy(model))
    elif variant == "log_softmax":
        call = timm_csra.wrap(copy.copy(model), lam=0.3, scores="log_softmax")
    elif explanation.kind == "nonlinear" or not isinstance(model.get_classifier(), nn.Linear):  # type: ignore[operator]
        return None
    elif variant == "naive":
        call = _Naive(model, explanation)
    elif explanation.features == "NCHW" and allows_test_time_pool(explanation):
        call = TestTimePoolHead(copy.deepcopy(model), original_pool=7).to(args.device, DTYPES[args.dtype])
    else:
        return None
    return torch.compile(call) if args.compile else call


def _product(model: Any, explanation: timm_csra.Explanation, args: argparse.Namespace) -> Images:
    """Return a function that computes the product alone, in its fastest shape.

    That is N * L contiguous rows, and 1,024 classes at a time.
    """
    classifier = model.get_classifier()
    assert explanation.grid is not None
    rows = torch.randn(args.batch_size * math.prod(explanation.grid), classifier.in_features).to(classifier.weight)

    def call(_: Tensor) -> None:
        for weight, bias in zip(classifier.weight.split(1024), classifier.bias.split(1024), strict=True):
            F.linear(rows, weight, bias)

    return call


class _Naive(nn.Module):
    """Applies the classifier to every location, and adds 0.1 times the maximum of the scores to their mean.

    With a class token, its logits take the place of the mean.
    """

    def __init__(self, model: nn.Module, explanation: timm_csra.Explanation) -> None:
        super().__init__()
        self.model = model
        self.explanation = explanation

    def forward(self, x: Tensor) -> Tensor:
        features = self.model.forward_features(x)  # type: ignore[operator]
        classifier = self.model.get_classifier()  # type: ignore[operator]
        if self.explanation.kind == "token":
            scores = classifier(features[:, self.explanation.prefix_tokens :])
            return self.model.forward_head(features) + 0.1 * scores.amax(1)  # type: ignore[operator]
        if self.explanation.features == "NHWC":
            scores = classifier(features).flatten(1, 2)
            return scores.mean(1) + 0.1 * scores.amax(1)
        scores = F.conv2d(features, classifier.weight[:, :, None, None], classifier.bias).flatten(2)
        return scores.mean(2) + 0.1 * scores.amax(2)


def _megabytes(name: str, variant: str, args: argparse.Namespace) -> float:
    """Measure the peak memory of one batch above the memory before it."""
    model = _model(name, args)
    explanation = timm_csra.explain(model, args.img_size)
    call = _call(model, variant, explanation, args)
    assert call is not None and explanation.input_size is not None
    x = _images(explanation.input_size, args)
    with torch.inference_mode():
        call(x if x.device.type != "cpu" else x[:1])  # warm-up: libraries allocate memory once
        with peak_of(x.device) as peak:
            call(x)
    return peak.megabytes


def _table(costs: list[Cost]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    ratios = [f"{name}/plain" for name in (*VARIANTS[1:], "least")]
    for name in ("kind", "input", "plain", "floor", *ratios, "wrapped/naive", "log_softmax/wrapped", "added ms"):
        table.add_column(name, justify="right", no_wrap=True)
    sweep = any(cost.over_sweep_logits for cost in costs)
    for name in ("sweep_logits/plain", "sweep/plain", "sweep/sweep_logits") if sweep else ():
        table.add_column(name, justify="right", no_wrap=True)
    if any(cost.megabytes for cost in costs):
        table.add_column(f"MB {', '.join(VARIANTS)}", justify="right", no_wrap=True)
    for cost in costs:
        cells = [cost.model, str(cost.kind), "x".join(map(str, cost.input_size))]
        cells += [f"{1e3 * cost.seconds['plain']:.1f} ms", f"{cost.floor:.3f}"]
        cells += map(_shown, map(cost.ratios.get, VARIANTS[1:]))
        cells += map(_shown, (cost.least, cost.over_naive, cost.over_logits))
        cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*(1e3 * part for part in astuple(cost.added))))
        if sweep:
            cells += map(_shown, (*map(cost.ratios.get, PASSES), cost.over_sweep_logits))
        if cost.megabytes:
            shown = (cost.megabytes.get(variant, math.nan) for variant in VARIANTS)
            cells.append(" ".join("-" if math.isnan(value) else f"{value:.0f}" for value in shown))
        table.add_row(*cells)
    return table


def _shown(ratio: Ratio | None) -> str:
    return f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio else "-"


def _machine(args: argparse.Namespace) -> str:
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    compiled = ", torch.compile" if args.compile else ""
    return f"{name}{threads}, batch {args.batch_size}, {args.dtype}{compiled}, torch {torch.__version__}"


def _peak(args: argparse.Namespace) -> float:
    """Measure the GFLOP/s of a large matrix product, as the peak of this machine."""
    a, b = (torch.randn(2048, 2048).to(args.device, DTYPES[args.dtype]) for _ in range(2))
    with torch.inference_mode():
        seconds = [_seconds(lambda _: a @ b, a) for _ in range(20)]
    return 2 * 2048**3 / float(np.median(seconds)) / 1e9


def _plot(costs: list[Cost], path: Path) -> None:
    """Plot the measured ratios against their floor."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for variant in VARIANTS[1:]:
        found = [(cost.floor, cost.ratios[variant]) for cost in costs if variant in cost.ratios]
        if found:
            x = [floor for floor, _ in found]
            y = [ratio.median for _, ratio in found]
            error = [[r.median - r.low for _, r in found], [r.high - r.median for _, r in found]]
            axes.errorbar(x, y, error, fmt="o", capsize=3, label=variant)
    for cost in costs:
        ratio = cost.ratios["wrapped"]
        axes.annotate(cost.model, (cost.floor, ratio.median), (4, 4), textcoords="offset points", fontsize=7)
    highest = max(cost.floor for cost in costs)
    axes.plot([1, highest], [1, highest], color="grey", linewidth=1, label="floor")
    axes.set(xlabel="floor: ratio of multiply-accumulates", ylabel="measured ratio to the plain model")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default=MODELS, help="architectures, comma-separated (default: eight common ones)")
    parser.add_argument("--batch-size", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--img-size", type=positive, help="default: the architecture's own")
    parser.add_argument("--num-classes", type=positive, help="default: the architecture's own")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile every variant with torch.compile")
    parser.add_argument(
        "--memory", action="store_true", help="also measure peak memory, each variant in a process of its own"
    )
    parser.add_argument("--sweep", action="store_true", help="also measure what a sweep does with a batch, see above")
    parser.add_argument("--rounds", type=positive, default=40, help="default: %(default)s")
    parser.add_argument(
        "--warmup", type=natural, default=3, help="batches before the first round (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="a JSON file; the plot goes beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
