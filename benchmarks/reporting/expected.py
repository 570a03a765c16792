"""Compare top-1 at lam = 0 with the figure that timm publishes for a checkpoint."""

import csv
import io
import json
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..records.files import Record, write_text
from ..records.identity import QUESTION

TOLERANCE = 0.1  # percentage points of top-1
IMAGES = 50_000
COLUMNS = ("model", "top1", "img_size", "crop_pct", "interpolation")

Expected = dict[str, dict[str, str]]


def read_expected(source: str) -> Expected:
    """Read timm's `results-imagenet.csv` from a file or a URL; returns its rows by model.

    Raises:
        ValueError: it cannot be read, or lacks columns of that table.
    """
    return _parse(_text(source), source)


def keep_expected(source: str, folder: Path) -> None:
    """Copy the table to `folder`, where every summary of its records finds it."""
    text = _text(source)
    _parse(text, source)
    write_text(folder / "expected.csv", text)


def _text(source: str) -> str:
    try:
        if source.startswith(("https://", "http://")):
            with urllib.request.urlopen(source, timeout=30) as response:
                return response.read().decode()
        return Path(source).read_text(encoding="utf-8")
    except (OSError, urllib.error.URLError, UnicodeDecodeError) as error:
        raise ValueError(f"--expected {source}: cannot be read: {error}") from error


def _parse(text: str, source: str) -> Expected:
    reader = csv.DictReader(io.StringIO(text))
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or [])]:
        raise ValueError(
            f"--expected {source}: found no column {', '.join(missing)}; expected timm's results-imagenet.csv."
        )
    return {row["model"]: row for row in reader}


def check(record: Record, expected: Expected) -> str:
    """Return `agrees`, `flagged` if top-1 at lam = 0 differs by more than 0.1 points, or `not compared: REASON`."""
    row = expected.get(record["model"])
    if row is None:
        return "not compared: no published figure"
    if record["task"] != "single" or record["n"] != IMAGES:
        return f"not compared: {record['n']} images of task {record['task']}, not all {IMAGES} of the validation set"
    used = record.get("preprocessing") or {}
    if missing := [name for name in ("crop_pct", "interpolation") if name not in used]:
        return f"not compared: the record does not say {' and '.join(missing)}"
    pairs = {
        "img_size": (str(record["img_size"]), row["img_size"]),
        "crop_pct": (f"{used['crop_pct']:.3f}", f"{float(row['crop_pct']):.3f}"),
        "interpolation": (used["interpolation"], row["interpolation"]),
    }
    for name, (found, published) in pairs.items():
        if found != published:
            hint = "" if name == "interpolation" else " (see --img-size test)"
            return f"not compared: {name} {found}, published for {published}{hint}"
    baseline = _top1(record)
    if baseline is None:
        return "not compared: the record has no top1"
    return "agrees" if _near(baseline, float(row["top1"])) else "flagged"


def precision_notes(records: Iterable[Record]) -> list[str]:
    """Report whether autocast or channels_last change top-1 at lam = 0 by more than 0.1 points.

    Records with a `baseline_check` are compared with the same pass in float32 if `records` include it, else with the
    published figure.
    """
    compared = [r for r in records if r.get("baseline_check") in ("agrees", "flagged") and _top1(r) is not None]
    float32 = {_pixels(record): _top1(record) for record in compared if not _how(record)}
    same, moved, unknown = (defaultdict[str, list[str]](list) for _ in range(3))
    for record in compared:
        name, how, found, exact = record["model"], _how(record), _top1(record), float32.get(_pixels(record))
        if exact is not None and not _near(found, exact):
            moved[how].append(f"{name} ({found:.2f}, in float32 {exact:.2f})")
        elif exact is None and record["baseline_check"] == "flagged":
            unknown[how].append(name)
        else:
            same[how].append(name)
    lines = []
    for how in sorted({*same, *moved, *unknown} - {""}):
        if same[how]:
            lines.append(
                f"Measured in {how}: top-1 at lam = 0 of {len(same[how])} checkpoints is within {TOLERANCE} points of "
                "the float32 figure in this folder or, where there is none, of the published figure."
            )
        if moved[how]:
            names = ", ".join(sorted(moved[how]))
            lines.append(f"Measured in {how}: top-1 at lam = 0 changes by more than {TOLERANCE} points: {names}.")
        if unknown[how]:
            lines.append(
                f"Flagged, and measured in {how}: {', '.join(sorted(unknown[how]))}. To see whether that is the "
                "reason, run these again with --amp none --no-channels-last and the same --out."
            )
    return lines


def _how(record: Record) -> str:
    """Describe precision and memory format; an empty text for float32 and contiguous tensors."""
    amp, channels_last = record["key"].get("amp", "none"), record["key"].get("channels_last")
    return " and ".join([*([amp] if amp != "none" else []), *(["channels_last"] if channels_last else [])])


def _pixels(record: Record) -> str:
    """Identify the images and the checkpoint of a pass, whatever its precision."""
    free = ("amp", "channels_last", *QUESTION)
    return json.dumps({name: value for name, value in record["key"].items() if name not in free}, sort_keys=True)


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE + 1e-9


def _top1(record: Record) -> Any:
    tops = (r["baseline"] for r in record["results"] if (r["metric"], r["protocol"]) == ("top1", "fixed"))
    return next(tops, None)
