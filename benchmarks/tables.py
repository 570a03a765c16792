"""What a sweep prints: one line for each cell and metric, gains and losses alike."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from .records import Record
from .summary import VERDICTS

LEGEND = (
    "Percent, and points of gain over lam=0 with 95 % paired bootstrap intervals over images. "
    "fixed: lam 0.1, T inf. crossfit: chosen on one half, measured on the other, both ways. "
    "best: chosen on the test data itself, optimistic. Other columns: the plain model otherwise pooled."
)
PROTOCOLS = ("fixed", "crossfit", "best")
HEADLINE = (
    "Checkpoints by verdict: two-sided tests at 5 % after Holm's correction over the checkpoints of a line, in all "
    "records of the folder."
)


def print_records(records: Iterable[Record], console: Console) -> None:
    """The results as a table, then what gave none, with the reason."""
    records = list(records)
    finished = [record for record in records if record["status"] == "ok"]
    if finished:
        console.print(_table(finished))
        console.print(LEGEND, style="dim", highlight=False, soft_wrap=True)
    for record in records:
        if record["status"] == "ok":
            continue
        where = f"{record['model']} on {record['data']}, {record['task']}, {record['img_size']} px"
        style = "red" if record["status"] == "failed" else "yellow"
        console.print(
            f"{record['status']}: {where}: {record['reason']}",
            style=style,
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _table(records: list[Record]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "data", "task", "px", "metric"):
        table.add_column(name, no_wrap=name != "model", overflow="fold")
    for name in ("n", "lam=0"):
        table.add_column(name, justify="right", no_wrap=True)
    used = {result["protocol"] for record in records for result in record["results"]} - {*PROTOCOLS, "curve"}
    protocols = [*PROTOCOLS, *sorted(used)]  # and the other ways to pool, and rivals, that were measured
    for name in protocols:
        # On a narrow terminal they take several lines, and lose nothing.
        table.add_column(name, justify="right", overflow="fold")
    for record in records:
        by_metric: dict[str, dict[str, Any]] = {}
        for result in record["results"]:
            by_metric.setdefault(result["metric"], {})[result["protocol"]] = result
        model = (
            record["model"].removeprefix("pypi:") if record["model"].startswith("pypi:") else _short(record["model"])
        )
        task = f"{record['task']} {record['grid']}x{record['grid']}" if record.get("grid") else record["task"]
        lead = [model, record["data"], task, str(record["img_size"])]
        for metric, found in by_metric.items():
            baseline = found["fixed"]["baseline"]
            gains = (_gain(found.get(name)) for name in protocols)
            table.add_row(*lead, metric, str(record["n"]), _number(baseline), *gains)
            lead = [""] * 4
    return table


def print_headline(counts: Mapping[tuple[str, ...], Mapping[str, int]], console: Console) -> None:
    """n better, n worse, n no evidence, for each group of checkpoints that was corrected together."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("data", "task", "size", "metric", "protocol"):
        table.add_column(name, overflow="fold")
    for name in (*VERDICTS, "flagged"):
        table.add_column(name, justify="right")
    for (data, task, grid, size, metric, protocol), verdicts in counts.items():
        if protocol in ("fixed", "crossfit"):
            named = task if grid in ("None", "2") else f"{task} {grid}x{grid}"
            numbers = (str(verdicts.get(name, 0)) for name in (*VERDICTS, "flagged"))
            table.add_row(data, named, size, metric, protocol, *numbers)
    if table.row_count:
        console.print(HEADLINE, style="dim", highlight=False, soft_wrap=True)
        console.print(table)


def print_plan(cells: Iterable[tuple[str, ...]], console: Console) -> None:
    """What a sweep would do: one line for each cell."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "data", "task", "px", "images", "state"):
        table.add_column(name, justify="right" if name in ("px", "images") else "left", overflow="fold")
    for cell in cells:
        table.add_row(*cell)
    console.print(table)


def _short(model: str) -> str:
    return model.rsplit("/", 1)[-1] if model.startswith("local-dir:") else model.removeprefix("pypi:")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _gain(result: dict[str, Any] | None) -> str:
    """`+1.20 [+0.40, +2.10]`, and for a chosen setting which: `lam 0.2;0.3`."""
    if result is None or result["gain"] is None:
        return "-"
    interval = "" if result["ci_low"] is None else f" [{result['ci_low']:+.2f}, {result['ci_high']:+.2f}]"
    chosen = f" lam {result['lam']} T {result['temperature']}" if result["protocol"] in ("crossfit", "best") else ""
    colour = "green" if (result["ci_low"] or 0) > 0 else "red" if (result["ci_high"] or 0) < 0 else "default"
    return f"[{colour}]{result['gain']:+.2f}{interval.replace('[', chr(92) + '[')}[/]{chosen}"
