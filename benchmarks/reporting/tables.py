"""Print the results of a sweep: a line for each cell and metric, verdicts, and pooled gains."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from timm_csra.agreement import FEW
from timm_csra.evaluation.statistics import AGREEMENT, FIXED, VERSUS

from ..records.files import Record
from .legends import LEGEND_OF_AGREEMENT, LEGEND_OF_NARROW, legend
from .nominal import deficits
from .pooled import LEGEND as LEGEND_OF_POOLED
from .pooled import Pooled
from .summary import FIRST_METRIC, OVER_PLAIN, VERDICTS, some_of, task, versus

PROTOCOLS = (*FIXED, VERSUS, AGREEMENT, "crossfit", "best")
MANY = 50  # largest number of rows of a table
PROSE = 120  # width of texts, in columns
SHARED = ("data", "task", "n")  # columns that move to the title if all rows have the same value
HEADLINE = (
    "Checkpoints by verdict: two-sided tests at 5 % after Holm's correction over the checkpoints of a line, in all "
    "records of the folder."
)


def print_records(records: Iterable[Record], console: Console) -> None:
    """Print the results as a table, then the cells without a result, with the reason.

    If the terminal is too narrow for all protocols in one line, only those of `OVER_PLAIN` are printed.
    """
    records = list(records)
    finished = [record for record in records if record["status"] == "ok"]
    if finished:
        results = [result for record in finished for result in record["results"] if result["gain"] is not None]
        protocols = {result["protocol"] for result in results} - {"curve"}
        wide = _table(finished)
        fits = console.measure(wide, options=console.options.update_width(10**4)).maximum <= console.width
        left = [] if fits else _print_narrow(finished, console)
        if fits:
            console.print(wide)
        print_prose(legend(finished, protocols.difference(left)), console)
        if left:
            print_prose(f"{LEGEND_OF_NARROW}{', '.join(left)}.", console)
        print_notes(finished, console)
    for record in records:
        if record["status"] != "ok":
            where = f"{record['model']} on {record['data']}, {task(record)}, {record['img_size']} px"
            print_failure(record["status"], f"{where}: {record['reason']}", console)


def print_prose(text: str, console: Console) -> None:
    """Print a text in lines of at most `PROSE` columns."""
    console.print(text, style="dim", highlight=False, markup=False, width=min(console.width, PROSE))


def print_notes(finished: Sequence[Record], console: Console) -> None:
    """Print notes on the results of finished cells."""
    if any(record.get("agreement") for record in finished):
        print_prose(LEGEND_OF_AGREEMENT, console)
    for line in (*origins(finished), *deficits(finished)):
        print_prose(line, console)
    for line in (*agreement_notes(finished), *left_out(finished)):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_failure(status: str, text: str, console: Console) -> None:
    style = "red" if status == "failed" else "yellow"
    console.print(f"{status}: {text}", style=style, markup=False, highlight=False, soft_wrap=True)


def _table(records: list[Record]) -> Table:
    rows = [_cells(record, metric, found) for record in records for metric, found in by_metric(record).items()]
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


def _print_narrow(records: list[Record], console: Console) -> list[str]:
    """Print each cell above a line for each metric, with gains over the plain model. Returns the protocols left out."""
    rows = {id(record): [_cells(record, *item) for item in by_metric(record).items()] for record in records}
    every = [row for mine in rows.values() for row in mine]
    used = {name for row in every for name, figure in row["gains"].items() if figure != "-"}
    protocols = [name for name in OVER_PLAIN if name in used]
    names = ("metric", "n", "lam=0", *protocols)
    cells = [[row["metric"], row["n"], row["lam=0"], *_first_lines(row, protocols)] for row in every]
    widths = [max(Text.from_markup(cell).cell_len for cell in column) for column in zip(names, *cells, strict=True)]
    room = (console.width - 2 - sum(widths[:3]) - 2 * len(widths)) // max(1, len(protocols))  # of a gain
    for record in records:
        title = ", ".join((short(record["model"]), record["data"], task(record), f"{record['img_size']} px"))
        console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        table.show_header = record is records[0]
        for place, (name, width) in enumerate(zip(names, widths, strict=True)):
            width = width if place < 3 else min(width, room)
            justify: Literal["left", "right"] = "right" if place else "left"
            table.add_column(_broken(name, width), justify=justify, width=width, overflow="fold")
        for row in rows[id(record)]:
            table.add_row(row["metric"], row["n"], row["lam=0"], *_first_lines(row, protocols))
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
    return [name for name in dict.fromkeys((*PROTOCOLS, *sorted(used))) if name in used and name not in protocols]


def _first_lines(row: dict[str, Any], protocols: Sequence[str]) -> list[str]:
    """Return the gains of a row without the chosen settings."""
    return [row["gains"].get(name, "-").partition("\n")[0] for name in protocols]


def by_metric(record: Record) -> dict[str, dict[str, Any]]:
    """Return the results of a record by metric and protocol, without the curves."""
    found: dict[str, dict[str, Any]] = {}
    for result in record["results"]:
        if result["protocol"] != "curve":
            found.setdefault(result["metric"], {})[result["protocol"]] = result
    return found


def _cells(record: Record, metric: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table."""
    return {
        "record": record,
        "model": short(record["model"]),
        "data": record["data"],
        "task": task(record),
        "px": str(record["img_size"]),
        "metric": metric,
        "n": known(found["fixed"]["n"]),
        "lam=0": number(found["fixed"]["baseline"]),
        "gains": {protocol: gain(result) for protocol, result in found.items()},
    }


def _broken(name: str, width: int) -> str:
    """Break a column name such as `log_softmax_vs_logits` into lines of at most `width`."""
    lines = [""]
    for part in re.findall("[^_]+_?", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def origins(records: Sequence[Record]) -> list[str]:
    """Return lines on the source of the head's class names, and on which weights of a file were loaded."""
    lines = []
    for field, what in (("classes_from", "Classes of the head by"), ("weights_from", "Weights:")):
        found: dict[str, dict[str, None]] = {}
        for record in records:
            if record.get(field):
                found.setdefault(record[field], {})[short(record["model"])] = None
        for source, models in found.items():
            who = f" ({some_of(list(models))})" if len(found) > 1 else ""
            lines.append(f"{what} {source}{who}.")
    return lines


def left_out(records: Iterable[Record]) -> list[str]:
    """Return lines on metrics that are left out for a kind of scores, and why."""
    every = (left for record in records for left in record.get("left_out", ()))
    return list(dict.fromkeys(f"{it['metric']} is left out for {it['scores']}: it {it['reason']}." for it in every))


def agreement_notes(records: Iterable[Record]) -> list[str]:
    """Return lines on the pictures for choosing lam without labels and those left out, or on why no lam was chosen."""
    notes: dict[str, None] = {}
    for record in records:
        if found := record.get("agreement"):
            where = f"agreement on {record['data']}"
            names = found["left_out"]
            told = f"; {len(names)} left out, which are also measured: {some_of(names)}" if names else ""
            if found["reason"]:
                notes[f"{where}: left out, {found['reason']}."] = None
            else:
                few = f", which are few: use at least {FEW}" if found["images"] < FEW else ""
                notes[f"{where}: lam chosen on {found['images']} pictures of {found['data']}{few}{told}."] = None
    return list(notes)


def print_headline(counts: Mapping[tuple[str, ...], Mapping[str, int]], console: Console) -> None:
    """Print the number of checkpoints with each verdict, for each group that was corrected together.

    If there are many groups, only those with the first metric of each task are printed.
    """
    every = len(counts)
    if every > MANY:
        counts = {
            name: verdicts for name, verdicts in counts.items() if name[4] == FIRST_METRIC.get(name[1].split(" ")[0])
        }
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("data", "task", "size", "metric", "protocol"):
        table.add_column(name, overflow="fold")
    for name in (*VERDICTS, "flagged"):
        table.add_column(name, justify="right")
    for (data, what, grid, size, metric, protocol), verdicts in counts.items():
        if protocol in OVER_PLAIN:
            named = what if grid in ("None", "2") else f"{what} {grid}x{grid}"
            numbers = (str(verdicts.get(name, 0)) for name in (*VERDICTS, "flagged"))
            table.add_row(data, named, size, metric, protocol, *numbers)
    if table.row_count:
        print_prose(HEADLINE, console)
        console.print(table)
    for line in versus(counts):
        console.print(line, highlight=False, soft_wrap=True)
    if len(counts) < every:
        print_prose(f"The verdicts of {every - len(counts)} more groups, by other metrics, are in the report.", console)


def print_pooled(found: Sequence[Pooled], console: Console) -> None:
    """Print pooled gains, a line for each; if there are many, only those in the first metric of each task."""
    every = len(found)
    if every > MANY:
        found = [one for one in found if one.row["metric"] == FIRST_METRIC.get(one.row["task"])]
    if not found:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("data, task, size", "metric", "protocol", "heads", "mean gain", "over both"):
        table.add_column(name, justify="right" if name in ("mean gain", "over both") else "left", overflow="fold")
    for one in found:
        low, high = one.over_images
        colour = "green" if low > 0 else "red" if high < 0 else "default"
        mean = f"[{colour}]{one.gain:+.2f} \\[{low:+.2f}, {high:+.2f}][/]"
        both = "\\[{:+.2f}, {:+.2f}]".format(*one.over_both) if one.over_both else "-"
        table.add_row(one.where, one.row["metric"], one.row["protocol"], one.heads, mean, both)
    print_prose(LEGEND_OF_POOLED, console)
    console.print(table)
    if len(found) < every:
        print_prose(f"{every - len(found)} more pooled gains, by other metrics, are in the report.", console)


def short(model: str) -> str:
    if model.startswith("local-dir:"):
        return model.rstrip("/").rsplit("/", 1)[-1]
    return model.removeprefix("pypi:").removeprefix("file:")


def known(count: int | None) -> str:
    return "-" if count is None else str(count)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def gain(result: dict[str, Any]) -> str:
    """Format `+1.20 [+0.40, +2.10]`, and below it a chosen setting, as `log_softmax lam 0.2;0.3 T inf`."""
    if result["gain"] is None:
        return "-"
    interval = "" if result["ci_low"] is None else f" [{result['ci_low']:+.2f}, {result['ci_high']:+.2f}]"
    chosen = f"\n{_setting(result)}" if result["protocol"] in (AGREEMENT, "crossfit", "best") else ""
    colour = "green" if (result["ci_low"] or 0) > 0 else "red" if (result["ci_high"] or 0) < 0 else "default"
    return f"[{colour}]{result['gain']:+.2f}{interval.replace('[', chr(92) + '[')}[/]{chosen}"


def _setting(result: dict[str, Any]) -> str:
    """Format the chosen setting; values that both halves chose are shown once."""
    scores, lam, temperature = (
        values if len(set(values.split(";"))) > 1 else values.split(";")[0]
        for values in (result["scores"], result["lam"], result["temperature"])
    )
    return f"{scores} lam {lam} T {temperature}"
