"""Check that a JSON value has the fields, types and values that readers of records rely on."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Any

from .resampled import unpacked

STATUS = ("ok", "failed", "not_applicable")
REQUEST = re.compile(r"test|(?=.*[1-9])(\d{1,6}|\d{0,6}\.?\d{1,6}x)")  # a requested size: `224`, `1.5x`, `test`
PIXELS = re.compile(r"\d{1,6}x\d{1,6}")
LARGEST = 1e18  # largest number accepted, so that arithmetic with it stays finite

Types = type | tuple[type, ...]
WORDS, TEXT, COUNT, NUMBER = str, (str, NoneType), (int, NoneType), (float, int, NoneType)

NEEDED: dict[str, Types] = {
    **dict.fromkeys(("status", "model", "data", "task"), WORDS), "img_size": (int, str), "n": int,
    "key": dict, "results": list,
}  # fmt: skip
OPTIONAL: dict[str, Types] = {
    **dict.fromkeys(("reason", "kind", "where", "weights_sha256", "classes_from", "weights_from", "traceback"), TEXT),
    **dict.fromkeys(("head_classes", "columns", "grid"), COUNT),
    **dict.fromkeys(("macs", "extra_macs", "param_count", "seconds", "missing_images", "images_run"), NUMBER),
    **dict.fromkeys(("all_settings", "left_out"), list), "requested": (list, str), "own_size": (int, str, NoneType),
    **dict.fromkeys(("finished", "score_classes"), WORDS), **dict.fromkeys(("phases", "environment"), dict),
    **dict.fromkeys(("preprocessing", "agreement", "rival_macs", "calibration"), (dict, NoneType)),
}  # fmt: skip
NEEDED_KEY: dict[str, Types] = {"model": WORDS}  # keys of old records have no more
OPTIONAL_KEY: dict[str, Types] = {
    **dict.fromkeys(("weights", "data_fingerprint", "device"), TEXT), "grid": COUNT, "scoring": COUNT,
    "test_crop_pct": NUMBER, "evaluation": (dict, NoneType), "settings": list,
    "data": WORDS, "task": WORDS, "img_size": (int, str),
}  # fmt: skip
NEEDED_RESULT: dict[str, Types] = {
    **dict.fromkeys(("metric", "protocol", "lam", "temperature"), WORDS),
    **dict.fromkeys(("baseline", "value", "gain", "ci_low", "ci_high"), NUMBER),
}
OPTIONAL_RESULT: dict[str, Types] = {
    **dict.fromkeys(("test", "no_interval", "resampled"), TEXT), "scores": WORDS, "n": COUNT, "classes": COUNT,
    "p_value": NUMBER,
}  # fmt: skip
NEEDED_AGREEMENT: dict[str, Types] = {"left_out": list, "reason": TEXT, "images": int, "data": WORDS}
NEEDED_LEFT_OUT: dict[str, Types] = dict.fromkeys(("metric", "scores", "reason"), WORDS)


def wrong(record: Any) -> str | None:
    """Return why a JSON value is not a record, or None if it is one."""
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}"
    return next(_wrong(record), None)


def _wrong(record: dict[str, Any]) -> Iterator[str]:
    yield from _types(record, NEEDED, OPTIONAL, "a record")
    key, environment = record["key"], record.get("environment", {})
    yield from _types(key, NEEDED_KEY, OPTIONAL_KEY, "a key")
    yield from _types(key.get("evaluation") or {}, {}, {"version": COUNT}, "an evaluation")
    yield from _types(environment, {}, {"packages": dict}, "an environment")
    for name in ("phases", "rival_macs"):
        values = record.get(name) or {}
        yield from _types(values, {}, dict.fromkeys(values, NUMBER), name)
    if (agreement := record.get("agreement")) is not None:
        yield from _types(agreement, NEEDED_AGREEMENT, {}, "an agreement")
        yield from (
            f"a name that is a {type(name).__name__}" for name in agreement["left_out"] if type(name) is not str
        )
    for row in record.get("left_out", ()):
        yield from _types(row, NEEDED_LEFT_OUT, {}, "what is left out")
    for row in record.get("all_settings", ()):
        yield from _types(row, {}, {}, "one of all_settings")
    if record["status"] not in STATUS:
        yield f"the status {record['status']!r}, expected one of {', '.join(STATUS)}"
    requested = record.get("requested", [])
    for size in [requested] if isinstance(requested, str) else requested:
        if not (isinstance(size, str) and (REQUEST.fullmatch(size) or PIXELS.fullmatch(size))):
            yield f"the requested size {size!r}, expected pixels, a multiple or test"
    for size in (record["img_size"], key.get("img_size", 1), record.get("own_size") or 1):
        if not (REQUEST.fullmatch(str(size)) or PIXELS.fullmatch(str(size))):
            yield f"the size {size!r}, expected pixels"
    for row in record["results"]:
        yield from _types(row, NEEDED_RESULT, OPTIONAL_RESULT, "a result")
        yield from _wrong_result(row)
    yield from _without_fixed(record["results"])


def _wrong_result(row: Mapping[str, Any]) -> Iterator[str]:
    what = f"{row['metric']}, {row['protocol']}"
    for name in ("lam", "temperature"):
        parts = [part for part in re.split("[;+]", row[name]) if part]
        if not all(map(_is_number, parts)) or (row["protocol"] == "curve" and len(parts) != 1):
            yield f"{what}: {name} {row[name]!r}, expected numbers"
    if (row["ci_low"] is None) != (row["ci_high"] is None):
        yield f"{what}: an interval with one end only"
    if row["gain"] is None and row["ci_low"] is not None:
        yield f"{what}: an interval without a gain"
    if row["gain"] is not None and (row["baseline"] is None or row["value"] is None):
        yield f"{what}: a gain without a baseline and a value"
    if row.get("p_value") is not None and not (row["gain"] is not None and 0 <= row["p_value"] <= 1):
        yield f"{what}: a p-value of {row['p_value']}, expected a gain and 0 to 1"
    if (packed := row.get("resampled")) is not None:
        try:
            resampled = unpacked(packed)
        except ValueError as error:
            yield f"{what}: resampled gains that cannot be read ({error})"
        else:
            if len(resampled) < 2 or not all(map(math.isfinite, resampled.tolist())):
                yield f"{what}: resampled gains that are fewer than two, or not finite"


def _without_fixed(results: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    fixed = {row["metric"] for row in results if row["protocol"] == "fixed"}
    yield from (
        f"results of {row['metric']} without the protocol fixed" for row in results if row["metric"] not in fixed
    )


def _types(found: Any, needed: Mapping[str, Types], optional: Mapping[str, Types], what: str) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{what} that is a {type(found).__name__}"
        return
    yield from (f"{what} without {name}" for name in needed if name not in found)
    for name, types in (*needed.items(), *optional.items()):
        value = found.get(name)
        if name in found and (not isinstance(value, types) or isinstance(value, bool)):
            yield f"{what} whose {name} is a {type(value).__name__}"
        elif isinstance(value, (int, float)) and not abs(value) < LARGEST:
            yield f"{what} whose {name} is not finite"


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False
