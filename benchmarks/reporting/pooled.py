"""What gains of several checkpoints say together: small ones in one direction are evidence that single tests miss."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from timm_csra.evaluation.statistics import CONFIDENCE, VERSUS

from ..records.resampled import unpacked
from .summary import OVER_PLAIN, Row, group_name, over

LEGEND = (
    "Pooled gains: unweighted means over checkpoints whose heads are of one kind and have as many classes, with 95 % "
    "intervals over images (these checkpoints on other images) and, from eight checkpoints on, over checkpoints and "
    "images both."
)
LEAST = 8  # checkpoints of an interval that is over checkpoints too
ALL = "all"  # kinds of head
COLUMNS = ("data", "task", "grid", "requested", "metric", "protocol", "kind", "head_classes", "n", "checkpoints",
           "gain", "low", "high", "wide_low", "wide_high", "smallest", "largest", "models")  # fmt: skip

Interval = tuple[float, float]


@dataclass(frozen=True)
class Pooled:
    """The unweighted mean of the gains of checkpoints, in points, on the same n images.

    Attributes:
        row: of one of them, for what they have in common.
        kind: of their heads, or `ALL`.
        models: their names.
        gains: of each.
        over_images: 95 % interval for the mean of these very checkpoints, on other images.
        over_both: for the mean of other checkpoints on other images, the wider one; None below `LEAST` checkpoints.
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
        """Data, task with the grid of a mosaic, and size in the words of the request."""
        return group_name(self.row)

    @property
    def heads(self) -> str:
        """`5 exact, 1000 classes`."""
        kind = "of all kinds" if self.kind == ALL else self.kind
        return f"{len(self.models)} {kind}, {self.row['head_classes']} classes"

    def as_row(self) -> Row:
        """With the names of `COLUMNS`."""
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
    """Give the pooled gain of each kind of head, and of all kinds where there are several: of two checkpoints or more
    that share data, task, size as it was asked for, metric, protocol and the head's number of classes.

    Rows without an interval are left out, and those that a later record replaces, and of checkpoints whose baseline
    disagrees with the published one.
    """
    groups: dict[tuple[str, tuple[object, ...]], list[Row]] = {}
    for row in rows:
        counts = not row["not_counted"] and row.get("baseline_check") != "flagged"
        if counts and row.get("resampled") and row["protocol"] in (*OVER_PLAIN, VERSUS):
            same = (row["_family"], row["head_classes"], row["n"])
            for kind in (row["kind"], ALL):
                groups.setdefault((str(kind), same), []).append(row)
    found = []
    for (kind, _), members in groups.items():
        alone = kind == ALL and len({row["kind"] for row in members}) == 1
        if len(members) > 1 and not alone:
            found.append(_pooled(kind, members))
    return found


def _pooled(kind: str, rows: Sequence[Row]) -> Pooled:
    gains = np.array([row["gain"] for row in rows])
    resampled = np.stack([unpacked(row["resampled"]) for row in rows])  # the same images in the same column
    images, both = intervals(gains, resampled)
    return Pooled(rows[0], kind, tuple(row["model"] for row in rows), gains, images, both)


def intervals(gains: NDArray[np.float64], resampled: NDArray[np.float64]) -> tuple[Interval, Interval | None]:
    """Give 95 % intervals for the mean gain, over images alone, and over checkpoints and images both.

    The first is the mean -+ 1.96 standard deviations of the mean over resamples, which holds what the gains have in
    common because they are of the same images. To its variance the second adds that of the gains over checkpoints,
    divided by their number, with Student's t of one degree of freedom less. What images do to single gains is in both
    terms, so that it is rather too wide.

    Args:
        gains: of M checkpoints `(M,)`.
        resampled: of each in B resamples of the images `(M, B)`.

    Returns:
        The second is None below `LEAST` checkpoints.
    """
    mean, of_images = float(gains.mean()), float(resampled.mean(axis=0).var(ddof=1))
    share = (1 + CONFIDENCE) / 2
    reach = float(norm.ppf(share)) * math.sqrt(of_images)
    narrow = mean - reach, mean + reach
    if len(gains) < LEAST:
        return narrow, None
    reach = float(t.ppf(share, len(gains) - 1)) * math.sqrt(of_images + float(gains.var(ddof=1)) / len(gains))
    return narrow, (mean - reach, mean + reach)
