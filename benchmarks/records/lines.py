"""Write the records of each checkpoint as JSON lines of one file, without fields that contain local paths."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .files import LINES, Record, RecordError, read_lines, write_text

PRIVATE = ("where", "traceback", "kept_scores")  # fields with local paths


def write_lines(files: Mapping[str, Path], records: Iterable[Record]) -> list[Path]:
    """Write the records of each checkpoint to its file, one a line, sorted by key, without `PRIVATE` fields.

    Returns:
        The files.
    """
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
    """Return the file of each checkpoint in a folder, and the records that these files already hold.

    Raises:
        RecordError: a line of such a file is not a record; rewriting the file would lose it.
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
            raise RecordError(f"{read} Correct or delete that line first: rewriting the file would lose it.")
        found.append(read)
    if len(models := {record["model"] for record in found}) > 1:
        raise RecordError(f"{file}: found records of {len(models)} checkpoints, expected one. Delete the file first.")
    return found


def file_names(model: str) -> tuple[str, str]:
    """Names for the file of a checkpoint; the second is used if a checkpoint with a similar name has the first."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in model)[-180:]
    return name + LINES, f"{name}--{hashlib.sha256(model.encode()).hexdigest()[:8]}{LINES}"
