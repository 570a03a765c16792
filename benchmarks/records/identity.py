"""Decide, from the keys of records, which of them share scores, have the same result, or are compared with each other.

The forward passes of a checkpoint give scores. Settings, metrics and statistics then turn scores into results. Results
of a family of checkpoints are compared with each other and corrected for their number.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from scipy.cluster.hierarchy import DisjointSet

CHECKPOINT = ("model", "weights")
# Names of a key on which only the results depend. All other names, unknown ones too, determine the scores.
QUESTION = ("settings", "activation", "average_precision", "calibration_data", "kept_scores", "evaluation")
# Names that may differ between checkpoints that are compared: their own sizes, if the requested size is the same;
# software; and which additional figures were computed.
FREE = (*CHECKPOINT, *QUESTION, "img_size", "test_crop_pct", "versions", "scoring", "rivals")
# Names of `QUESTION` that must agree for these protocols, too.
BY_PROTOCOL = {"crossfit": ("settings",), "best": ("settings",), "agreement": ("calibration_data",)}

Place = tuple[str, str | None]  # a data set's name, and its folder or file
Part = tuple[tuple[str, str], ...]  # names of a key and their values, without those that are None


@dataclass(frozen=True)
class Identity:
    """What identifies one record.

    Attributes:
        model: name of the checkpoint.
        weights: hash of its weights, None where it is unknown.
        result: digest of everything that determines the results.
        scores: digest of everything that determines the scores.
        compared: the part of the key that records must share to be compared, whatever the protocol.
        asked: the part that matters for some protocols only, see `BY_PROTOCOL`.
    """

    model: str
    weights: str | None
    result: str
    scores: str
    compared: Part
    asked: Part

    @classmethod
    def of(cls, key: Mapping[str, Any]) -> "Identity":
        """Make it from the key of a record; keys of old records may lack names."""
        scores = {name: value for name, value in key.items() if name not in QUESTION}
        compared = _part(key, (name for name in key if name not in FREE))
        asked = _part(key, sorted({name for names in BY_PROTOCOL.values() for name in names}))
        return cls(key["model"], key.get("weights"), _digest(key), _digest(scores), compared, asked)

    def family(self, metric: str | None, protocol: str | None) -> Part:
        """Return what identifies the family: results with equal values are compared and corrected together."""
        names = BY_PROTOCOL.get(protocol or "", ())
        asked = tuple((name, value) for name, value in self.asked if name in names)
        return (*self.compared, *asked, ("metric", str(metric)), ("protocol", str(protocol)))


def same_weights(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Map the name of each checkpoint to one name for all checkpoints with the same weights.

    A wheel, a folder and a repository of the Hub may hold the same weights. They are compared by the hash of the loaded
    weights (`weights_sha256`), else by that of the weight files.
    """
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
    """Return the readable beginning of a record's file name."""
    text = "--".join(str(key[name]) for name in ("model", "data", "task", "img_size"))
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)[-180:]


def answers(record: Mapping[str, Any], request: str) -> bool:
    """Whether the record's size is the one that `request`, such as `1x` or `96`, means for its checkpoint."""
    size, own = str(record["img_size"]), record.get("own_size")
    if request in record["requested"]:
        return True
    if record["key"].get("test_crop_pct"):  # a record with the crop of `test` counts for that request alone
        return False
    if request == size:
        return True
    if own is None or not request.endswith("x"):
        return False
    factor = float(request[:-1])
    return _sides(size) == tuple(round(factor * side) for side in _sides(own))


def distinct_names(sets: Iterable[Place]) -> dict[Place, str]:
    """Return a distinct name for each data set: its name, with the end of its path where others have the same name."""
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
    """Describe how each part differs from the others, such as `data 5f3a01, amp bf16`. `called` renames names."""
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
