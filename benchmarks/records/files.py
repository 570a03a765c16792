"""Write and read records: a JSON file for each finished cell, written atomically, and JSON lines of many cells."""

import csv
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from timm_csra.card import RENAMED, results_of
from timm_csra.config import LOGITS

from .identity import Identity, readable
from .shape import wrong

Record = dict[str, Any]
LINES = ".jsonl"  # ending of files with one record a line


class RecordError(ValueError):
    """A file is not the record of a cell; the text names the file and says what was found."""


def record_path(folder: Path, key: Record) -> Path:
    """Path of a cell's record: a readable name, and a hash of everything that determines the result."""
    return folder / "records" / f"{readable(key)}--{Identity.of(key).result}.json"


def read_record(path: Path) -> Record | None:
    """Read the record of a cell, or return None if there is no file.

    Raises:
        RecordError: the file is not a record, is truncated, or is of an old version that lacks required fields.
    """
    written = 0.0
    try:
        record, found = _parse(path.read_bytes())
        written = path.stat().st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        record, found = None, f"an unreadable file ({error.strerror})"
    if found:
        raise RecordError(f"{path}: found {found}, expected the record of a finished cell.")
    return _as_today(record, written)


def now() -> str:
    """The present time, as records store it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _parse(content: bytes) -> tuple[Any, str | None]:
    """Return the record, or None; and what is wrong with it, or None."""
    if not content.strip():
        return None, "an empty file"
    try:
        record = json.loads(content, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:
        return None, f"truncated or invalid JSON ({error})"
    return record, wrong(record)


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _as_today(record: Record, written: float) -> Record:
    """Convert a record of an earlier version to the present format; see also `results_of`."""
    requested = record.setdefault("requested", str(record["img_size"]))
    if isinstance(requested, str):
        record["requested"] = [requested]
    if record.get("own_size") is None:
        record["own_size"] = record["img_size"] if "1x" in record["requested"] else None
    if "finished" not in record:
        record["finished"] = datetime.fromtimestamp(written, UTC).isoformat(timespec="microseconds")
    environment = record.get("environment") or {}
    if record["key"].get("device") == "cuda" and "tf32" not in record["key"] and "cudnn_allow_tf32" in environment:
        tf32 = [environment.get("float32_matmul_precision"), environment["cudnn_allow_tf32"]]
        record["key"] = record["key"] | {"tf32": tf32}
    if "scores" in record:
        record["kept_scores"] = record.pop("scores")  # the former name
    record["results"] = results_of(record)
    for row in record.get("all_settings", ()):
        row.setdefault("scores", LOGITS)
        for before in RENAMED.keys() & row.keys():
            row[RENAMED[before]] = row.pop(before)
    record.setdefault("reason", None)
    record.setdefault("score_classes", "data")
    return record


def write_record(path: Path, record: Record) -> None:
    """Write a record atomically.

    Raises:
        ValueError: the record has a NaN or an infinity, which JSON cannot express.
    """
    write_text(path, json.dumps(record, indent=1, allow_nan=False))


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def read_records(folder: Path, warn: Callable[[str], object] = to_stderr) -> list[Record]:
    """Read all records in the folder, including files of `benchmarks.share`. Files and lines that are not records are
    skipped, with a call of `warn` for each."""
    records = []
    for file in sorted((folder / "records").glob("*.json")):
        try:
            record = read_record(file)
        except RecordError as error:
            warn(f"{error} It is skipped: run the same sweep again to measure its cell again, or delete it.")
            continue
        if record is not None:  # else another process has just deleted it
            records.append(record)
    for file in sorted((folder / "records").glob(f"*{LINES}")):
        for read in read_lines(file):
            if isinstance(read, RecordError):
                warn(f"{read} It is skipped.")
            else:
                records.append(read)
    return records


def read_lines(path: Path) -> Iterator[Record | RecordError]:
    """Yield the record of each line of a file, or a `RecordError` for a line that is not a record."""
    try:
        written, content = path.stat().st_mtime, path.read_bytes()
    except OSError as error:
        yield RecordError(f"{path}: found an unreadable file ({error.strerror}), expected a file of records.")
        return
    for number, line in enumerate(content.splitlines(), 1):
        record, found = _parse(line)
        if found:
            yield RecordError(f"{path}, line {number}: found {found}, expected the record of a finished cell.")
        else:
            yield _as_today(record, written)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write columns of the rows as CSV, atomically: floats with four decimals, p-values with three digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        digits = {name: ".3g" if name.startswith("p_") else ".4f" for name in row}
        writer.writerow({k: format(v, digits[k]) if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: to a temporary file beside `path`, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.", suffix=".tmp")
    try:
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
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
