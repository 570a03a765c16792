"""Time the scoring pass of a sweep on single batches, for `python -m benchmarks.overhead --sweep`."""

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

PASSES = {"sweep_logits": LOGITS, "sweep": ",".join(SCORES)}  # values of --scores


def default_settings(scores: str) -> tuple[Setting, ...]:
    """Return the settings that a sweep tries by default with `--scores`."""
    return asked_options(parser("").parse_args(["--scores", scores]), Path()).settings


def batch_seconds(
    model: nn.Module, explanation: Explanation, settings: Sequence[Setting], device: str, x: Tensor
) -> float:
    """Time what a sweep does with one batch, in seconds.

    `score` checks the model's forward on its first batch, so a batch of one image precedes the batch that is timed.
    """
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
