"""Write a self-contained page from the records of a sweep, and its plots and tables as files.

The folder RUN_DIR/report gets `index.html` (which needs no network), each plot as PNG and SVG, plots of the whole run
in `figures`, `results.md`, `results.csv` with timm's column names, `pooled.csv` with mean gains over checkpoints, and
`compute.csv` with gain and cost of the alternatives to wrapping. Gains are in percentage points over lam = 0, with
95 % intervals; p-values have Holm's correction over the checkpoints of the same data, task, requested size, metric and
protocol.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from timm_csra.evaluation.statistics import AGREEMENT

from .records.files import write_table, write_text
from .reporting.documents import RESULT_COLUMNS, TIMM_COLUMNS, has_agreement, markdown, timm_rows
from .reporting.figures import COSTS, ways, write_figures
from .reporting.page import page, page_data, write_plots
from .reporting.pooled import COLUMNS, pooled, unpooled
from .reporting.summary import read_folder


def main(arguments: list[str] | None = None) -> int:
    """Write the report. Returns 0, or 2 if there are no records or they cannot be read."""
    args = _parser().parse_args(arguments)
    screen, log = Console(), Console(stderr=True)
    warn = partial(log.print, markup=False, highlight=False, soft_wrap=True)
    try:
        folder = read_folder(args.run_dir, warn)
    except ValueError as error:
        warn(f"benchmarks.report: {error}")
        return 2
    records = folder.counted
    if not records:
        warn(
            f"benchmarks.report: no records in {args.run_dir / 'records'}; expected the --out folder of a sweep. Run "
            "python -m benchmarks.sweep --sample first."
        )
        return 2
    out = args.out or args.run_dir / "report"
    rows = [row for row in folder.rows if row.get("gain") is not None and not row["not_counted"]]
    notes = [*folder.notes, *unpooled(rows)]
    data = page_data(records, rows, notes)
    write_text(out / "index.html", page(data))
    write_text(out / "results.md", markdown(records, rows, notes))
    columns = [name for name in RESULT_COLUMNS if has_agreement(records) or AGREEMENT not in name]
    write_table(out / "results.csv", (*TIMM_COLUMNS, *columns), timm_rows(records))
    write_table(out / "pooled.csv", COLUMNS, [one.as_row() for one in pooled(rows)])
    write_table(out / "compute.csv", COSTS, ways(rows))
    plots = [] if args.no_plots else write_plots(data, out)
    figures = write_figures(records, rows, out)
    screen.print(f"{out / 'index.html'}: {len(records)} records", highlight=False, soft_wrap=True)
    if replaced := len(folder.records) - len(records):
        screen.print(f"{replaced} records left out, since newer ones replace them; see summary.csv", soft_wrap=True)
    for note in notes:
        screen.print(note, markup=False, highlight=False, soft_wrap=True)
    screen.print(
        f"{len(plots)} plots, {len(figures)} figures, results.md, results.csv, pooled.csv and compute.csv beside it",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        epilog="example:\n  python -m benchmarks.sweep --sample && python -m benchmarks.report results/sample",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the --out folder of a sweep")
    parser.add_argument("--out", type=Path, help="folder (default: RUN_DIR/report)")
    parser.add_argument(
        "--no-plots", action="store_true", help="do not write plots of single data sets, tasks and sizes"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
