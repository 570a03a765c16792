"""Explain the protocols and intervals under a table of results."""

from collections.abc import Collection, Iterable

from timm_csra.evaluation.statistics import AGREEMENT, VERSUS

from ..records.files import Record

TERMS = {
    "fixed": "logits, lam 0.1, T inf, as in the paper",
    "fixed_log_softmax": "lam 0.3, T inf",
    "crossfit": "chosen on one half, measured on the other, both ways",
    VERSUS: "fixed_log_softmax over fixed",
    "best": "settings chosen on the test images themselves, optimistic",
}
LEGEND_OF_NARROW = "summary.csv has the settings of crossfit, and the other protocols: "
LEGEND_OF_AGREEMENT = (
    "agreement: log_softmax, T inf, lam chosen without labels on other pictures; its intervals treat that lam as fixed."
)


def legend(finished: Iterable[Record], protocols: Collection[str]) -> str:
    """Explain the protocols of a table, and its intervals if it has any."""
    intervals = any(result["ci_low"] is not None for record in finished for result in record["results"])
    means = "with 95 % paired bootstrap intervals over" if intervals else "of"
    text = f"Percent, and gains over lam=0 in points {means} the n images that count for the metric."
    text += "".join(f" {name}: {meaning}." for name, meaning in TERMS.items() if name in protocols)
    others = set(protocols) - {*TERMS, AGREEMENT}
    return f"{text} Other columns: the plain model with another pooling." if others else text
