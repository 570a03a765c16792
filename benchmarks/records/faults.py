"""Check files of records before they are shared: their figures must be consistent, and contain no local paths."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from scipy.stats import norm

from timm_csra.evaluation.statistics import CONFIDENCE, RESAMPLES_KEPT

from .files import Record, RecordError, read_lines
from .identity import Identity
from .lines import PRIVATE, file_names
from .resampled import unpacked

LEAST = 1e-3  # percentage points by which rounding may make figures of one result disagree
# Absolute paths of POSIX and Windows, and a home folder, at the beginning of a word.
PATH = re.compile(r"""(?:^|[\s'"(=:])(?:/[^/\s]+/[^\s]|~/|[A-Za-z]:[\\/]|\\\\)""")
EXPECTED = {"kind": str, "head_classes": int, "weights_sha256": str}  # fields of a record with results
# A record keeps 200 of the 1,000 resamples behind the interval, so their spreads may differ by the factor SPREAD; and a
# quantile may fall on a step of the metric, which STEP allows for, in points.
SPREAD, STEP = 3.0, 0.05


def faults(paths: Iterable[Path], evaluation: int) -> list[str]:
    """List what is wrong with files of records; an empty list if nothing is.

    Args:
        paths: files that `write_lines` has written.
        evaluation: the version of the metrics and statistics that all records must have.
    """
    cells: dict[str, tuple[Path, int, Record]] = {}
    return [fault for path in paths for fault in _of_file(path, evaluation, cells)]


def _of_file(path: Path, evaluation: int, cells: dict[str, tuple[Path, int, Record]]) -> Iterator[str]:
    """`cells` maps each cell seen so far to its file, line number and record; this adds to it."""
    models: dict[str, None] = {}
    number = 0
    for number, record in enumerate(read_lines(path), 1):
        if isinstance(record, RecordError):
            yield str(record)
            continue
        models[record["model"]] = None
        yield from (f"{path}, line {number}: {fault}" for fault in _of_record(record, evaluation))
        digest = Identity.of(record["key"]).result
        where, line, first = cells.setdefault(digest, (path, number, record))
        if where == path and line != number:
            yield f"{path}, line {number}: the same cell as line {line}"
        elif where != path and _figures(first) != _figures(record):
            yield f"{path}, line {number}: the same cell as {where}, line {line}, with other figures"
    if not number:
        yield f"{path}: found no record"
    if len(models) > 1:
        yield f"{path}: found records of {len(models)} checkpoints, expected one"
    for model in models if len(models) == 1 else ():
        if path.name not in (expected := file_names(model)):
            yield f"{path}: found the records of {model}, expected the name {expected[0]}"


def _figures(record: Record) -> str:
    return json.dumps([record["status"], record["results"]], sort_keys=True)


def _of_record(record: Record, evaluation: int) -> Iterator[str]:
    key: dict[str, Any] = record["key"]
    if differing := sorted(name for name, value in key.items() if name in record and record[name] != value):
        yield f"{', '.join(differing)}: the record and its key disagree"
    if not record["requested"]:
        yield "no requested size"
    if record["status"] == "failed":
        yield f"a cell that failed ({record.get('reason')}), expected a measured cell, or one that does not apply"
    version = (key.get("evaluation") or {}).get("version")
    if version != evaluation:
        yield f"figures of version {version}, expected {evaluation}: measure again with this version of the sweep"
    if not key.get("data_fingerprint"):
        yield "no hash of the data"
    if record["status"] == "ok":
        yield from _of_measured(record)
    elif record["results"]:
        yield f"results, though its status is {record['status']}"
    yield from _of_origin(record)
    seen: set[tuple[str, ...]] = set()
    for result in record["results"]:
        what = f"{result['metric']}, {result['protocol']}"
        settings = ("scores", "lam", "temperature") if result["protocol"] == "curve" else ()
        name = (what, *(result.get(setting, "") for setting in settings))
        if name in seen:
            yield f"{what}: the same result twice"
        seen.add(name)
        yield from (f"{what}: {fault}" for fault in _of_result(result))


def _of_measured(record: Record) -> Iterator[str]:
    if not record["key"].get("weights"):
        yield "no hash of the weights"
    if not record["results"]:
        yield "no results, though its status is ok"
    for name, types in EXPECTED.items():
        if not isinstance(record.get(name), types):
            yield f"no {name}"


def _of_origin(record: Record) -> Iterator[str]:
    if named := sorted(name for name in PRIVATE if record.get(name)):
        yield f"{', '.join(named)}: paths on a local disk, which are of no use to others; remove them"
    for name in ("model", "data", "reason", "weights_from", "classes_from"):
        if PATH.search(str(record.get(name) or "")):
            advice = "start the sweep in the folder that contains it" if name == "model" else "remove it"
            yield f"{name}: a path on a local disk ({record[name]}): {advice}"
    commit = (record.get("environment") or {}).get("commit")
    if not commit or str(commit).endswith("-dirty"):
        yield f"measured at the commit {commit}, expected a commit of this repository, without local changes"
    try:
        datetime.fromisoformat(record["finished"])
    except ValueError:
        yield f"finished {record['finished']!r}, expected a time such as 2026-11-26T10:00:00+00:00"


def _of_result(result: Mapping[str, Any]) -> Iterator[str]:
    base, value, gain = (result[name] for name in ("baseline", "value", "gain"))
    if None in (base, value, gain):
        if not base is value is gain is None:
            yield f"found {base}, {value} and a gain of {gain}, expected all three or none"
        return
    if not (-LEAST <= base <= 100 + LEAST and -LEAST <= value <= 100 + LEAST):
        yield f"found {base} and {value}, expected percentages, 0 to 100"
    if abs(value - base - gain) > LEAST:
        yield f"a gain of {gain}, expected {value} - {base}"
    low, high = result["ci_low"], result["ci_high"]
    if low is None or high is None:
        if result.get("resampled"):
            yield "resampled gains without an interval"
        return
    if low > high:
        yield f"an interval from {low} to {high}, expected the lower end first"
    elif not low - LEAST <= gain <= high + LEAST:
        yield f"an interval from {low} to {high}, which does not contain the gain of {gain}"
    elif result.get("resampled"):
        yield from _of_resampled(result["resampled"], low, high)


def _of_resampled(packed: str, low: float, high: float) -> Iterator[str]:
    resampled = unpacked(packed)
    if len(resampled) != RESAMPLES_KEPT:
        yield f"{len(resampled)} resampled gains, expected {RESAMPLES_KEPT}"
        return
    mean, spread = float(resampled.mean()), float(resampled.std(ddof=1))
    expected = (high - low) / (2 * float(norm.ppf((1 + CONFIDENCE) / 2)))
    if not low - STEP <= mean <= high + STEP:
        yield f"resampled gains around {mean:.2f}, expected {low:.2f} to {high:.2f}"
    if not expected / SPREAD - STEP <= spread <= expected * SPREAD + STEP:
        yield f"resampled gains with a standard deviation of {spread:.2f}, expected {expected:.2f} from the interval"
