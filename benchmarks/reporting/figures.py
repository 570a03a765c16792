"""Plot a whole run, over its data sets and tasks.

Each plot shows the first metric of a task, for heads with the most frequent number of classes. `write_figures` draws
the plots from the same rows and records as the page.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from timm_csra.config import LOG_SOFTMAX, LOGITS
from timm_csra.evaluation.statistics import FIXED, VERSUS

from ..records.files import Record, write_text
from .pooled import ALL, pooled
from .summary import FIRST_METRIC, Row, task
from .tables import short

COSTS = ("pictures", "way", "size", "checkpoints", "cost", "gain")  # cost: multiply-accumulates, plain at `OWN` = 1
VALUES = alt.NamedData("values")  # the rows of a plot; inline, altair would check each against the schema of Vega-Lite
OWN = "1x"  # the size of the plots by head, by scores and by lam
SCORES = {"fixed": "logits, lam 0.1", "fixed_log_softmax": "log_softmax, lam 0.3"}
COLOURS = {"logits, lam 0.1": "#2a6fb0", "log_softmax, lam 0.3": "#d9822b", "plain": "#5b5f66"}
Figure = tuple[alt.FacetChart | alt.LayerChart, list[dict[str, Any]]]  # a chart and its `VALUES`
WAYS = {  # names of protocols in the plot of ways to use a checkpoint
    **SCORES,
    "five_crops_mean": "five crops, mean",
    "five_crops_max": "five crops, maximum",
    "max_pool": "maximum alone",
    "test_time_pool": "test-time pooling",
}


def write_figures(records: Sequence[Record], rows: Sequence[Row], out: Path) -> list[Path]:
    """Write each figure that has data, as SVG and PNG, to `out/figures`. Returns the SVG files."""
    mine = _with_most_frequent_classes(rows)
    models = {row["model"] for row in mine}
    charts = {
        "heads": _by_head(mine),
        "scores": _by_scores(mine),
        "lam": _by_lam([record for record in records if record["model"] in models]),
        "compute": _by_compute(list(ways(rows))),
    }
    written = []
    for name, found in charts.items():
        if found is not None:
            chart, values = found
            svg = vl_convert.vegalite_to_svg(chart.to_dict() | {"datasets": {VALUES.name: values}})
            write_text(out / "figures" / f"{name}.svg", svg)
            (out / "figures" / f"{name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
            written.append(out / "figures" / f"{name}.svg")
    return written


def _with_most_frequent_classes(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of heads with the most frequent number of classes."""
    counts = Counter(classes for classes, _ in {(row.get("head_classes"), row["model"]) for row in rows})
    most = max(counts, key=lambda classes: (counts[classes], classes or 0), default=None)
    return [row for row in rows if row.get("head_classes") == most and row["metric"] == FIRST_METRIC.get(row["task"])]


def _pictures(row: Row) -> str:
    return f"{row['data']}, {task(row)}, {row['metric']}"


def _by_head(rows: Sequence[Row]) -> Figure | None:
    """Plot the mean gain of each kind of head with its interval over images, and the gain of every checkpoint."""
    own = [row for row in rows if row["requested"] == OWN and row["protocol"] in SCORES]
    means = [
        {"pictures": _pictures(one.row), "head": one.kind, "scores": SCORES[one.row["protocol"]], "gain": one.gain}
        | {"low": one.over_images[0], "high": one.over_images[1]}
        for one in pooled(own)
        if one.kind != ALL
    ]
    single = [
        {"pictures": _pictures(row), "head": row.get("kind"), "scores": SCORES[row["protocol"]], "each": row["gain"]}
        for row in own
    ]
    if not single:
        return None
    base = alt.Chart(VALUES).encode(
        y=alt.Y("scores:N", title=None, axis=None), color=_colour("scores", [*SCORES.values()])
    )
    zero = base.mark_rule(strokeDash=[3, 3], color="#9aa0a8").encode(x=alt.datum(0), y=alt.value(0), y2=alt.value(34))
    each = base.mark_point(size=22, opacity=0.7).encode(x=alt.X("each:Q", title="gain, points"))
    mean = base.mark_tick(thickness=3, size=16).encode(x="gain:Q")
    bars = base.mark_rule(size=2).encode(x="low:Q", x2="high:Q")
    chart = (
        (zero + each + bars + mean)
        .properties(width=190, height=34)
        .facet(row=_facet("pictures"), column=alt.Column("head:N", title="kind of head"))
        .properties(title="Gain by head and pictures: checkpoints (o), mean (|), its 95 % interval over images")
    )
    return chart, [*means, *single]


def _by_scores(rows: Sequence[Row]) -> Figure | None:
    """Plot the gain with log-probabilities against that with logits, for each checkpoint and data set."""
    gains: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    verdicts = {}
    for row in rows:
        if row["requested"] == OWN and row["protocol"] in (*SCORES, VERSUS):
            key = (_pictures(row), short(row["model"]), row.get("kind"))
            gains[key][row["protocol"]] = row["gain"]
            if row["protocol"] == VERSUS:
                low, high = row["ci_low"], row["ci_high"]
                verdicts[key] = low is not None and high is not None and (low > 0 or high < 0)
    values = [
        {"pictures": pictures, "model": model, "head": head, "differ": "yes" if verdicts.get(key) else "no"}
        | {"logits": found["fixed"], "log_softmax": found["fixed_log_softmax"]}
        for key, found in gains.items()
        for pictures, model, head in [key]
        if found.keys() >= set(FIXED)
    ]
    if not values:
        return None
    ends = [min(v[name] for v in values for name in (LOGITS, LOG_SOFTMAX)) - 0.3,
            max(v[name] for v in values for name in (LOGITS, LOG_SOFTMAX)) + 0.3]  # fmt: skip
    scale = alt.Scale(domain=ends)
    same = alt.Chart(alt.Data(values=[{"x": end, "y": end} for end in ends])).mark_line(color="#9aa0a8", strokeWidth=1)
    points = alt.Chart(VALUES).mark_point(size=55, opacity=0.85)
    shown = points.encode(
        x=alt.X("logits:Q", scale=scale, title="gain on logits, lam 0.1, points"),
        y=alt.Y("log_softmax:Q", scale=scale, title="gain on log-probabilities, lam 0.3, points"),
        color=alt.Color("pictures:N", title=None, legend=alt.Legend(labelLimit=300)),
        shape=alt.Shape("head:N", title="kind of head"),
        fill=alt.condition("datum.differ == 'yes'", alt.Color("pictures:N", legend=None), alt.value("transparent")),
        tooltip=["model:N", "pictures:N", alt.Tooltip("logits:Q", format="+.2f"),
                 alt.Tooltip("log_softmax:Q", format="+.2f")],
    )  # fmt: skip
    chart = (same.encode(x=alt.X("x:Q", scale=scale), y=alt.Y("y:Q", scale=scale)) + shown).properties(
        width=380, height=380, title="The two kinds of scores; filled: the 95 % interval of their difference excludes 0"
    )
    return chart, values


def _by_lam(records: Sequence[Record]) -> Figure | None:
    """Plot the gain against lam at T = inf, for every checkpoint and for their mean."""
    values = [
        {"pictures": _pictures(record | result), "model": short(record["model"])}
        | {"scores": result["scores"], "lam": float(result["lam"]), "gain": result["gain"]}
        for record in records
        if record["status"] == "ok" and OWN in record["requested"]
        for result in record["results"]
        if result["protocol"] == "curve" and result["gain"] is not None
        if result["metric"] == FIRST_METRIC.get(record["task"])
    ]
    if not values:
        return None
    colour = alt.Color("scores:N", title=None, scale=alt.Scale(domain=[LOGITS, LOG_SOFTMAX],
                       range=[*COLOURS.values()][:2]))  # fmt: skip
    base = alt.Chart(VALUES).encode(x=alt.X("lam:Q", scale=alt.Scale(type="sqrt"), title="lam, T = inf"), color=colour)
    zero = base.mark_rule(strokeDash=[3, 3], color="#9aa0a8").encode(y=alt.datum(0), x=alt.value(0), x2=alt.value(210))
    each = base.mark_line(opacity=0.25, strokeWidth=1).encode(
        y=alt.Y("gain:Q", title="gain, points"), detail=["model:N", "scores:N"]
    )
    mean = base.mark_line(strokeWidth=3).encode(y="mean(gain):Q")
    chart = (
        (zero + each + mean)
        .properties(width=210, height=150)
        .facet(_wrapped("pictures"), columns=3)
        .resolve_scale(y="independent")
        .properties(title="Gain against lam: every checkpoint, and their mean")
    )
    return chart, values


def _by_compute(values: list[Row]) -> Figure | None:
    """Plot the gain of each way to use a checkpoint, over the plain model at its own size, against its compute."""
    if not any(value["way"] not in ("plain", *SCORES.values()) for value in values):
        return None
    base = alt.Chart(VALUES).encode(
        x=alt.X("cost:Q", scale=alt.Scale(type="log", domain=[0.9, 6]), title="multiply-accumulates, plain at 1x = 1"),
        y=alt.Y("gain:Q", title="mean gain, points"),
    )
    points = base.mark_point(filled=True, size=60).encode(
        color=alt.Color("way:N", title=None), shape=alt.Shape("size:N", title="image size"), tooltip=["way:N", "size:N"]
    )
    zero = base.mark_rule(strokeDash=[3, 3], color="#9aa0a8").encode(y=alt.datum(0), x=alt.value(0), x2=alt.value(230))
    chart = (
        (zero + points)
        .properties(width=230, height=170)
        .facet(_wrapped("pictures"), columns=3)
        .resolve_scale(y="independent")
        .properties(title="Accuracy against compute: means over the same checkpoints")
    )
    return chart, values


def ways(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the mean cost and gain of each way to use a checkpoint, with columns `COSTS`, for each data set and task.

    The means are over the checkpoints that have figures for every way that most checkpoints have.
    """
    found: dict[str, dict[tuple[str, str], dict[str, tuple[float, float]]]] = defaultdict(lambda: defaultdict(dict))
    for row in _with_most_frequent_classes(rows):
        pictures, size, model = _pictures(row), row["requested"], row["model"]
        macs, extra = (float(row.get(name) or 0) for name in ("macs", "extra_macs"))
        if not macs:  # old records have no multiply-accumulates
            continue
        if row["protocol"] == "fixed":
            found[pictures]["plain", size][model] = (macs, row["baseline"])
        if row["protocol"] in WAYS:
            cost = float((row.get("rival_macs") or {}).get(row["protocol"], macs + extra))
            found[pictures][WAYS[row["protocol"]], size][model] = (cost, row["value"])
    for pictures, ways in found.items():
        own = ways.get(("plain", OWN), {})
        most = max(map(len, ways.values()))
        wanted = {way: models for way, models in ways.items() if 2 * len(models) >= most}
        common = set(own).intersection(*wanted.values())
        for (way, size), models in wanted.items() if common else ():
            costs = [models[model][0] / own[model][0] for model in common]
            gains = [models[model][1] - own[model][1] for model in common]
            yield {"pictures": pictures, "way": way, "size": size, "checkpoints": len(common)} | {
                "cost": sum(costs) / len(common),
                "gain": sum(gains) / len(common),
            }


def _colour(field: str, domain: Sequence[str]) -> alt.Color:
    return alt.Color(f"{field}:N", title=None, scale=alt.Scale(domain=list(domain), range=[COLOURS[d] for d in domain]))


def _facet(field: str) -> alt.Row:
    return alt.Row(f"{field}:N", title=None, header=alt.Header(labelAngle=0, labelAlign="left", labelLimit=260))


def _wrapped(field: str) -> alt.Facet:
    return alt.Facet(f"{field}:N", title=None, header=alt.Header(labelLimit=260))
