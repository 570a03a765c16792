"""One JSON file for each finished cell, written so that a crash cannot leave half of one; and their summary."""

import csv
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

Record = dict[str, Any]

SUMMARY_COLUMNS = (
    *("model", "data", "task", "img_size", "n", "columns", "metric", "protocol", "lam", "temperature"),
    *("baseline", "value", "gain", "ci_low", "ci_high", "grid", "kind", "status", "reason"),
)


def record_path(folder: Path, key: Record) -> Path:
    """Where the record of a cell goes: readable, and unique by the hash of everything that determines its result."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    readable = "--".join(str(key[name]) for name in ("model", "data", "task", "img_size"))
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in readable)
    return folder / "records" / f"{safe[-180:]}--{digest}.json"


def read_record(path: Path) -> Record | None:
    """The record of a finished cell, or None where it has not been finished."""
    if not path.is_file():
        return None
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def write_record(path: Path, record: Record) -> None:
    """Write atomically; refuses NaN and infinity, which are not JSON."""
    _write_atomically(path, json.dumps(record, indent=1, allow_nan=False))


def write_summary(folder: Path) -> Path:
    """`summary.csv` of all records in the folder, of earlier sweeps too: one row for each metric and protocol, and one
    without metric for a cell without result."""
    text = io.StringIO()
    writer = csv.DictWriter(text, SUMMARY_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for file in sorted((folder / "records").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        for result in record["results"] or [{}]:
            row = {**record, **result}
            writer.writerow(
                {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()}
            )
    path = folder / "summary.csv"
    _write_atomically(path, text.getvalue())
    return path


def _write_atomically(path: Path, text: str) -> None:
    """To a temporary file beside `path`, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
