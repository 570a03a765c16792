"""Baseline first: what timm publishes for a checkpoint, against what was measured at lam = 0."""

import csv
import io
import urllib.error
import urllib.request
from pathlib import Path

from ..records.files import Record, write_text

TOLERANCE = 0.1  # percentage points of top-1
IMAGES = 50_000
COLUMNS = ("model", "top1", "img_size", "crop_pct", "interpolation")

Expected = dict[str, dict[str, str]]


def read_expected(source: str) -> Expected:
    """timm's `results-imagenet.csv`, from a file or a URL, by model.

    Raises:
        ValueError: it cannot be read, or is no such table.
    """
    return _parse(_text(source), source)


def keep_expected(source: str, folder: Path) -> None:
    """Put it beside the records, where every summary of the folder finds it."""
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
    """`agrees`, `flagged` where top-1 at lam = 0 is off by more than 0.1 points, or `not compared: why`."""
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
    tops = (r["baseline"] for r in record["results"] if (r["metric"], r["protocol"]) == ("top1", "fixed"))
    baseline = next(tops, None)
    if baseline is None:
        return "not compared: the record has no top1"
    return "agrees" if abs(baseline - float(row["top1"])) <= TOLERANCE + 1e-9 else "flagged"
