"""Tabulate what wrapping means for every timm architecture: kind of head, grid, cost, or why it is not supported.

The command writes one row for each architecture to a CSV file, and prints the counts. It neither downloads nor creates
weights: shapes come from the meta device. Started again with the same file, it does only what is missing or failed.
"""

import argparse
import csv
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import timm_csra
from timm_csra.patching import pool_types

from .argument_types import positive
from .records.files import write_table

Row = dict[str, str]

COLUMNS = (
    *("architecture", "module", "class", "head", "classifier", "pool", "features", "prefix_tokens"),
    *("input_size", "grid", "locations", "classes", "kind", "path"),
    *("parameters", "macs", "extra_macs", "extra_share", "reason", "timm", "timm_csra"),
)
KINDS = ("exact", "nonlinear", "token", "no classifier", "unsupported", "failed")
VERSIONS = {"timm": timm.__version__, "timm_csra": timm_csra.__version__}

EXAMPLES = """
examples:
  python -m benchmarks.coverage --models 'vit_small*,convnext*'
  python -m benchmarks.coverage --out docs/coverage.csv --fresh

kind: exact (the mean of the location scores is the plain logit), nonlinear (it is not), token (class token or attention
pooling), no classifier (num_classes=0), unsupported (refused; see reason), failed (an error; see reason).
extra_share: MACs that scoring the locations adds, divided by the plain model's, at the model's own input size.
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the table. Returns 0; 1 if an architecture failed; 2 if none matches; 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    log = Console(stderr=True)
    names = [name for name in timm.list_models() if name in set(_matching(args.models))]
    if not names:
        log.print(f"--models: {args.models!r} matches none of timm's {len(timm.list_models())} architectures.")
        return 2
    try:
        rows = {} if args.fresh else read_rows(args.out)
    except ValueError as error:
        log.print(f"benchmarks.coverage: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    # Keep rows of other patterns if this version of timm has the architecture and wrote the row.
    rows = {name: row for name, row in rows.items() if VERSIONS.items() <= row.items() and timm.is_model(name)}
    missing = [name for name in names if name not in rows or rows[name]["kind"] == "failed"]
    started, interrupted = time.monotonic(), False
    if len(missing) < len(names):
        log.print(f"{len(names) - len(missing)} of {len(names)} are already in {args.out} (--fresh repeats them).")
    try:
        for row in _measure_all(missing, args.jobs, log):
            rows[row["architecture"]] = row
            _write(args.out, rows)
    except KeyboardInterrupt:
        interrupted = True
        log.print(f"Stopped; {args.out} has the finished architectures. Start again to do the rest.")
    wanted = [rows[name] for name in names if name in rows]
    print_counts(wanted, Console(width=None if sys.stdout.isatty() else 150))
    print(
        f"{len(missing)} architectures in {time.monotonic() - started:.0f} s with {args.jobs} jobs; table: {args.out}"
    )
    return 130 if interrupted else int(any(row["kind"] == "failed" for row in wanted))


def measure(name: str) -> Row:
    """Return the row of one architecture; an error becomes a row, too."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row = _row(name)
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
        row |= _anatomy(model)
        explanation = timm_csra.explain(model)
    except Exception as error:  # any error of timm or torch is this architecture's result
        return row | {"kind": "failed", "reason": f"{type(error).__name__}: {error}"}
    if explanation.unsupported:
        kind = "unsupported" if model.num_classes else "no classifier"
        return row | {"kind": kind, "reason": explanation.unsupported}
    assert explanation.input_size is not None
    return row | {
        "features": str(explanation.features),
        "prefix_tokens": str(explanation.prefix_tokens),
        "input_size": "x".join(map(str, explanation.input_size)),
        "grid": "x".join(map(str, explanation.grid)) if explanation.grid else "",
        "locations": str(explanation.locations),
        "classes": str(explanation.num_classes),
        "kind": str(explanation.kind),
        "path": str(explanation.path),
        "macs": str(explanation.macs),
        "extra_macs": str(explanation.extra_macs),
        "extra_share": f"{explanation.extra_macs / explanation.macs:.4f}",
    }


def _row(name: str) -> Row:
    return dict.fromkeys(COLUMNS, "") | {"architecture": name} | VERSIONS


def _anatomy(model: nn.Module) -> Row:
    """Return the class names of the parts of a model's head."""
    classifiers = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    head = getattr(model, "head", None)
    return {
        "module": type(model).__module__,
        "class": type(model).__name__,
        "head": type(head).__name__ if isinstance(head, nn.Module) else "",
        "classifier": "+".join(type(classifier).__name__ for classifier in classifiers),
        "pool": next(iter(pool_types(model)), ""),
        "parameters": str(sum(parameter.numel() for parameter in model.parameters())),
    }


def kind_of_head(row: Row) -> tuple[str, ...]:
    """Return what identifies the kind of head: architectures with equal values run the same code after the features."""
    return tuple(row[name] for name in ("class", "pool", "head", "classifier", "features"))


def smallest_of_each_kind(rows: list[Row]) -> list[Row]:
    """Return the architecture with the fewest parameters of every kind of head that can be wrapped."""
    smallest: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda row: int(row["parameters"] or 0)):
        if row["path"]:
            smallest.setdefault(kind_of_head(row), row)
    return list(smallest.values())


def print_counts(rows: list[Row], console: Console) -> None:
    """Print the number of architectures by kind and path, and the reasons why some cannot be wrapped."""
    counts = Counter((row["kind"], row["path"]) for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("kind", "path"):
        table.add_column(name)
    for name in ("architectures", "kinds of head"):
        table.add_column(name, justify="right")
    for (kind, path), count in sorted(counts.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1])):
        heads = {kind_of_head(row) for row in rows if path and (row["kind"], row["path"]) == (kind, path)}
        table.add_row(kind, path, str(count), str(len(heads)) if heads else "")
    console.print(table)
    wrapped = [row for row in rows if row["path"]]
    classifiers = sum(row["kind"] != "no classifier" for row in rows)
    heads = {kind_of_head(row) for row in wrapped}
    console.print(
        f"timm {timm.__version__}: {len(wrapped)} of the {classifiers} architectures with a classifier can be wrapped "
        f"({len(heads)} kinds of head); {len(rows) - classifiers} more have no classifier.",
        highlight=False,
    )
    for row in rows:
        if row["kind"] in ("unsupported", "failed"):
            console.print(f"{row['kind']}: {row['architecture']}: {row['reason']}", markup=False, highlight=False)


def read_rows(path: Path) -> dict[str, Row]:
    """Read the table at `path`, by architecture; empty if there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: found other columns than this version writes; choose another --out, or --fresh.")
        return {row["architecture"]: row for row in reader}


def _write(path: Path, rows: dict[str, Row]) -> None:
    order = {name: position for position, name in enumerate(timm.list_models())}
    write_table(path, COLUMNS, sorted(rows.values(), key=lambda row: order[row["architecture"]]))


def _matching(patterns: str) -> Iterator[str]:
    for pattern in patterns.split(","):
        yield from timm.list_models(pattern.strip())


def _measure_all(names: list[str], jobs: int, log: Console) -> Iterator[Row]:
    """Yield rows as they are finished. Each thread uses one process, so that a crash is of a known architecture."""
    local = threading.local()
    pools: list[ProcessPoolExecutor] = []

    def in_process(name: str) -> Row:
        if getattr(local, "pool", None) is None:
            local.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _ignore_interrupts)
            pools.append(local.pool)
        try:
            return local.pool.submit(measure, name).result()
        except BrokenProcessPool:
            local.pool = None
            return _row(name) | {"kind": "failed", "reason": "its process died, perhaps because memory ran out"}

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=log, transient=True) as progress, ThreadPoolExecutor(jobs) as threads:
        overall = progress.add_task("", total=len(names))
        futures = [threads.submit(in_process, name) for name in names]
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                row = future.result()
                progress.update(overall, advance=1, description=row["architecture"])
                if not log.is_terminal and (
                    count % 100 == 0 or count == len(names)
                ):  # a terminal has a progress bar instead
                    log.print(f"{count} of {len(names)}", highlight=False)
                yield row
        finally:
            threads.shutdown(cancel_futures=True)  # waits for the architectures in progress
            for pool in pools:
                pool.shutdown()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C: it lets these processes finish


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", default="*", metavar="PATTERN", help="timm names with wildcards, comma-separated (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/coverage.csv"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--fresh", action="store_true", help="repeat architectures that the file already has")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
