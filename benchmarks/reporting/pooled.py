"""Average gains over checkpoints: many small gains are evidence that the tests of single checkpoints miss."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from timm_csra.evaluation.statistics import CONFIDENCE, VERSUS

from ..records.resampled import unpacked
from .summary import OVER_PLAIN, Row, group_name, over, some_of

LEGEND = (
    "Pooled gains: unweighted means over checkpoints with the same kind of head and the same number of classes, with "
    "95 % intervals over images (the same checkpoints on other images) and, for eight checkpoints or more, over both "
    "checkpoints and images."
)
LEAST = 8  # smallest number of checkpoints for an interval over checkpoints
ALL = "all"  # stands for all kinds of head
COLUMNS = ("data", "task", "grid", "requested", "metric", "protocol", "kind", "head_classes", "n", "checkpoints",
           "gain", "low", "high", "wide_low", "wide_high", "smallest", "largest", "models")  # fmt: skip

Interval = tuple[float, float]


@dataclass(frozen=True)
class Pooled:
    """The unweighted mean gain of checkpoints on the same n images, in percentage points.

    Attributes:
        row: the row of one checkpoint, for the fields that all of them share.
        kind: the kind of their heads, or `ALL`.
        models: their names.
        gains: their gains.
        over_images: 95 % interval for the mean gain of the same checkpoints on other images.
        over_both: 95 % interval for the mean gain of other checkpoints on other images; None below `LEAST` checkpoints.
    """

    row: Row
    kind: str
    models: tuple[str, ...]
    gains: NDArray[np.float64]
    over_images: Interval
    over_both: Interval | None

    @property
    def gain(self) -> float:
        return float(self.gains.mean())

    @property
    def where(self) -> str:
        """Data, task with the grid of a mosaic, and requested size."""
        return group_name(self.row)

    @property
    def heads(self) -> str:
        """Description of the heads, such as `5 exact, 1000 classes`."""
        kind = "of all kinds" if self.kind == ALL else self.kind
        return f"{len(self.models)} {kind}, {self.row['head_classes']} classes"

    def as_row(self) -> Row:
        """Return a row with the columns `COLUMNS`."""
        names = ("data", "grid", "requested", "metric", "protocol", "head_classes", "n")
        wide = self.over_both or (None, None)
        return {
            **{name: self.row.get(name) for name in names},
            "task": f"{self.row['task']}{over(self.row)}",
            "kind": self.kind,
            "checkpoints": len(self.models),
            "gain": self.gain,
            **dict(zip(("low", "high", "wide_low", "wide_high"), (*self.over_images, *wide), strict=True)),
            "smallest": float(self.gains.min()),
            "largest": float(self.gains.max()),
            "models": " ".join(self.models),
        }


def pooled(rows: Iterable[Row]) -> list[Pooled]:
    """Return the pooled gain of each kind of head, and of all kinds if there are several.

    Pooled are two or more checkpoints with the same data, task, requested size, metric, protocol and number of classes
    of the head. Rows are left out if they have no interval, do not count, are of failed cells, or if their checkpoint
    is flagged; `unpooled` reports others.
    """
    groups: dict[tuple[str, tuple[object, ...]], list[Row]] = {}
    for row in filter(_can_be, _counting(rows)):
        same = (row["_family"], row["head_classes"], row["n"], len(row["resampled"]))
        for kind in (row["kind"], ALL):
            groups.setdefault((str(kind), same), []).append(row)
    found = []
    for (kind, _), members in groups.items():
        alone = kind == ALL and len({row["kind"] for row in members}) == 1
        if len(members) > 1 and not alone:
            found.append(_pooled(kind, members))
    return found


def unpooled(rows: Iterable[Row]) -> list[str]:
    """Report gains with an interval that could not be pooled with others of their family, and why."""
    families: dict[object, list[Row]] = {}
    for row in _counting(rows):
        families.setdefault(row["_family"], []).append(row)
    other: dict[tuple[str, int, int], dict[str, dict[str, None]]] = {}
    lacking: dict[str, dict[str, None]] = {}
    for family in families.values():
        of_classes: dict[int, list[Row]] = {}
        for row in family if len(family) > 1 else ():
            if _can_be(row):
                of_classes.setdefault(row["head_classes"], []).append(row)
            else:
                lacking.setdefault(group_name(row), {})[row["model"]] = None
        for alike in of_classes.values():
            most = Counter(row["n"] for row in alike).most_common(1)[0][0]
            of_most = Counter(len(row["resampled"]) for row in alike).most_common(1)[0][0]
            for row in alike:
                if row["n"] != most:
                    models = other.setdefault((group_name(row), row["n"], most), {}).setdefault(row["model"], {})
                    models[row["metric"]] = None
                elif len(row["resampled"]) != of_most:
                    lacking.setdefault(group_name(row), {})[row["model"]] = None
    lines = []
    for (where, n, most), found in other.items():
        metrics = ", ".join(dict.fromkeys(metric for of in found.values() for metric in of))
        said = f"{where}: not pooled: {some_of(sorted(found))} with {n} images for {metrics}"
        lines.append(f"{said}, where others have {most}.")
    lines += [
        f"{where}: not pooled: {some_of(sorted(models))}, whose records lack head_classes, kind or as many resampled "
        "gains as others: measure them again."
        for where, models in lacking.items()
    ]
    return lines


def _counting(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        counts = row["status"] == "ok" and not row["not_counted"] and row.get("baseline_check") != "flagged"
        if counts and row.get("protocol") in (*OVER_PLAIN, VERSUS) and row["ci_low"] is not None:
            yield row


def _can_be(row: Row) -> bool:
    return all(row.get(name) is not None for name in ("resampled", "head_classes", "kind", "n"))


def _pooled(kind: str, rows: Sequence[Row]) -> Pooled:
    gains = np.array([row["gain"] for row in rows])
    resampled = np.stack([unpacked(row["resampled"]) for row in rows])  # the same images in the same column
    images, both = intervals(gains, resampled)
    return Pooled(rows[0], kind, tuple(row["model"] for row in rows), gains, images, both)


def intervals(gains: NDArray[np.float64], resampled: NDArray[np.float64]) -> tuple[Interval, Interval | None]:
    """Compute 95 % intervals for the mean gain, over images alone, and over both checkpoints and images.

    The first is the mean plus or minus 1.96 standard deviations of the mean gain over the bootstrap resamples. All
    checkpoints share the resamples, so this includes the correlation of their gains. The second adds the variance of
    the gains over checkpoints, divided by M, and uses Student's t with M - 1 degrees of freedom. Both variances include
    the effect of the images on single gains, so the second interval is rather too wide.

    Args:
        gains: gains of M checkpoints `(M,)`.
        resampled: their gains in B resamples of the images `(M, B)`.

    Returns:
        The two intervals; the second is None below `LEAST` checkpoints.
    """
    mean, of_images = float(gains.mean()), float(resampled.mean(axis=0).var(ddof=1))
    share = (1 + CONFIDENCE) / 2
    reach = float(norm.ppf(share)) * math.sqrt(of_images)
    narrow = mean - reach, mean + reach
    if len(gains) < LEAST:
        return narrow, None
    reach = float(t.ppf(share, len(gains) - 1)) * math.sqrt(of_images + float(gains.var(ddof=1)) / len(gains))
    return narrow, (mean - reach, mean + reach)
