"""The scoring pass of a sweep, batch by batch, for `python -m benchmarks.overhead --sweep`."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from timm_csra import Explanation
from timm_csra.accelerators import on_accelerator
from timm_csra.config import LOGITS, SCORES
from timm_csra.evaluation.scoring import Setting, allows_test_time_pool, score

from .arguments import parser
from .asked import asked_options

PASSES = {"sweep_logits": LOGITS, "sweep": ",".join(SCORES)}  # what the sweep is told by --scores


def default_settings(scores: str) -> tuple[Setting, ...]:
    """Give the settings that a sweep tries when it is told nothing but `--scores`."""
    return asked_options(parser("").parse_args(["--scores", scores]), Path()).settings


def batch_seconds(
    model: nn.Module, explanation: Explanation, settings: Sequence[Setting], device: str, x: Tensor
) -> float:
    """Time what a sweep does with one batch. A batch of one image goes before it and is not timed, because `score`
    checks the model's forward on the first images that it gets."""
    assert explanation.num_classes is not None
    started = math.nan

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal started
        yield x[:1], torch.zeros(1)
        if on_accelerator(device):
            torch.accelerator.synchronize()
        started = time.perf_counter()
        yield x, torch.zeros(len(x))

    score(
        model,
        batches(),
        settings,
        columns=range(explanation.num_classes),
        device=device,
        test_time_pool=allows_test_time_pool(explanation),
    )
    return time.perf_counter() - started
