"""How the classes of the data meet the classes of a head: by synset, else by an unambiguous name."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn


class NotApplicableError(Exception):
    """A cell that has no answer for this checkpoint and data: a record with the reason, never a failure."""


def head_classes(model: nn.Module) -> list[set[str]] | None:
    """All names of each class of a head, in its order: from the checkpoint's `label_names`, else by timm from the
    number of classes (ImageNet-1k, 12k, 21k, 22k); None where nobody says."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    names, descriptions = cfg.get("label_names"), cfg.get("label_descriptions") or {}
    if isinstance(names, dict):
        names = [names.get(str(index), names.get(index, "")) for index in range(int(model.num_classes))]  # type: ignore
    if not names:
        subset = infer_imagenet_subset(model)
        if subset is None:
            return None
        info = ImageNetInfo(subset)
        names, descriptions = info.label_names(), info.label_descriptions(as_dict=True)
    if len(names) != model.num_classes:
        return None
    return [_names(f"{name} {descriptions.get(name, '')}") | {_normal(name)} for name in names]


_SYNSET = re.compile(r"(n\d{8})\b\s*(.*)")


def _normal(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _names(text: str) -> set[str]:
    """`n01440764 tench, Tinca tinca` -> the synset, the whole description, and each of its words for the class."""
    match = _SYNSET.match(text)
    synset, description = match.groups() if match else ("", text)
    return {name for name in (synset, *map(_normal, (description, *description.split(",")))) if name}


@dataclass(frozen=True)
class Alignment:
    """Which outputs of a head are scored.

    Attributes:
        columns: indices into the head, one for each class that data and head share, `(columns,)`.
        positions: class index of the data -> position among `columns`.
    """

    columns: tuple[int, ...]
    positions: dict[int, int]


def align(classes: Sequence[str], labels: Iterable[Iterable[int]], model: nn.Module) -> Alignment:
    """Match the data's classes with the head's by synset, else by a name that only one class of the head has.

    Args:
        classes: names as the data declares them.
        labels: indices into `classes`, for each photograph.
        model: whose head is to be scored.

    Raises:
        NotApplicableError: the head's classes are unknown, or a class that occurs in the data is not among them.
    """
    head = head_classes(model)
    if head is None:
        raise NotApplicableError(
            f"the names of the head's {model.num_classes} classes are unknown: expected label_names in config.json "
            "or a head of a known ImageNet size"
        )
    owners: dict[str, set[int]] = {}
    for index, names in enumerate(head):
        for name in names:
            owners.setdefault(name, set()).add(index)
    matches = {
        index: column for index, text in enumerate(classes) if (column := _match(text, head, owners)) is not None
    }
    occurring = sorted({label for several in labels for label in several})
    missing = [classes[index] for index in occurring if index not in matches]
    if missing:
        shown = "; ".join(missing[:5]) + (f"; and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise NotApplicableError(f"{len(missing)} classes of the data are not among the head's: {shown}")
    columns = tuple(sorted(set(matches.values())))
    position = {column: place for place, column in enumerate(columns)}
    return Alignment(columns, {index: position[column] for index, column in matches.items()})


def _match(text: str, head: list[set[str]], owners: dict[str, set[int]]) -> int | None:
    """The one class of the head that `text` names. Where both sides have synsets these decide, since names of
    different synsets coincide (two classes of ImageNet are called "crane")."""
    match = _SYNSET.match(text)
    synset, name = match.groups() if match else ("", text)
    if synset in owners:
        return min(owners[synset])
    found = owners.get(_normal(name), set())
    if len(found) != 1:
        return None
    (column,) = found
    return None if synset and any(_SYNSET.fullmatch(other) for other in head[column]) else column
