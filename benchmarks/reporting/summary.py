"""Summarise all records of a folder: one row for each result, with p-values corrected for multiple testing."""

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
from ..records.identity import Identity, Part, answers, differences, distinct_names
from .counted import OTHER_WEIGHTS, Row, checkpoints, count_once, notes, replaced
from .expected import check, read_expected

COLUMNS = (
    *("model", "data", "task", "img_size", "n", "columns", "metric", "protocol", "scores", "lam"),
    *("temperature", "baseline", "value", "gain", "ci_low", "ci_high", "p_value", "p_holm", "verdict", "test"),
    *("requested", "grid", "score_classes", "kind", "macs", "extra_macs", "baseline_check"),
    *("not_counted", "status", "reason"),
)
ALPHA = 0.05
VERDICTS = ("better", "worse", "no evidence")
OVER_PLAIN = (*FIXED, AGREEMENT, "crossfit")  # protocols that compare with the plain model
FIRST_METRIC = {"single": "top1", "real": "top1", "multilabel": "mAP", "mosaic": "mAP"}  # the main metric of each task

CALLED = {"data_fingerprint": "data", "calibration_data": "calibration"}  # names of keys in `distinct_names_of_data`


@dataclass(frozen=True)
class Folder:
    """The records of a folder and their rows. The summary, the terminal and the report all show these.

    Attributes:
        records: records of finished cells, with three fields set: `data`, made distinct for data sets of the same name;
            `baseline_check`, see `check`, or None without published figures; `not_counted`, see `rows_of`.
        rows: see `rows_of`.
    """

    records: list[Record]
    rows: list[Row]

    @property
    def counted(self) -> list[Record]:
        """The records that later ones do not replace."""
        return [record for record in self.records if not record["not_counted"]]

    @property
    def notes(self) -> list[str]:
        """Notes on rows that do not count, see `counted.notes`."""
        return notes(self.rows)

    def replaced(self, record: Record) -> bool:
        """Whether a later record has other weights of the same checkpoint."""
        return self.named([record])[0].get("not_counted") == OTHER_WEIGHTS

    def named(self, records: Iterable[Record]) -> list[Record]:
        """Return these records as the folder has them, with the fields that it sets."""
        mine = {repr(record["key"]): record for record in self.records}
        return [mine.get(repr(record["key"]), record) for record in records]


def read_folder(folder: Path, warn: Callable[[str], object] = to_stderr) -> Folder:
    """Read all records in the folder, and compare their baselines with its `expected.csv`, if a sweep wrote one.

    `warn` is called with a text for each file that is not a record.

    Raises:
        ValueError: `expected.csv` is not timm's table.
    """
    published = folder / "expected.csv"
    expected = read_expected(str(published)) if published.is_file() else None
    records = [
        record | {"baseline_check": None if expected is None or record["status"] != "ok" else check(record, expected)}
        for record in read_records(folder, warn)
    ]
    rows = rows_of(records)
    told = [
        record | {"data": name, "not_counted": why}
        for record, name, why in zip(
            records, distinct_names_of_data(records), not_counted(len(records), rows), strict=True
        )
    ]
    return Folder(told, rows)


def not_counted(records: int, rows: Iterable[Row]) -> list[str | None]:
    """Return why each of so many records does not count: the reason of its rows, if none of them counts; else None."""
    reasons: dict[int, set[str | None]] = {}
    for row in rows:
        reasons.setdefault(row["_record"], set()).add(row["not_counted"])
    found = (reasons.get(place, {None}) for place in range(records))
    return [None if None in why else min(map(str, why)) for why in found]


def distinct_names_of_data(records: Sequence[Record]) -> list[str]:
    """Return a name for the data of each record that is distinct among data sets measured on the same task.

    Data sets of the same name are distinguished by their paths, or else by what differs in the keys of the records.
    """
    names = distinct_names((record["key"].get("data", record["data"]), record.get("where")) for record in records)
    called = [names[record["key"].get("data", record["data"]), record.get("where")] for record in records]
    alike: dict[tuple[Any, ...], dict[Part, None]] = {}
    compared = [Identity.of(record["key"]).compared for record in records]
    for record, name, part in zip(records, called, compared, strict=True):
        alike.setdefault((name, *_said(record)), {})[part] = None
    told = {}
    for group, parts in alike.items():
        for part, words in zip(parts, differences(list(parts), CALLED), strict=True):
            told[*group, part] = f"{group[0]} ({words})" if words else group[0]
    return [told[(name, *_said(record), part)] for record, name, part in zip(records, called, compared, strict=True)]


def _said(record: Record) -> tuple[Any, ...]:
    """Return the columns that tables show beside the name of the data."""
    return record["task"], record.get("grid"), over(record)


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Return one row for each requested size, metric and protocol; and one without a metric for a cell without result.

    `p_holm` is the p-value after Holm's correction over the checkpoints of a family, within one requested size, and
    `verdict` the result of the test at 5 %. Checkpoints with the same weights count once: `not_counted` is the reason
    why a row does not count, or None.
    """
    names, why = distinct_names_of_data(records), replaced(records)
    same = checkpoints(records, why)
    requests: dict[Part, dict[str, None]] = {}
    identities = [Identity.of(record["key"]) for record in records]
    for record, identity in zip(records, identities, strict=True):
        requests.setdefault(identity.compared, {}).update(dict.fromkeys(record["requested"]))
    rows: list[Row] = []
    for place, (record, identity) in enumerate(zip(records, identities, strict=True)):
        words = [word for word in requests[identity.compared] if answers(record, word)]
        for result in record["results"] or [{}]:
            if result.get("protocol") == "curve":
                continue
            part = identity.family(result.get("metric"), result.get("protocol"))
            rows += [
                {**record, "data": names[place], **result, "requested": word, "not_counted": why[place]}
                | {"_record": place, "_family": (part, word), "_checkpoint": same[place]}
                for word in words
            ]
    families: dict[Any, list[Row]] = {}
    for row in rows:
        families.setdefault(row["_family"], []).append(row)
    _name_families(families)
    gc.freeze()  # statsmodels runs the garbage collector at every call, which takes 60 ms with torch's objects
    for family in families.values():
        count_once(family)
        done = (row for row in family if row["status"] == "ok" and not row["not_counted"])
        tested = [row for row in done if row.get("p_value") is not None]
        if not tested:
            continue
        corrected = multipletests([row["p_value"] for row in tested], alpha=ALPHA, method="holm")[1]
        for row, p in zip(tested, corrected.tolist(), strict=True):
            better = "better" if row["gain"] > 0 else "worse"
            row |= {"p_holm": p, "verdict": better if p < ALPHA else "no evidence"}
    gc.unfreeze()
    return rows


def _name_families(families: Mapping[Any, list[Row]]) -> None:
    """Make `data` distinct for families that differ only in what their protocol depends on."""
    alike: dict[tuple[Any, ...], dict[Any, None]] = {}
    for key, family in families.items():
        first = family[0]
        alike.setdefault((first["data"], *_said(first), *key[0][-2:], key[1]), {})[key] = None
    for keys in alike.values():
        for key, words in zip(keys, differences([key[0] for key in keys], CALLED), strict=True):
            for row in families[key] if words else ():
                row["data"] = f"{row['data']} ({words})"


def headline(rows: Iterable[Row]) -> dict[tuple[str, ...], Counter[str]]:
    """Count the verdicts of checkpoints for each data set, task, requested size, metric and protocol.

    Checkpoints whose baseline disagrees with the published figure count as `flagged` only.
    """
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for row in rows:
        if row.get("verdict"):
            what = (row.get("data"), f"{row.get('task')}{over(row)}", *map(row.get, ("grid", "requested")))
            name = tuple(map(str, (*what, row.get("metric"), row.get("protocol"))))
            flagged = row.get("baseline_check") == "flagged"
            counts.setdefault(name, Counter())["flagged" if flagged else row["verdict"]] += 1
    return counts


def over(row: Mapping[str, Any]) -> str:
    """Return the suffix of a task's name if metrics are over all classes of the head."""
    return " (all classes)" if row.get("score_classes") == "head" else ""


def task(row: Mapping[str, Any]) -> str:
    """Return the task with the grid of a mosaic, and with the suffix of `over`."""
    grid = f" {row['grid']}x{row['grid']}" if row.get("grid") else ""
    return f"{row['task']}{grid}{over(row)}"


def group_name(row: Record) -> str:
    """Return the name of a group of rows: data, task with the grid of a mosaic, and requested size or sizes."""
    requested = row["requested"] if isinstance(row["requested"], str) else "/".join(row["requested"])
    return f"{row['data']} · {task(row)} · {requested}"


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first names as a list in words, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def versus(counts: Mapping[tuple[str, ...], Mapping[str, int]]) -> list[str]:
    """Return a line for each count of `headline` that compares the two fixed settings with each other."""
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


def write_summary(folder: Path, warn: Callable[[str], object] = to_stderr) -> tuple[Path, Folder]:
    """Write `summary.csv` with the rows of `read_folder`, under a lock, since other sweeps may write it too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.csv"
    with FileLock(folder / ".summary.lock"):
        found = read_folder(folder, warn)
        write_table(path, COLUMNS, found.rows)
    return path, found


def kept(rows: Sequence[Row], records: Iterable[Record]) -> list[Row]:
    """Return the rows of these records, or of the records that replace them."""
    keys = {repr(record["key"]) for record in records}
    mine = {(row["_family"], row["_checkpoint"]) for row in rows if repr(row["key"]) in keys}
    return [row for row in rows if (row["_family"], row["_checkpoint"]) in mine and not row["not_counted"]]
