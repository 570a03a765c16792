"""One JSON file for each finished cell, written so that a crash cannot leave half of one."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from timm_csra.config import LOGITS

Record = dict[str, Any]


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
    return _read(path)


def _read(path: Path) -> Record:
    """Records of before there were two kinds of scores name none: they are of logits."""
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    if "scores" in record:
        record["kept_scores"] = record.pop("scores")  # what this was called then
    for row in (*record.get("results", ()), *record.get("all_settings", ())):
        settings = [lam for lam in str(row["lam"]).split(";") if lam]  # none of a rival
        row.setdefault("scores", ";".join([LOGITS] * len(settings)))
    return record


def write_record(path: Path, record: Record) -> None:
    """Write atomically; refuses NaN and infinity, which are not JSON."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False))


def read_records(folder: Path) -> list[Record]:
    """All records in the folder, of earlier sweeps too."""
    files = sorted((folder / "records").glob("*.json"))
    return [_read(file) for file in files]


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write these columns of the rows as CSV, atomically; floats with four decimals, p-values with three digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        digits = {name: ".3g" if name.startswith("p_") else ".4f" for name in row}
        writer.writerow({k: format(v, digits[k]) if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """To a temporary file beside `path`, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.", suffix=".tmp")
    try:
        os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is private; a result is not
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
