"""What the forward passes of a cell gave, and how it is kept for other settings."""

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
    """All that a cell's forward passes gave: what results are computed from, for any settings of the same scores and T.

    Attributes:
        scores: of the scored classes, in the data's images.
        targets: see `timm_csra.evaluation.metrics`.
        facts: fields of the record that do not depend on the settings.
    """

    scores: Scores
    targets: Tensor
    facts: Record


def scores_file(cell: Cell, options: Options) -> Path | None:
    """Where the scores of a cell are kept, whatever is asked of them: by all that its forward passes depend on."""
    if options.kept_scores is None:
        return None
    key = cell.key(options)
    return Path(options.kept_scores) / f"{readable(key)}--{Identity.of(key).scores}.safetensors"


def write_scores(file: Path, scored: Scored) -> None:
    """In half precision, which rounds logits to three digits; DataError where they do not fit into it."""
    tensors = {"base": scored.scores.base}
    tensors |= {f"attention.{kind}.{temperature:g}": t for (kind, temperature), t in scored.scores.attention.items()}
    tensors |= {f"pooled.{name}": t for name, t in scored.scores.pooled.items()}
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    if any((tensors[name].isfinite() & half.isinf()).any() for name, half in halves.items()):
        raise DataError(f"{file.name}: logits beyond 65504 do not fit into half precision; leave out --keep-scores.")
    metadata = {"facts": json.dumps(scored.facts), "dtype": str(scored.scores.dtype).removeprefix("torch.")}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file(halves | {"targets": scored.targets.contiguous()}, temporary, metadata)
    os.replace(temporary, file)


def read_scores(file: Path | None, settings: Sequence[Setting]) -> Scored:
    """The scores that `--keep-scores` kept.

    Raises:
        DataError: there are none, or not of all scores and temperatures that the settings need.
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
        raise DataError(f"{file}: kept are {there}; expected --scores and --temperatures among them.")
    dtype = getattr(torch, metadata["dtype"])
    scores = Scores(tensors["base"].float(), attention, dtype, parts["pooled"])
    return Scored(scores, targets, json.loads(metadata["facts"]))


def _term(name: str) -> Term:
    """`log_softmax.5`; before there were two kinds of scores, `5` was of the logits."""
    kind, _, temperature = name.partition(".")
    return (kind, float(temperature)) if kind in SCORES else (LOGITS, float(name))
