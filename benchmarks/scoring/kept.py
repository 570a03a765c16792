"""Keep the scores of a cell on disk, to compute the results of other settings without forward passes."""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_csra.config import LOGITS, SCORES
from timm_csra.evaluation.scoring import Scores, Setting, Term

from ..data.datasets import DataError
from ..records.files import Record
from ..records.identity import Identity, readable
from .cells import Cell, Options


@dataclass(frozen=True)
class Scored:
    """The scores of a cell. They give the results of every setting with the same kinds of scores and temperatures.

    Attributes:
        scores: scores of the scored classes for the data's images.
        targets: see `timm_csra.evaluation.metrics`.
        facts: fields of the record that do not depend on the settings.
        images_run: number of images run for this cell; 0 if the scores are kept ones, or of another task's pass.
    """

    scores: Scores
    targets: Tensor
    facts: Record
    images_run: int = 0


def scores_file(cell: Cell, options: Options) -> Path | None:
    """Path of the kept scores of a cell, or None; its name depends on all that determines the scores."""
    if options.kept_scores is None:
        return None
    key = cell.key(options)
    return Path(options.kept_scores) / f"{readable(key)}--{Identity.of(key).scores}.safetensors"


def write_scores(file: Path, scored: Scored) -> None:
    """Write scores in float16, which rounds logits to three digits.

    Raises:
        DataError: a logit is beyond the range of float16.
    """
    tensors = {"base": scored.scores.base}
    tensors |= {f"attention.{kind}.{temperature:g}": t for (kind, temperature), t in scored.scores.attention.items()}
    tensors |= {f"pooled.{name}": t for name, t in scored.scores.pooled.items()}
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    if any((tensors[name].isfinite() & half.isinf()).any() for name, half in halves.items()):
        raise DataError(f"{file.name}: logits beyond 65504 do not fit into float16; leave out --keep-scores.")
    metadata = {"facts": json.dumps(scored.facts), "dtype": str(scored.scores.dtype).removeprefix("torch.")}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file(halves | {"targets": scored.targets.contiguous()}, temporary, metadata)
    os.replace(temporary, file)


def read_scores(file: Path | None, settings: Sequence[Setting]) -> Scored:
    """Read the scores that `--keep-scores` wrote.

    Raises:
        DataError: the file does not exist, or lacks scores or temperatures that the settings need.
    """
    if file is None or not file.is_file():
        raise DataError(f"no scores are kept at {file}: run the cell with --keep-scores first, on the same data.")
    with safe_open(file, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    targets = tensors.pop("targets")
    parts: dict[str, dict[str, Tensor]] = {"attention": {}, "pooled": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if rest:
            parts[part][rest] = tensor.float()
    attention = {_term(name): tensor for name, tensor in parts["attention"].items()}
    if not {term for setting in settings for term in setting.terms} <= attention.keys():
        there = "; ".join(
            f"{kind}, T {', '.join(f'{temperature:g}' for _, temperature in sorted(terms))}"
            for kind, terms in itertools.groupby(sorted(attention), key=lambda term: term[0])
        )
        raise DataError(f"{file}: found scores of {there}; expected --scores and --temperatures among them.")
    dtype = getattr(torch, metadata["dtype"])
    scores = Scores(tensors["base"].float(), attention, dtype, parts["pooled"])
    return Scored(scores, targets, json.loads(metadata["facts"]))


def _term(name: str) -> Term:
    """Parse `log_softmax.5`; in files from before there were two kinds of scores, `5` means logits."""
    kind, _, temperature = name.partition(".")
    return (kind, float(temperature)) if kind in SCORES else (LOGITS, float(name))
