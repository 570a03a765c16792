"""Match the classes of the data with the classes of a head: by synset, by name, by a class map, or by position."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor


class NotApplicableError(Exception):
    """The cell does not apply to this checkpoint and data. Its record has the reason, and does not count as failed."""


@dataclass(frozen=True)
class ClassNames:
    """Names of the classes of a head, in its order, as `--class-names` gives them. `file` is the file of the names."""

    file: str
    names: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        return f"{self.file} {hashlib.sha256(json.dumps(self.names).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Classifier:
    """The classes of a head, from a checkpoint's configuration or a loaded model.

    That is the number of logits, and the name and description of each, if there are any.
    """

    count: int
    names: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()

    @classmethod
    def of(cls, count: int, pretrained_cfg: Mapping[str, Any]) -> "Classifier":
        """Make it from the `pretrained_cfg` of a checkpoint or of a model.

        Raises:
            ValueError: `label_names` is not a list, or `label_descriptions` is not a mapping.
        """
        names, descriptions = pretrained_cfg.get("label_names"), pretrained_cfg.get("label_descriptions") or {}
        if not names:
            return cls(count)
        if not isinstance(names, (list, tuple, dict)):
            raise ValueError(f"label_names: found a {type(names).__name__}, expected a list of names.")
        if not isinstance(descriptions, dict):
            raise ValueError(f"label_descriptions: found a {type(descriptions).__name__}, expected a mapping.")
        if isinstance(names, dict):
            names = [names.get(str(index), names.get(index, "")) for index in range(count)]
        return cls(count, tuple(map(str, names)), tuple(str(descriptions.get(name, "")) for name in names))


@dataclass(frozen=True)
class Head:
    """All names of each class of a head, in its order, and the source of the names."""

    names: list[set[str]]
    classes_from: str


def head_classes(classifier: Classifier, given: ClassNames | None = None) -> Head | None:
    """Return the classes of a head, or None if they are unknown.

    Their names are the `given` ones, else the checkpoint's `label_names`, else those that timm has for the number of
    classes (ImageNet-1k, 12k, 21k, 22k).

    Raises:
        NotApplicableError: the head has another number of classes than there are given names.
    """
    count = classifier.count
    if given is not None:
        if len(given.names) != count:
            raise NotApplicableError(
                f"{given.file} has {len(given.names)} names, and the head {count} classes: expected one for each. "
                "Leave out --class-names for checkpoints that know their own."
            )
        return Head([_names(name) | {_normal(name)} for name in given.names], given.file)
    names, descriptions = classifier.names, classifier.descriptions
    classes_from = "label_names of the checkpoint"
    if not names:
        subset = infer_imagenet_subset({"num_classes": count})
        if subset is None:
            return None
        info = ImageNetInfo(subset)
        names, described = tuple(info.label_names()), info.label_descriptions(as_dict=True)
        descriptions = tuple(described.get(name, "") for name in names)
        classes_from = f"{subset}, by the number of classes"
    if len(names) != count:
        return None
    both = zip(names, descriptions, strict=True)
    return Head([_names(f"{name} {description}") | {_normal(name)} for name, description in both], classes_from)


_SYNSET = re.compile(r"(n\d{8})\b\s*(.*)")


def _normal(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _names(text: str) -> set[str]:
    """Split `n01440764 tench, Tinca tinca` into the synset, the whole description, and each of its synonyms."""
    match = _SYNSET.match(text)
    synset, description = match.groups() if match else ("", text)
    return {name for name in (synset, *map(_normal, (description, *description.split(",")))) if name}


COMBINE = ("logits", "log-probabilities")


@dataclass(frozen=True)
class ClassMap:
    """The synsets of a head that each class of the data consists of.

    The score of a class with several synsets is, with `logits`, the largest of their logits; with `log-probabilities`,
    the log of the sum of their probabilities, from a softmax over all classes of the head. The head cannot score a
    class without a synset: the record names the class, and metrics leave it out.
    """

    name: str
    synsets: dict[str, tuple[str, ...]]
    combine: str = COMBINE[0]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.synsets, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.name} {digest} {self.combine}"


def load_class_map(name: str, combine: str = COMBINE[0]) -> ClassMap:
    """Load a class map of this repository by its name, or one from a JSON file of the same form.

    Raises:
        ValueError: the map does not exist, or the file is not a class map.
    """
    folder = Path(__file__).parent / "class_maps"
    file = folder / f"{name}.json" if (folder / f"{name}.json").is_file() else Path(name)
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise ValueError(f"--class-map: found {name!r}; expected one of {there}, or a JSON file.")
    try:
        classes = json.loads(file.read_text(encoding="utf-8"))["classes"]
        synsets = {str(key): tuple(value) for key, value in classes.items()}
        if not all(_SYNSET.fullmatch(synset) for group in synsets.values() for synset in group):
            raise ValueError("not all entries are synsets such as n02123045")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{file}: is not a class map: {error}; expected {{"classes": {{"cat": ["n02123045", ...], ...}}}}.'
        ) from error
    return ClassMap(file.stem, synsets, combine)


@dataclass(frozen=True)
class Alignment:
    """The columns of a head that are scored, and the classes of the data that they stand for.

    Attributes:
        columns: column indices of the head: one for each class that data and head share, or all columns with a class
            map or with `whole`.
        positions: maps class indices of the data to positions among the scored classes. Other classes are not scored.
        groups: the columns of each scored class, with a class map.
        left_out: classes of the data that the head cannot score.
        classes_from: the source of the names of the head's classes.
    """

    columns: tuple[int, ...]
    positions: dict[int, int]
    groups: tuple[tuple[int, ...], ...] | None = None
    left_out: tuple[str, ...] = ()
    classes_from: str = ""

    @property
    def count(self) -> int:
        """Number of scored classes."""
        return len(self.columns if self.groups is None else self.groups)


def combined(logits: Tensor, groups: Sequence[Sequence[int]], combine: str) -> Tensor:
    """Combine logits `(n, K)` into scores of classes `(n, classes)`, each from its group of columns; see `ClassMap`."""
    scores = logits.log_softmax(dim=1) if combine == "log-probabilities" else logits
    merge = torch.logsumexp if combine == "log-probabilities" else torch.amax
    return torch.stack([merge(scores[:, list(group)], dim=1) for group in groups], dim=1)


def align(
    classes: Sequence[str],
    labels: Iterable[Iterable[int]],
    classifier: Classifier,
    class_map: ClassMap | None = None,
    given: ClassNames | None = None,
    order: str | None = None,
    whole: bool = False,
) -> Alignment:
    """Match the data's classes with the head's by synset, else by a name that only one class of the head has.

    If all classes of the data have numbers as names (ImageNet-V2), these are indices of the head. If the names of the
    head's K classes are unknown, the data's classes are matched by position: classes named 0 to K-1, or K classes in an
    order that training code uses too.

    Args:
        classes: names as the data declares them.
        labels: indices into `classes`, for each photograph.
        classifier: the head to score.
        class_map: match by this map instead of by names.
        given: names of the head's classes, see `head_classes`.
        order: describes the order of `classes`, if training code uses the same one; else None.
        whole: score all classes of the head, not only those that the data declares.

    Raises:
        NotApplicableError: the head's classes are unknown, or a class that occurs in the data is not among them.
    """
    count, head = classifier.count, head_classes(classifier, given)
    if head is None and class_map is not None:
        raise NotApplicableError(
            f"the names of the head's {count} classes are unknown, and the class map {class_map.name} needs them: "
            "expected --class-names FILE with one synset for each class of the head, or label_names in config.json"
        )
    if head is None:
        return _scored(*_by_position(classes, count, order), count, whole)
    owners: dict[str, set[int]] = {}
    for index, names in enumerate(head.names):
        for name in names:
            owners.setdefault(name, set()).add(index)
    if class_map is not None:
        return replace(_align_by_map(classes, owners, count, class_map), classes_from=head.classes_from)
    numbers = all(name.isdigit() and name not in owners for name in classes)
    if numbers and max(map(int, classes)) < count:
        return _scored({index: int(name) for index, name in enumerate(classes)}, head.classes_from, count, whole)
    matches = {
        index: column for index, text in enumerate(classes) if (column := _match(text, head.names, owners)) is not None
    }
    occurring = sorted({label for several in labels for label in several})
    missing = [classes[index] for index in occurring if index not in matches]
    if missing:
        raise NotApplicableError(
            f"{len(missing)} classes of the data are not among the head's: {_few(missing)}; the head's are "
            f"from {head.classes_from}; to give other names use --class-names FILE"
        )
    return _scored(matches, head.classes_from, count, whole)


def _scored(matches: Mapping[int, int], classes_from: str, count: int, whole: bool) -> Alignment:
    """Align the data with the matched columns of the head, or with all of them."""
    columns = tuple(range(count)) if whole else tuple(sorted(set(matches.values())))
    position = {column: place for place, column in enumerate(columns)}
    return Alignment(columns, {index: position[column] for index, column in matches.items()}, classes_from=classes_from)


def _by_position(classes: Sequence[str], count: int, order: str | None) -> tuple[dict[int, int], str]:
    """Return the column of each class of the data for a head without names, and what the match relies on."""
    if sorted(classes) == sorted(map(str, range(count))):
        return {index: int(name) for index, name in enumerate(classes)}, f"folders called 0 to {count - 1}"
    if order is not None and len(classes) == count:
        return {index: index for index in range(count)}, order
    raise NotApplicableError(
        f"the names of the head's {count} classes are unknown, and the data has {len(classes)} classes "
        f"({_few(classes)}): expected --class-names FILE with one name for each class of the head, label_names in "
        f"config.json, folders called 0 to {count - 1}, or {count} folders in the order of the training"
    )


def _few(names: Sequence[str]) -> str:
    return "; ".join(names[:5]) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")


def _align_by_map(classes: Sequence[str], owners: dict[str, set[int]], head: int, class_map: ClassMap) -> Alignment:
    unknown = [name for name in classes if name not in class_map.synsets]
    if unknown:
        raise NotApplicableError(f"the class map {class_map.name} does not have the data's {', '.join(unknown[:5])}")
    groups: list[tuple[int, ...]] = []
    positions: dict[int, int] = {}
    for index, name in enumerate(classes):
        columns = {column for synset in class_map.synsets[name] for column in owners.get(synset, ())}
        if columns:
            positions[index] = len(groups)
            groups.append(tuple(sorted(columns)))
    if not groups:
        raise NotApplicableError(f"no class of the class map {class_map.name} is among the head's")
    left_out = tuple(name for index, name in enumerate(classes) if index not in positions)
    return Alignment(tuple(range(head)), positions, tuple(groups), left_out)


def _match(text: str, head: list[set[str]], owners: dict[str, set[int]]) -> int | None:
    """Return the class of the head that `text` names, or None if there is not exactly one.

    If both sides have synsets, only these count, since different synsets may have the same name (two classes of
    ImageNet are called "crane").
    """
    match = _SYNSET.match(text)
    synset, name = match.groups() if match else ("", text)
    if synset in owners:
        return min(owners[synset])
    found = owners.get(_normal(name), set())
    if len(found) != 1:
        return None
    (column,) = found
    return None if synset and any(_SYNSET.fullmatch(other) for other in head[column]) else column
