"""What all records of a folder say together: one row for each result, corrected for their number."""

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from statsmodels.stats.multitest import multipletests

from timm_csra.evaluation.statistics import AGREEMENT, FIXED, VERSUS

from ..records.files import Record, read_records, to_stderr, write_table
from .expected import check, read_expected

COLUMNS = (
    *("model", "data", "task", "img_size", "n", "columns", "metric", "protocol", "scores", "lam"),
    *("temperature", "baseline", "value", "gain", "ci_low", "ci_high", "p_value", "p_holm", "verdict", "test"),
    *("requested", "grid", "score_classes", "kind", "macs", "extra_macs", "baseline_check", "status", "reason"),
)
ALPHA = 0.05
VERDICTS = ("better", "worse", "no evidence")
OVER_PLAIN = (*FIXED, AGREEMENT, "crossfit")  # protocols whose verdicts are of gains over the plain model
FIRST_METRIC = {"single": "top1", "real": "top1", "multilabel": "mAP", "mosaic": "mAP"}  # what decides, for each task

Row = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """What the records of a folder say together. The summary, the terminal and the report all show this.

    Attributes:
        records: those of finished cells, each with `baseline_check`: see `check`, None without published figures.
        rows: see `rows_of`.
    """

    records: list[Record]
    rows: list[Row]


def read_folder(folder: Path, warn: Callable[[str], object] = to_stderr) -> Folder:
    """All records in the folder. Baselines are compared with `expected.csv` in it, where a sweep with `--expected` has
    put that. `warn` is told of each file that is no record.

    Raises:
        ValueError: `expected.csv` is no such table.
    """
    published = folder / "expected.csv"
    expected = read_expected(str(published)) if published.is_file() else None
    records = [
        record | {"baseline_check": None if expected is None or record["status"] != "ok" else check(record, expected)}
        for record in read_records(folder, warn)
    ]
    return Folder(records, rows_of(records))


def rows_of(records: Iterable[Record]) -> list[Row]:
    """One row for each metric and protocol, and one without metric for a cell without result.

    `p_holm` is the p-value after Holm's correction over all checkpoints within one data set, task, requested size,
    metric and protocol, and whatever else makes cells incomparable. `verdict` is what it says at 5 %.
    """
    rows = [
        {**record, **result, "_family": _family(record, result)}
        for record in records
        for result in record["results"] or [{}]
        if result.get("protocol") != "curve"
    ]
    families: dict[Any, list[Row]] = {}
    for row in rows:
        if row.get("p_value") is not None:
            families.setdefault(row["_family"], []).append(row)
    gc.freeze()  # statsmodels collects garbage at every call, which takes 60 ms beside all that torch holds
    for family in families.values():
        corrected = multipletests([row["p_value"] for row in family], alpha=ALPHA, method="holm")[1]
        for row, p in zip(family, corrected.tolist(), strict=True):
            better = "better" if row["gain"] > 0 else "worse"
            row |= {"p_holm": p, "verdict": better if p < ALPHA else "no evidence"}
    gc.unfreeze()
    return rows


def _family(record: Record, result: Record) -> tuple[Any, ...]:
    key = record.get("key", {})
    different = ("model", "weights", "img_size", "test_crop_pct", "versions")
    alike = {name: value for name, value in key.items() if name not in different}
    return (repr(sorted(alike.items())), record.get("requested"), result.get("metric"), result.get("protocol"))


def headline(rows: Iterable[Row]) -> dict[tuple[str, ...], Counter[str]]:
    """For each data set, task, requested size, metric and protocol: how many checkpoints got which verdict. Those whose
    baseline disagrees with the published one are left out, and counted as `flagged`."""
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for row in rows:
        if row.get("verdict"):
            what = (row.get("data"), f"{row.get('task')}{over(row)}", *map(row.get, ("grid", "requested")))
            name = tuple(map(str, (*what, row.get("metric"), row.get("protocol"))))
            flagged = row.get("baseline_check") == "flagged"
            counts.setdefault(name, Counter())["flagged" if flagged else row["verdict"]] += 1
    return counts


def over(row: Mapping[str, Any]) -> str:
    """What is said of a task beside its name: whether metrics are over all classes of the head."""
    return " (all classes)" if row.get("score_classes") == "head" else ""


def versus(counts: Mapping[tuple[str, ...], Mapping[str, int]]) -> list[str]:
    """What a headline says of the two fixed settings compared with each other."""
    lines = []
    for (data, task, grid, size, metric, protocol), verdicts in counts.items():
        if protocol == VERSUS:
            better, worse, nothing = (verdicts.get(verdict, 0) for verdict in VERDICTS)
            flagged = f", {verdicts['flagged']} flagged" if verdicts.get("flagged") else ""
            where = f"{data}, {task}{'' if grid == 'None' else f' {grid}x{grid}'}, {size}, {metric}"
            lines.append(
                f"{where}: log_softmax better than logits on {better} checkpoints, worse on {worse}, no evidence on "
                f"{nothing}{flagged}"
            )
    return lines


def write_summary(folder: Path, warn: Callable[[str], object] = to_stderr) -> tuple[Path, list[Row]]:
    """`summary.csv` of all that `read_folder` gives; safe beside another sweep that writes it too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.csv"
    with FileLock(folder / ".summary.lock"):
        rows = read_folder(folder, warn).rows
        write_table(path, COLUMNS, rows)
    return path, rows


def kept(rows: Sequence[Row], records: Iterable[Record]) -> list[Row]:
    """The rows of these records."""
    keys = {repr(record["key"]) for record in records}
    return [row for row in rows if repr(row.get("key")) in keys]
