"""Decide which results count: the newest ones of each checkpoint, and those of the newest version of the sweep only."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..records.files import Record
from ..records.identity import Identity, same_weights

Row = dict[str, Any]

# Why a record or row does not count.
OTHER_WEIGHTS, AGAIN, OLDER = "other weights since", "measured again since", "of an older version"
UNDER = "under another name: "  # followed by that name


def replaced(records: Sequence[Record]) -> list[str | None]:
    """Return why each record does not count, or None.

    Records do not count if their checkpoint has other weights since, or if they are of a failed cell that was measured
    again.
    """
    newest: dict[str, Record] = {}  # by checkpoint, of the records with a hash of the weights
    latest: dict[Any, str] = {}  # time of the last measurement, by cell
    cells = []
    for record in records:
        identity = Identity.of(record["key"])
        finished = str(record.get("finished"))
        pixels = str(record["img_size"]), record["key"].get("test_crop_pct")
        cells.append((identity.model, identity.compared, pixels))
        latest[cells[-1]] = max(finished, latest.get(cells[-1], ""))
        if identity.weights and finished >= str(newest.get(identity.model, {}).get("finished", "")):
            newest[identity.model] = record
    found: list[str | None] = []
    for record, cell in zip(records, cells, strict=True):
        weights = record["key"].get("weights")
        now = newest.get(cell[0], record)["key"].get("weights")
        if weights and weights != now:
            found.append(OTHER_WEIGHTS)
        else:
            found.append(AGAIN if record["status"] != "ok" and str(record.get("finished")) < latest[cell] else None)
    return found


def checkpoints(records: Sequence[Record], why: Sequence[str | None]) -> list[str]:
    """Return a name for the checkpoint of each record, see `same_weights`; records of replaced weights are ignored."""
    names = same_weights(record for record, reason in zip(records, why, strict=True) if reason != OTHER_WEIGHTS)
    return [names.get(model := str(record["model"]), model) for record in records]


def count_once(family: Iterable[Row]) -> None:
    """Set `not_counted` of the rows of a family that do not count."""
    rows = sorted((row for row in family if not row["not_counted"]), key=lambda row: str(row.get("finished")))
    version = max((_version(row) for row in rows), default=None)
    newest = {row["_checkpoint"]: row for row in rows if _version(row) == version}
    for row in rows:
        taken = newest.get(row["_checkpoint"])
        if row is not taken:
            again = OLDER if taken is None else AGAIN
            row["not_counted"] = f"{UNDER}{taken['model']}" if taken and taken["model"] != row["model"] else again


def notes(rows: Iterable[Row]) -> list[str]:
    """Return notes on rows that do not count although no later record of the same name has replaced them."""
    twice: dict[str, None] = {}
    older: dict[int, str] = {}
    for row in rows:
        why = row["not_counted"] or ""
        if why.startswith(UNDER):
            other = why.removeprefix(UNDER)
            twice[f"{row['model']} has the same weights as {other} and counts once with it, by the newer record."] = (
                None
            )
        elif why == OLDER:
            older[row["_record"]] = row["model"]
    models = ", ".join(sorted(set(older.values())))
    left = f"{len(older)} records of an older version of the sweep are left out, because they cannot be compared with"
    return [*sorted(twice), *([f"{left} newer ones: measure {models} again."] if older else [])]


def _version(row: Row) -> tuple[int, int]:
    """Return the version of the scores, and that of the results computed from them."""
    key = row["key"]
    return key.get("scoring") or 0, (key.get("evaluation") or {}).get("version") or 0
