"""Print a summary of a sweep with too many cells for a table."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..records.files import Record
from .legends import legend
from .summary import FIRST_METRIC, OVER_PLAIN, Row, task
from .tables import MANY, by_metric, gain, known, number, print_failure, print_notes, print_prose, short

EXTREMES = 10  # number of cells with the largest gains, and with the largest losses
REASONS = 10  # number of reasons for cells without a result
LEGEND_OF_EXTREMES = (
    "By the first metric of each task, with the protocol in which a cell gains or loses most. Intervals are not "
    "corrected for this choice; verdicts are."
)


def too_many(records: Iterable[Record]) -> bool:
    """Whether a table of results and a line for each cell without a result would have more than `MANY` lines."""
    return sum(len(by_metric(record)) or 1 for record in records) > MANY


def print_overview(records: Sequence[Record], rows: Iterable[Row], folder: Path, console: Console) -> None:
    """Print the cells with the largest gains and losses, why others have no result, and where all results are.

    Args:
        records: records of the cells.
        rows: their rows of the summary. Flagged checkpoints are left out here, as in the verdicts.
        folder: the folder of the summary.
        console: where to print.
    """
    finished = [record for record in records if record["status"] == "ok"]
    tested = [
        row
        for row in rows
        if row.get("protocol") in OVER_PLAIN
        and row["metric"] == FIRST_METRIC.get(row["task"])
        and row["gain"] is not None
    ]
    counted = [row for row in tested if row["baseline_check"] != "flagged"]
    _print_extremes("Largest gains", [row for row in counted if row["gain"] > 0], -1, console)
    _print_extremes("Largest losses", [row for row in counted if row["gain"] < 0], 1, console)
    if tested:
        print_prose(f"{LEGEND_OF_EXTREMES} {legend(finished, OVER_PLAIN)}", console)
    if flagged := {row["model"] for row in tested} - {row["model"] for row in counted}:
        print_prose(f"Flagged, and left out here: {', '.join(sorted(flagged))}.", console)
    print_notes(finished, console)
    reasons = Counter((r["status"], str(r["reason"])) for r in records if r["status"] != "ok")
    for (status, reason), count in reasons.most_common(REASONS):
        print_failure(f"{count} cells {status}", reason, console)
    if more := [count for _, count in reasons.most_common()[REASONS:]]:
        print_prose(f"{sum(more)} more cells without a result, for {len(more)} other reasons.", console)
    print_prose(
        f"{len(finished)} of {len(records)} cells have a result. Each of them, gains and losses, is in "
        f"{folder / 'summary.csv'}; for a page with plots and tables: python -m benchmarks.report {folder}",
        console,
    )


def _print_extremes(title: str, rows: list[Row], sign: int, console: Console) -> None:
    """Print a line for each cell, with its first protocol in the order of `sign` times the gain."""
    if not rows:
        print_prose(f"{title}: none.", console)
        return
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: sign * row["gain"]):
        first.setdefault(repr(row["key"]), row)
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for name in ("model", "data", "task", "px", "metric", "n", "lam=0", "protocol", "gain"):
        numeric = name in ("px", "n", "lam=0", "gain")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "model", overflow="fold")
    for row in list(first.values())[:EXTREMES]:
        about = (short(row["model"]), row["data"], task(row), str(row["img_size"]), row["metric"], known(row["n"]))
        table.add_row(*about, number(row["baseline"]), row["protocol"], gain(row).partition("\n")[0])
    console.print(table)
