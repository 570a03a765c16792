"""One JSON file for each finished cell, written so that a crash cannot leave half of one; JSON lines of many cells."""

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
    """A file that is not the record of a cell; the text names it and says what was found."""


def record_path(folder: Path, key: Record) -> Path:
    """Where the record of a cell goes: readable, and unique by the hash of everything that determines its result."""
    return folder / "records" / f"{readable(key)}--{Identity.of(key).result}.json"


def read_record(path: Path) -> Record | None:
    """The record of a finished cell, or None where it has not been finished.

    Raises:
        RecordError: there is a file, and it is no record, was cut, or is of an old form that lacks what is needed.
    """
    written = 0.0
    try:
        record, found = _parse(path.read_bytes())
        written = path.stat().st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        record, found = None, f"what cannot be read ({error.strerror})"
    if found:
        raise RecordError(f"{path}: found {found}, expected the record of a finished cell.")
    return _as_today(record, written)


def now() -> str:
    """The time that a record is finished at."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _parse(content: bytes) -> tuple[Any, str | None]:
    """A record, and what keeps it from being one."""
    if not content.strip():
        return None, "an empty file"
    try:
        record = json.loads(content, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:
        return None, f"no whole JSON ({error})"
    return record, wrong(record)


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _as_today(record: Record, written: float) -> Record:
    """What earlier versions wrote, as this one writes it; see `results_of`, too."""
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
        record["kept_scores"] = record.pop("scores")  # what this was called then
    record["results"] = results_of(record)
    for row in record.get("all_settings", ()):
        row.setdefault("scores", LOGITS)
        for before in RENAMED.keys() & row.keys():
            row[RENAMED[before]] = row.pop(before)
    record.setdefault("reason", None)
    record.setdefault("score_classes", "data")
    return record


def write_record(path: Path, record: Record) -> None:
    """Write atomically; refuses NaN and infinity, which are not JSON."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False))


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def read_records(folder: Path, warn: Callable[[str], object] = to_stderr) -> list[Record]:
    """All records in the folder, of earlier sweeps and of others too (`benchmarks.share`). What is no record is left
    where it is, and out here: `warn` is told of each."""
    records = []
    for file in sorted((folder / "records").glob("*.json")):
        try:
            record = read_record(file)
        except RecordError as error:
            warn(f"{error} It is left out: run the same sweep again, which measures its cell again, or delete it.")
            continue
        if record is not None:  # nobody has deleted it since
            records.append(record)
    for file in sorted((folder / "records").glob(f"*{LINES}")):
        for read in read_lines(file):
            if isinstance(read, RecordError):
                warn(f"{read} It is left out.")
            else:
                records.append(read)
    return records


def read_lines(path: Path) -> Iterator[Record | RecordError]:
    """The records of a file that has one a line; for a line that is none, what is wrong with it."""
    try:
        written, content = path.stat().st_mtime, path.read_bytes()
    except OSError as error:
        yield RecordError(f"{path}: found what cannot be read ({error.strerror}), expected a file of records.")
        return
    for number, line in enumerate(content.splitlines(), 1):
        record, found = _parse(line)
        if found:
            yield RecordError(f"{path}, line {number}: found {found}, expected the record of a finished cell.")
        else:
            yield _as_today(record, written)


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
