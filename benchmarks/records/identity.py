"""What a record is of, from its key: by this everything decides what is the same.

A pass of a checkpoint over pixels gives scores; an answer is what they say to a question. Answers are compared over the
checkpoints of a family.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from scipy.cluster.hierarchy import DisjointSet

CHECKPOINT = ("model", "weights")
# What is asked of the scores. All other names of a key determine the pass, those that are not known here too.
QUESTION = ("settings", "activation", "average_precision", "calibration_data", "kept_scores", "evaluation")
# What may differ between checkpoints that are compared: their sizes, which answer one request; software; and which
# further figures were asked for.
FREE = (*CHECKPOINT, *QUESTION, "img_size", "test_crop_pct", "versions", "scoring", "rivals")
# What a protocol depends on beyond that.
BY_PROTOCOL = {"crossfit": ("settings",), "best": ("settings",), "agreement": ("calibration_data",)}

Place = tuple[str, str | None]  # of data: the name, and where they are
Part = tuple[tuple[str, str], ...]  # names and values, of what is not absent


@dataclass(frozen=True)
class Identity:
    """Of one record.

    Attributes:
        model: name of the checkpoint.
        weights: hash of its weights, None where that could not be had.
        result: digest of all that determines the figures.
        scores: digest of what its forward passes depend on.
        compared: all of the key in which the checkpoints that are compared agree, whatever the protocol.
        asked: see `BY_PROTOCOL`.
    """

    model: str
    weights: str | None
    result: str
    scores: str
    compared: Part
    asked: Part

    @classmethod
    def of(cls, key: Mapping[str, Any]) -> "Identity":
        """Of the key of a record, which may be an old one that lacks names."""
        scores = {name: value for name, value in key.items() if name not in QUESTION}
        compared = _part(key, (name for name in key if name not in FREE))
        asked = _part(key, sorted({name for names in BY_PROTOCOL.values() for name in names}))
        return cls(key["model"], key.get("weights"), _digest(key), _digest(scores), compared, asked)

    def family(self, metric: str | None, protocol: str | None) -> Part:
        """In what the results of all checkpoints agree that are compared, and corrected for their number."""
        names = BY_PROTOCOL.get(protocol or "", ())
        asked = tuple((name, value) for name, value in self.asked if name in names)
        return (*self.compared, *asked, ("metric", str(metric)), ("protocol", str(protocol)))


def same_weights(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Give for the name of each checkpoint one name for all that have its weights, as a wheel, a folder and a
    repository of the Hub may: by the hash of the loaded weights (`weights_sha256`), else of their files."""
    found: DisjointSet[tuple[str, str]] = DisjointSet()
    names = {}
    for record in records:
        name = ("model", record["model"])
        hashes = ("weights_sha256", record.get("weights_sha256")), ("weights", record["key"].get("weights"))
        for node in (name, *(of for of in hashes if of[1])):
            found.add(node)
            found.merge(name, node)
        names[record["model"]] = name
    first: dict[Any, str] = {}
    return {model: first.setdefault(found[name], model) for model, name in names.items()}


def readable(key: Mapping[str, Any]) -> str:
    """The beginning of a file's name."""
    text = "--".join(str(key[name]) for name in ("model", "data", "task", "img_size"))
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)[-180:]


def answers(record: Mapping[str, Any], request: str) -> bool:
    """Whether the size of a record is what `1x`, `96` or another request asks of its checkpoint."""
    size, own = str(record["img_size"]), record.get("own_size")
    if request in record["requested"]:
        return True
    if record["key"].get("test_crop_pct"):  # the same pixels with another crop answer `test` alone
        return False
    if request == size:
        return True
    if own is None or not request.endswith("x"):
        return False
    factor = float(request[:-1])
    return _sides(size) == tuple(round(factor * side) for side in _sides(own))


def names_apart(sets: Iterable[Place]) -> dict[Place, str]:
    """What to call sets of photographs, given by name and place: by the name, or as much of the place as tells it from
    others of the name."""
    found: dict[Place, str] = {}
    every = dict.fromkeys(sets)
    for name, place in every:
        others = [PurePath(other).parts for its, other in every if its == name and other and other != place]
        parts = PurePath(place or "").parts
        if not parts or not others:
            found[name, place] = name
            continue
        length = next(
            n for n in range(1, len(parts) + 1) if n == len(parts) or all(p[-n:] != parts[-n:] for p in others)
        )
        tail = str(PurePath(*parts[-length:]))
        found[name, place] = tail if PurePath(tail).name == name else f"{name} ({tail})"
    return found


def differences(parts: Sequence[Part], called: Mapping[str, str]) -> list[str]:
    """What tells each of them from the others, in words: `data 5f3a01, amp bf16`. Names are `called` differently."""
    every = [dict(part) for part in parts]
    names = dict.fromkeys([*called, *(name for part in every for name in part)])
    differing = [name for name in names if len({part.get(name) for part in every}) > 1]
    return [
        ", ".join(f"{called.get(name, name)} {_short(part[name])}" for name in differing if name in part)
        for part in every
    ]


def _part(key: Mapping[str, Any], names: Iterable[str]) -> Part:
    return tuple((name, _text(key[name])) for name in sorted(names) if key.get(name) not in (None, "none"))


def _short(text: str) -> str:
    value = json.loads(text)
    return str(value)[:12] if isinstance(value, (str, int, float)) else hashlib.sha256(text.encode()).hexdigest()[:6]


def _sides(size: str | int) -> tuple[int, ...]:
    sides = tuple(map(int, str(size).split("x"))) if str(size).replace("x", "").isdigit() else ()
    return sides * 2 if len(sides) == 1 else sides


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(dict(value)).encode()).hexdigest()[:16]
