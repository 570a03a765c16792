"""One JSON file for each finished cell, written so that a crash cannot leave half of one; and their summary."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
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
    files = sorted((folder / "records").glob("*.json"))
    records = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    rows = ({**record, **result} for record in records for result in record["results"] or [{}])
    path = folder / "summary.csv"
    write_table(path, SUMMARY_COLUMNS, rows)
    return path


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write these columns of the rows as CSV, atomically; floats with four decimals."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()})
    _write_atomically(path, text.getvalue())


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
