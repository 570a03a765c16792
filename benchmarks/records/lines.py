"""Records of a checkpoint as lines of one file, to be sent to others: what is wrong with such a file, and which of a
record's fields say where it was made."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import LINES, Record, RecordError, read_lines, write_text
from .identity import Identity

PRIVATE = ("where", "traceback", "kept_scores")  # places on the disk of who has measured


def write_lines(files: Mapping[str, Path], records: Iterable[Record]) -> list[Path]:
    """Write to the file of each checkpoint a record a line, in the order of their keys, without `PRIVATE`."""
    by_model: dict[str, list[Record]] = {}
    for record in records:
        by_model.setdefault(record["model"], []).append(record)
    for model, mine in sorted(by_model.items()):
        lines = [
            json.dumps({name: value for name, value in record.items() if name not in PRIVATE}, allow_nan=False)
            for record in sorted(mine, key=lambda record: json.dumps(record["key"], sort_keys=True))
        ]
        write_text(files[model], "\n".join([*lines, ""]))
    return [files[model] for model in sorted(by_model)]


def files_of(folder: Path, models: Iterable[str]) -> tuple[dict[str, Path], list[Record]]:
    """Which file in a folder is that of each checkpoint, a file for each, and the records that these files have now.

    Raises:
        RecordError: such a file has a line that is no record, which would be lost if it was written anew.
    """
    there = {file.name.casefold(): file for file in folder.glob(f"*{LINES}")}
    taken: dict[str, str] = {}
    files: dict[str, Path] = {}
    before: list[Record] = []
    for model in sorted(models):
        for name in file_names(model):
            if name.casefold() not in taken and name.casefold() in there:
                found = _whole(there[name.casefold()])
                taken[name.casefold()] = found[0]["model"] if found else model
                before += found
            if taken.setdefault(name.casefold(), model) == model:
                files[model] = there.get(name.casefold(), folder / name)
                break
    return files, [record for record in before if record["model"] in files]


def _whole(file: Path) -> list[Record]:
    found: list[Record] = []
    for read in read_lines(file):
        if isinstance(read, RecordError):
            raise RecordError(f"{read} Mend or delete that line first: the file is to be written anew.")
        found.append(read)
    if len(models := {record["model"] for record in found}) > 1:
        raise RecordError(f"{file}: found records of {len(models)} checkpoints, expected one. Mend or delete it first.")
    return found


def file_names(model: str) -> tuple[str, str]:
    """Of the records of a checkpoint; the second where a checkpoint of a similar name has the first."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in model)[-180:]
    return name + LINES, f"{name}--{hashlib.sha256(model.encode()).hexdigest()[:8]}{LINES}"


def faults(path: Path, evaluation: int, least: float = 1e-3) -> list[str]:
    """What keeps a file from being taken among others, in words; nothing where it is well.

    Args:
        path: of a file that `write_lines` has written.
        evaluation: the version of what is computed from scores, which all records of a table share.
        least: points by which figures of one result may disagree.
    """
    try:
        read = list(read_lines(path))
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    records = [record for record in read if not isinstance(record, RecordError)]
    found = [str(error) for error in read if isinstance(error, RecordError)]
    if not records:
        return found or [f"{path}: found no record"]
    seen: dict[str, int] = {}
    for number, record in enumerate(read, 1):
        if isinstance(record, RecordError):
            continue
        found += [f"{path}, line {number}: {fault}" for fault in _faults(record, evaluation, least)]
        digest = Identity.of(record["key"]).result
        if digest in seen:
            found.append(f"{path}, line {number}: the same cell as line {seen[digest]}")
        seen.setdefault(digest, number)
    models = {record["model"] for record in records}
    if len(models) > 1:
        found.append(f"{path}: found records of {len(models)} checkpoints, expected one")
    elif path.name not in (expected := file_names(records[0]["model"])):
        found.append(f"{path}: found the records of {records[0]['model']}, expected the name {expected[0]}")
    return found


def _faults(record: Record, evaluation: int, least: float) -> Iterator[str]:
    key: dict[str, Any] = record["key"]
    if differing := sorted(name for name, value in key.items() if name in record and record[name] != value):
        yield f"{', '.join(differing)}: the record and its key disagree"
    if record["status"] == "failed":
        yield f"a cell that failed ({record.get('reason')}), expected what was measured, or does not apply"
    version = (key.get("evaluation") or {}).get("version")
    if version != evaluation:
        yield f"figures of version {version}, expected {evaluation}: measure again with this version of the sweep"
    if record["status"] == "ok" and not key.get("weights"):
        yield "no hash of the weights"
    if named := sorted(name for name in PRIVATE if record.get(name)):
        yield f"{', '.join(named)}: places on somebody's disk, which others have no use for"
    for result in record["results"]:
        what = f"{result['metric']}, {result['protocol']}"
        base, value, gain = (result[name] for name in ("baseline", "value", "gain"))
        if None in (base, value, gain):
            continue
        if not (-least <= base <= 100 + least and -least <= value <= 100 + least):
            yield f"{what}: found {base} and {value}, expected percent"
        if abs(value - base - gain) > least:
            yield f"{what}: a gain of {gain}, expected {value} - {base}"
        low, high = result["ci_low"], result["ci_high"]
        if low is not None and high is not None and low > high:
            yield f"{what}: an interval from {low} to {high}"
