"""Write results as Markdown, and as a table with the columns of timm's results files."""

from collections.abc import Iterable, Sequence

from timm_csra.evaluation.statistics import AGREEMENT, FIXED, VERSUS

from ..records.files import Record
from .expected import precision_notes
from .legends import LEGEND_OF_AGREEMENT
from .nominal import deficits
from .page import failures
from .pooled import LEGEND as LEGEND_OF_POOLED
from .pooled import pooled
from .summary import OVER_PLAIN, VERDICTS, Row, group_name, headline, versus
from .tables import agreement_notes, by_metric, known, left_out, number, short

TIMM_COLUMNS = ("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation")
GAINS = {  # columns of protocols that choose nothing on the test images
    name: (protocol, of)
    for protocol in (*FIXED, VERSUS, AGREEMENT)
    for name, of in ((f"gain_{protocol}", "gain"), (f"{protocol}_low", "ci_low"), (f"{protocol}_high", "ci_high"))
}
RESULT_COLUMNS = (
    *(
        "data",
        "task",
        "score_classes",
        "metric",
        "n",
        "baseline",
        *GAINS,
        "agreement_lam",
        "gain_crossfit",
        "baseline_check",
    ),
)


def timm_rows(records: Iterable[Record]) -> list[Row]:
    """Return one row for each cell and metric, with the columns of timm's results files where they apply."""
    rows = []
    for record in records:
        metrics = by_metric(record)
        tops = {m: found["fixed"]["baseline"] for m, found in metrics.items() if m in ("top1", "top5")}
        errors = {f"{m}_err": 100 - value for m, value in tops.items() if value is not None}
        preprocessing = record.get("preprocessing") or {}
        for metric, found in metrics.items():
            rows.append(
                {
                    "model": short(record["model"]),
                    "img_size": record["img_size"],
                    **tops,
                    **errors,
                    "param_count": record.get("param_count"),
                    "crop_pct": preprocessing.get("crop_pct"),
                    "interpolation": preprocessing.get("interpolation"),
                    "data": record["data"],
                    "task": group_name(record).split(" · ")[1],
                    "score_classes": record["score_classes"],
                    "metric": metric,
                    "n": found["fixed"]["n"],
                    "baseline_check": record.get("baseline_check"),
                    "baseline": found["fixed"]["baseline"],
                    **{name: found.get(protocol, {}).get(of) for name, (protocol, of) in GAINS.items()},
                    "agreement_lam": found.get(AGREEMENT, {}).get("lam"),
                    "gain_crossfit": found.get("crossfit", {}).get("gain"),
                }
            )
    return rows


def markdown(records: Sequence[Record], rows: Sequence[Row], notes: Iterable[str] = ()) -> str:
    """Return a Markdown page: verdicts, a line for each checkpoint and metric, `notes`, and cells without a result."""
    protocols = (*FIXED, VERSUS, *([AGREEMENT] if has_agreement(records) else []), "crossfit")
    lines = [
        "# Results",
        "",
        "| data, task, size | metric | protocol | better | worse | no evidence | flagged |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    counted = headline(rows)
    for (data, task, grid, size, metric, protocol), counts in counted.items():
        if protocol in OVER_PLAIN:
            named = task if grid == "None" else f"{task} {grid}x{grid}"
            numbers = " | ".join(str(counts.get(verdict, 0)) for verdict in (*VERDICTS, "flagged"))
            lines.append(f"| {data}, {named}, {size} | {metric} | {protocol} | {numbers} |")
    lines += ["", *(f"- {line}" for line in versus(counted))]
    if means := pooled(rows):
        lines += ["", LEGEND_OF_POOLED, "", "| data, task, size | metric | protocol | heads | mean gain | over both |"]
        lines.append("|---|---|---|---|--:|--:|")
    for one in means:
        mean = f"{one.gain:+.2f} [{one.over_images[0]:+.2f}, {one.over_images[1]:+.2f}]"
        both = "[{:+.2f}, {:+.2f}]".format(*one.over_both) if one.over_both else "-"
        said = (one.where, one.row["metric"], one.row["protocol"], one.heads, mean, both)
        lines.append(f"| {' | '.join(said)} |")
    if flagged := sorted({short(record["model"]) for record in records if record.get("baseline_check") == "flagged"}):
        lines.append(
            f"- flagged, and left out of these counts: {', '.join(flagged)}, whose top-1 at lam = 0 differs from the "
            "published figure by more than 0.1 points."
        )
    lines += [f"- {line}" for line in (*precision_notes(records), *notes)]
    lines += [
        "",
        "`fixed`: logits, lam 0.1. `fixed_log_softmax`: lam 0.3. Both with T inf. n: images that count for the metric.",
        *([LEGEND_OF_AGREEMENT] if AGREEMENT in protocols else []),
        "",
        f"| model | data, task, size | px | metric | n | lam = 0 | {' | '.join(protocols)} |",
        f"|---|---|--:|---|--:|--:|{'--:|' * len(protocols)}",
    ]
    for record in records:
        for metric, by in by_metric(record).items():
            cells = [short(record["model"]), group_name(record), record["img_size"], metric]
            cells += [known(by["fixed"]["n"]), number(by["fixed"]["baseline"])]
            cells += [_interval(by.get(protocol)) for protocol in protocols]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *(f"- {line}" for line in (*agreement_notes(records), *left_out(records), *deficits(records)))]
    if without := failures(records):
        lines += ["", "Cells without a result:", ""]
        lines += [f"- {len(f['cells'])} cells, {f['status']}: {f['reason']}" for f in without]
    return "\n".join([*lines, ""])


def has_agreement(records: Iterable[Record]) -> bool:
    return any(result["protocol"] == AGREEMENT for record in records for result in record["results"])


def _interval(result: Record | None) -> str:
    if result is None or result["gain"] is None:
        return "-"
    interval = "" if result["ci_low"] is None else f" [{result['ci_low']:+.2f}, {result['ci_high']:+.2f}]"
    chosen = f", lam {result['lam']}" if result["protocol"] == AGREEMENT else ""
    return f"{result['gain']:+.2f}{interval}{chosen}"
