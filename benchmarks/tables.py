"""What a sweep prints: one line for each cell and metric, gains and losses alike."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from .records import Record

LEGEND = (
    "Percent, and points of gain over lam=0 with 95 % paired bootstrap intervals over images. "
    "fixed: lam 0.1, T inf. crossfit: chosen on one half, measured on the other, both ways. "
    "best: chosen on the test data itself, optimistic."
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
    for name in ("fixed", "crossfit", "best"):
        table.add_column(name, justify="right")  # on a narrow terminal they take several lines, and lose nothing
    for record in records:
        by_metric: dict[str, dict[str, Any]] = {}
        for result in record["results"]:
            by_metric.setdefault(result["metric"], {})[result["protocol"]] = result
        model = (
            record["model"].removeprefix("pypi:") if record["model"].startswith("pypi:") else _short(record["model"])
        )
        lead = [model, record["data"], record["task"], str(record["img_size"])]
        for metric, protocols in by_metric.items():
            baseline = protocols["fixed"]["baseline"]
            gains = (_gain(protocols.get(name)) for name in ("fixed", "crossfit", "best"))
            table.add_row(*lead, metric, str(record["n"]), _number(baseline), *gains)
            lead = [""] * 4
    return table


def _short(model: str) -> str:
    return model.rsplit("/", 1)[-1] if model.startswith("local-dir:") else model.removeprefix("pypi:")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _gain(result: dict[str, Any] | None) -> str:
    """`+1.20 [+0.40, +2.10]`, and for a chosen setting which: `lam 0.2;0.3`."""
    if result is None or result["gain"] is None:
        return "-"
    interval = "" if result["ci_low"] is None else f" [{result['ci_low']:+.2f}, {result['ci_high']:+.2f}]"
    chosen = "" if result["protocol"] == "fixed" else f" lam {result['lam']} T {result['temperature']}"
    colour = "green" if (result["ci_low"] or 0) > 0 else "red" if (result["ci_high"] or 0) < 0 else "default"
    return f"[{colour}]{result['gain']:+.2f}{interval.replace('[', chr(92) + '[')}[/]{chosen}"
