"""`--push-best`: push checkpoints with a significant gain to the Hub, with their results on the model card."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm_csra

from ..checkpoints.find import Checkpoint
from ..records.files import Record
from .summary import FIRST_METRIC, Row, task

ENDINGS = re.compile(r"\.(pth\.tar|pth|pt|bin|ckpt|tar|safetensors)$")
OF_ANY_TRAINING = re.compile(
    r"model_best|last|checkpoint(-\d+)?|averaged|model|pytorch_model|weights"
)  # names of files


@dataclass(frozen=True)
class Choice:
    """A checkpoint to push.

    Attributes:
        row: its most significant cross-fitted result.
        lam, temperature, scores: the settings that are best on all images of that result. The model card reports the
            cross-fitted gain, not the gain of these settings.
    """

    checkpoint: Checkpoint
    row: Row
    lam: float
    temperature: tuple[float, ...]
    scores: str
    records: tuple[Record, ...]

    def repository(self, prefix: str) -> str:
        return f"{prefix}-{_name(self.checkpoint)}"

    def __str__(self) -> str:
        row, heads = self.row, "+".join(f"{head:g}" for head in self.temperature)
        gain = f"{row['metric']} {row['gain']:+.2f} [{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
        where = f"{row['data']}, {task(row)} (Holm p = {row['p_holm']:.2g})"
        return f"{self.checkpoint.name}: {gain} on {where}, {self.scores}, lam {self.lam:g}, T {heads}"


def _name(checkpoint: Checkpoint) -> str:
    """Return the name of a checkpoint's folder or file; for file names that timm's train script uses, the folder's."""
    id, _, path = checkpoint.id.partition("@")
    if checkpoint.source == "local-dir":
        return _legal(Path(checkpoint.id).resolve().name) or "model"
    if checkpoint.source != "file":
        return id.rsplit("/")[-1]
    stem = ENDINGS.sub("", Path(path).name)
    return _legal(Path(path).resolve().parent.name if OF_ANY_TRAINING.fullmatch(stem) else stem) or id


def _legal(name: str) -> str:
    """Replace characters that the Hub does not allow in the name of a repository."""
    return re.sub(r"([-.])[-.]+", r"\1", re.sub(r"[^A-Za-z0-9._-]+", "-", name)).strip("-.")


def repository_clash(choices: Sequence[Choice], prefix: str) -> str | None:
    """Return an error text if two choices would be pushed to the same repository, else None."""
    first: dict[str, Checkpoint] = {}
    for choice in choices:
        name = choice.repository(prefix)
        if name in first:
            return (
                f"--push-best: {first[name].name} and {choice.checkpoint.name} would both go to {name}; expected a "
                "repository for each. Name one of them in --models, or push them with prefixes of their own."
            )
        first[name] = choice.checkpoint
    return None


def choose(rows: Iterable[Row], measured: Mapping[Checkpoint, Sequence[Record]]) -> list[Choice]:
    """Choose the checkpoints to push.

    Their cross-fitted gain in the task's first metric, at their own size, is significant after Holm's correction on at
    least one data set and task, and no loss is significant.

    Args:
        rows: rows of the summary.
        measured: the records of each checkpoint; its model card has all of them.
    """
    rows = list(rows)
    choices = []
    for checkpoint, records in measured.items():
        keys = [record["key"] for record in records]
        mine = [
            row
            for row in rows
            if row.get("verdict")
            and row["protocol"] == "crossfit"
            and row["metric"] == FIRST_METRIC[row["task"]]
            and row["requested"] == "1x"
            and row["key"] in keys
            and row["baseline_check"] != "flagged"
        ]
        better = [row for row in mine if row["verdict"] == "better"]
        if better and not any(row["verdict"] == "worse" for row in mine):
            row = min(better, key=lambda row: row["p_holm"])
            best = next(r for r in row["results"] if (r["protocol"], r["metric"]) == ("best", row["metric"]))
            heads = tuple(map(float, best["temperature"].split("+")))
            finished = tuple(record for record in records if record["status"] == "ok")
            choices.append(Choice(checkpoint, row, float(best["lam"]), heads, best["scores"], finished))
    return choices


def push(choice: Choice, prefix: str) -> str:
    """Load the checkpoint, wrap it and push it; returns the URL of the commit."""
    model = choice.checkpoint.create(choice.checkpoint.input_size())
    timm_csra.wrap(model, choice.lam, choice.temperature, choice.scores)
    name = choice.repository(prefix)
    message = f"{choice.checkpoint.name}, wrapped by timm_csra"
    return timm_csra.push_to_hub(model, name, commit_message=message, results=choice.records).commit_url
