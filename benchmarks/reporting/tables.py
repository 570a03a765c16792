"""What a sweep prints: one line for each cell and metric, gains and losses alike."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from timm_csra.agreement import FEW
from timm_csra.evaluation.statistics import AGREEMENT, FIXED, VERSUS

from ..records.files import Record
from .summary import OVER_PLAIN, VERDICTS, versus

LEGEND = (
    "Percent, and points of gain over lam=0 with 95 % paired bootstrap intervals over images. "
    "fixed: the paper's, logits, lam 0.1, T inf. fixed_log_softmax: lam 0.3, T inf. log_softmax_vs_logits: the second "
    "over the first. crossfit: chosen on one half, measured on the other, both ways. "
    "best: chosen on the test data itself, optimistic. Other columns: the plain model otherwise pooled."
)
LEGEND_OF_AGREEMENT = (
    "agreement: log_softmax, T inf, lam chosen without labels on other pictures; its intervals hold that lam fixed."
)
PROTOCOLS = (*FIXED, VERSUS, AGREEMENT, "crossfit", "best")
SHARED = ("data", "task", "n")  # what is said once where it is the same for all
HEADLINE = (
    "Checkpoints by verdict: two-sided tests at 5 % after Holm's correction over the checkpoints of a line, in all "
    "records of the folder."
)


def print_records(records: Iterable[Record], console: Console) -> None:
    """The results as a table, then what gave none, with the reason."""
    records = list(records)
    finished = [record for record in records if record["status"] == "ok"]
    if finished:
        wide = _table(finished)
        fits = console.measure(wide, options=console.options.update_width(10**4)).maximum <= console.width
        for table in [wide] if fits else map(_of_one_cell, finished):
            console.print(table)
        console.print(LEGEND, style="dim", highlight=False, soft_wrap=True)
        if any(record.get("agreement") for record in finished):
            console.print(LEGEND_OF_AGREEMENT, style="dim", highlight=False, soft_wrap=True)
        for line in (*agreement_notes(finished), *left_out(finished)):
            console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
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
    rows = [_cells(record, metric, found) for record in records for metric, found in _by_metric(record).items()]
    said = {name for name in SHARED if len({row[name] for row in rows}) == 1 and len(records) > 1}
    title = ", ".join(f"n = {rows[0][name]}" if name == "n" else rows[0][name] for name in SHARED if name in said)
    table = Table(box=None, pad_edge=False, header_style="bold", title=title or None, title_justify="left")
    lead = [name for name in ("model", "data", "task", "px") if name not in said]
    numbers = [name for name in ("n", "lam=0") if name not in said]
    known = dict.fromkeys([*PROTOCOLS, *sorted({name for row in rows for name in row["gains"]})])
    protocols = [name for name in known if any(row["gains"].get(name, "-") != "-" for row in rows)]
    for name in (*lead, "metric"):
        table.add_column(name, no_wrap=name != "model", overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in protocols:
        widest = max(Text.from_markup(row["gains"].get(name, "-")).cell_len for row in rows)
        table.add_column(_broken(name, widest), justify="right", overflow="fold")
    before = None
    for row in rows:
        first = [row[name] if row["record"] is not before else "" for name in lead]
        gains = [row["gains"].get(name, "-") for name in protocols]
        table.add_row(*first, row["metric"], *(row[name] for name in numbers), *gains)
        before = row["record"]
    return table


def _of_one_cell(record: Record) -> Table:
    """For a terminal that is too narrow for one table: a line for each metric and protocol."""
    rows = [_cells(record, metric, found) for metric, found in _by_metric(record).items()]
    title = "{model}, {data}, {task}, {px} px, n = {n}".format(**rows[0]) if rows else _short(record["model"])
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for name in ("metric", "lam=0", "protocol", "gain", "setting"):
        table.add_column(
            name, justify="right" if name == "lam=0" else "left", overflow="fold", no_wrap=name == "protocol"
        )
    for row in rows:
        first = [row["metric"], row["lam=0"]]
        for protocol in (*PROTOCOLS, *(name for name in row["gains"] if name not in PROTOCOLS)):
            if (cell := row["gains"].get(protocol, "-")) != "-":
                gain, _, setting = cell.partition("\n")
                table.add_row(*first, protocol, gain, setting)
                first = ["", ""]
    return table


def _by_metric(record: Record) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for result in record["results"]:
        if result["protocol"] != "curve":
            found.setdefault(result["metric"], {})[result["protocol"]] = result
    return found


def _cells(record: Record, metric: str, found: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    task = f"{record['task']} {record['grid']}x{record['grid']}" if record.get("grid") else record["task"]
    return {
        "record": record,
        "model": _short(record["model"]),
        "data": record["data"],
        "task": task,
        "px": str(record["img_size"]),
        "metric": metric,
        "n": str(record["n"]),
        "lam=0": _number(found["fixed"]["baseline"]),
        "gains": {protocol: _gain(result) for protocol, result in found.items()},
    }


def _broken(name: str, width: int) -> str:
    """`log_softmax_vs_logits` over cells that are narrower, in several lines."""
    lines = [""]
    for part in re.findall("[^_]+_?", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def left_out(records: Iterable[Record]) -> list[str]:
    """Which metrics have no figures for one kind of scores, and why."""
    every = (left for record in records for left in record.get("left_out", ()))
    return list(dict.fromkeys(f"{it['metric']} is left out for {it['scores']}: it {it['reason']}." for it in every))


def agreement_notes(records: Iterable[Record]) -> list[str]:
    """By which pictures lam was chosen without labels, and which of them were left out; or why it was not."""
    notes: dict[str, None] = {}
    for record in records:
        if found := record.get("agreement"):
            where = f"agreement on {record['data']}"
            names = found["left_out"]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            told = f"; {len(names)} left out, also among those measured: {', '.join(names[:3])}{more}" if names else ""
            if found["reason"]:
                notes[f"{where}: left out, {found['reason']}."] = None
            else:
                few = f", which are few: use at least {FEW}" if found["images"] < FEW else ""
                notes[f"{where}: lam by {found['images']} pictures of {found['data']}{few}{told}."] = None
    return list(notes)


def print_headline(counts: Mapping[tuple[str, ...], Mapping[str, int]], console: Console) -> None:
    """n better, n worse, n no evidence, for each group of checkpoints that was corrected together."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("data", "task", "size", "metric", "protocol"):
        table.add_column(name, overflow="fold")
    for name in (*VERDICTS, "flagged"):
        table.add_column(name, justify="right")
    for (data, task, grid, size, metric, protocol), verdicts in counts.items():
        if protocol in OVER_PLAIN:
            named = task if grid in ("None", "2") else f"{task} {grid}x{grid}"
            numbers = (str(verdicts.get(name, 0)) for name in (*VERDICTS, "flagged"))
            table.add_row(data, named, size, metric, protocol, *numbers)
    if table.row_count:
        console.print(HEADLINE, style="dim", highlight=False, soft_wrap=True)
        console.print(table)
    for line in versus(counts):
        console.print(line, highlight=False, soft_wrap=True)


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


def _gain(result: dict[str, Any]) -> str:
    """`+1.20 [+0.40, +2.10]`, and for a chosen setting, below it, which: `log_softmax lam 0.2;0.3 T inf`."""
    if result["gain"] is None:
        return "-"
    interval = "" if result["ci_low"] is None else f" [{result['ci_low']:+.2f}, {result['ci_high']:+.2f}]"
    chosen = f"\n{_setting(result)}" if result["protocol"] in (AGREEMENT, "crossfit", "best") else ""
    colour = "green" if (result["ci_low"] or 0) > 0 else "red" if (result["ci_high"] or 0) < 0 else "default"
    return f"[{colour}]{result['gain']:+.2f}{interval.replace('[', chr(92) + '[')}[/]{chosen}"


def _setting(result: dict[str, Any]) -> str:
    """What both halves chose alike is said once."""
    scores, lam, temperature = (
        values if len(set(values.split(";"))) > 1 else values.split(";")[0]
        for values in (result["scores"], result["lam"], result["temperature"])
    )
    return f"{scores} lam {lam} T {temperature}"
