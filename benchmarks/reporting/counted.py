"""Which figures count: of each checkpoint once, the newest, and nothing beside figures of a newer version."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..records.files import Record
from ..records.identity import Identity, same_weights

Row = dict[str, Any]

# Why a record or row does not count.
OTHER_WEIGHTS, AGAIN, OLDER = "other weights since", "measured again since", "of an older version"
UNDER = "under another name: "  # and which


def replaced(records: Sequence[Record]) -> list[str | None]:
    """Why a record does not count: its checkpoint has other weights since, or what had failed was done again."""
    newest: dict[str, Record] = {}  # of each checkpoint, among those that say its weights
    latest: dict[Any, str] = {}  # when each cell was last measured
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
    """A name for the checkpoint of each record, see `same_weights`, which weights that it had once have no part in."""
    names = same_weights(record for record, reason in zip(records, why, strict=True) if reason != OTHER_WEIGHTS)
    return [names.get(model := str(record["model"]), model) for record in records]


def count_once(family: Iterable[Row]) -> None:
    """Say in `not_counted` which rows of a family do not count."""
    rows = sorted((row for row in family if not row["not_counted"]), key=lambda row: str(row.get("finished")))
    version = max((_version(row) for row in rows), default=None)
    newest = {row["_checkpoint"]: row for row in rows if _version(row) == version}
    for row in rows:
        taken = newest.get(row["_checkpoint"])
        if row is not taken:
            again = OLDER if taken is None else AGAIN
            row["not_counted"] = f"{UNDER}{taken['model']}" if taken and taken["model"] != row["model"] else again


def notes(rows: Iterable[Row]) -> list[str]:
    """What has to be said of rows that do not count, though no later record of the same name has replaced them."""
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
    left = f"{len(older)} records of an older version of the sweep are left out, beside newer ones which they cannot"
    return [*sorted(twice), *([f"{left} be compared with: measure {models} again."] if older else [])]


def _version(row: Row) -> tuple[int, int]:
    """Of what scores are computed by, and of what figures are from them."""
    key = row["key"]
    return key.get("scoring") or 0, (key.get("evaluation") or {}).get("version") or 0
