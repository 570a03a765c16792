"""Collect records of sweeps to share with others, one file of JSON lines for each checkpoint; and check such files.

The command merges the records of all folders with those that a file already has, and keeps the newest of each cell. It
leaves out failed cells, records that the report does not count, and local paths. The other commands read a folder with
such files in `records/` like the folder of a sweep: `python -m benchmarks.report FOLDER`.
"""

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from rich.console import Console

from .records.faults import faults
from .records.files import LINES, Record, RecordError, read_records
from .records.lines import files_of, write_lines
from .reporting.counted import UNDER
from .reporting.summary import not_counted, rows_of
from .scoring.software import EVALUATION


def main(arguments: list[str] | None = None) -> int:
    """Write or check files. Returns 0; 1 if a file has a fault; 2 if there is nothing to write or check."""
    args = _parser().parse_args(arguments)
    screen, log = Console(soft_wrap=True), Console(stderr=True)
    warn = partial(log.print, markup=False, highlight=False, soft_wrap=True)
    if args.check:
        return _check(args.paths, screen, warn)
    found: list[Record] = []
    for run in args.paths:
        if not (measured := read_records(run, warn)):
            warn(f"benchmarks.share: no records in {run / 'records'}; expected the --out folder of a sweep.")
            return 2
        found += measured
    try:
        files, before = files_of(args.out / "records", {record["model"] for record in found})
    except RecordError as error:
        warn(f"benchmarks.share: {error}")
        return 2
    every = [*found, *before]
    why = [
        "failed" if one["status"] == "failed" else reason for one, reason in zip(every, _replaced(every), strict=True)
    ]
    written = write_lines(files, [record for record, reason in zip(every, why, strict=True) if not reason])
    if left := Counter(filter(None, why)):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left.items()))
        warn(f"{args.out}: {left.total()} records left out: {reasons}")
    return _check(written, screen, warn)


def _replaced(records: list[Record]) -> list[str | None]:
    """Return why the report does not count each record, or None. Records counted under another name may be shared."""
    found = not_counted(len(records), rows_of(records))
    return [None if why and why.startswith(UNDER) else why for why in found]


def _check(paths: list[Path], screen: Console, warn: partial[None]) -> int:
    found_in = {path: _files(path) for path in paths if path.exists()}
    files = [file for found in found_in.values() for file in found]
    if nothing := [str(path) for path in paths if not found_in.get(path)]:
        warn(f"benchmarks.share: {', '.join(nothing)}: found no {LINES} file; expected files that --out has written")
        return 2
    found = faults(files, EVALUATION)
    for fault in found:
        screen.print(fault, markup=False, highlight=False)
    total = sum(file.stat().st_size for file in files)
    verdict = f"{len(found)} faults" if found else "no fault"
    screen.print(f"{len(files)} files, {total / 1e6:.1f} MB: {verdict}", markup=False, highlight=False)
    return 1 if found else 0


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob(f"*{LINES}") if file.is_file()) if path.is_dir() else [path]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.share",
        description=__doc__,
        epilog="examples:\n  python -m benchmarks.share results --out docs/evidence\n"
        "  python -m benchmarks.share --check docs/evidence",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="--out folders of sweeps; with --check, files or folders"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write FOLDER/records/MODEL.jsonl, and check the files"
    )
    what.add_argument(
        "--check", action="store_true", help="report what is wrong with files, or with all files of a folder"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
