"""Check that every gain with an interval, in README and documentation, is in a table of `benchmarks.report`.

A figure is a gain and its interval, as in `+3.21 [+2.67, +3.75]`; a loss may be written without its sign. All three
numbers must be those of one row, rounded as they are written. A time with its interval must be in docs/performance.md,
character by character. Blocks of code are not checked, since they show the output of other commands, nor are pages that
report other runs, which are named with what they report. The exit status is 1 if a figure is in no table.
"""

import argparse
import csv
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
POOLED, SINGLE = "docs/run/pooled.csv", "docs/run/results.csv"
SETTINGS = ("fixed", "fixed_log_softmax", "log_softmax_vs_logits")
TABLES = [  # with their columns of gain and interval
    (POOLED, ("gain", "low", "high")),
    *((SINGLE, (f"gain_{setting}", f"{setting}_low", f"{setting}_high")) for setting in SETTINGS),
]
TIMES = "docs/performance.md"
OTHER_RUNS = {
    "docs/experiments.md": "trials of earlier commits, and docs/probe",
    TIMES: "times, printed by the command above each table",
}
NUMBER = r"[+\-−]?\d+\.\d+"
FIGURE = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]")

Triple = tuple[float, float, float]


def main(arguments: list[str] | None = None) -> int:
    """Check all pages, and print the figures that are in no table. Returns 0, or 1 if there are any."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, help="default: README.md and docs/*.md")
    pages = parser.parse_args(arguments).pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    rows = [row for name, columns in TABLES for row in triples(ROOT / name, columns)]
    times = {figure for _, figure in figures(ROOT / TIMES)}
    checked, faults = 0, 0
    for page in pages:
        name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else str(page)
        if name in OTHER_RUNS:
            print(f"{name}: not checked: {OTHER_RUNS[name]}")
            continue
        for line, figure in figures(page):
            checked += 1
            if figure not in times and not stands_in(figure, rows):
                faults += 1
                gain, low, high = figure
                print(f"{name}:{line}: {gain} [{low}, {high}] is in none of {POOLED}, {SINGLE}, {TIMES}")
    print(f"{checked} gains with intervals, {faults} of them in no table")
    return 1 if faults or not checked else 0


def triples(file: Path, columns: tuple[str, str, str]) -> Iterator[Triple]:
    """Yield gain and interval of each row that has them."""
    with file.open(encoding="utf-8", newline="") as opened:
        for row in csv.DictReader(opened):
            if all(row[column] for column in columns):
                gain, low, high = (float(row[column]) for column in columns)
                yield gain, low, high


def figures(page: Path) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """Yield line number and text of each figure of a page, outside blocks of code."""
    in_code = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        for found in FIGURE.finditer("" if in_code else line):
            gain, low, high = (text.replace("−", "-") for text in found.groups())
            yield number, (gain, low, high)


def stands_in(figure: tuple[str, str, str], rows: list[Triple]) -> bool:
    """Whether a row has these three numbers, or, for a loss without its sign, their negatives."""
    wanted = [float(text) for text in figure]
    # Half of the last digit, and the rounding of the table to four decimals.
    within = [0.5 * 10.0 ** -len(text.partition(".")[2]) + 1e-4 for text in figure]
    signed = figure[0][0] in "+-"
    for gain, low, high in rows:
        ways = [(gain, low, high)] if signed else [(gain, low, high), (-gain, -high, -low)]
        for way in ways:
            if all(math.fabs(a - b) <= c for a, b, c in zip(way, wanted, within, strict=True)):
                return True
    return False


if __name__ == "__main__":
    sys.exit(main())
