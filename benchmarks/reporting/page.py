"""Write the page of a sweep, self-contained, with plots and tables; and each plot as a file."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import altair as alt
import vl_convert

from timm_csra.evaluation.statistics import AGREEMENT, CONFIDENCE, VERSUS

from ..records.files import Record, write_text
from .nominal import deficits
from .pooled import LEGEND as LEGEND_OF_POOLED
from .pooled import pooled
from .summary import FIRST_METRIC, OVER_PLAIN, VERDICTS, Row, group_name, headline
from .tables import agreement_notes, left_out, short

PAGE = Path(__file__).with_name("page.html")
FIELDS = (  # columns of the page's rows
    *("model", "group", "metric", "protocol", "img_size", "n", "baseline", "gain", "ci_low", "ci_high"),
    *("p_holm", "verdict", "scores", "lam", "kind", "macs"),
)
SOMETIMES = ("channels_last", "classes of the head", "weights of files")  # left out if no record has them
NOT_TESTED = "not tested"
FLAGGED = "flagged"
NAMED = (("scores", ""), ("lam", ""), ("kind", ""))  # fields and their defaults
COLOURS = {
    "better": "#1c9b69", "worse": "#dd5a3c", "no evidence": "#878d96", FLAGGED: "#b8860b", NOT_TESTED: "#5b8fc9"
}  # fmt: skip


def page_data(records: Sequence[Record], rows: Sequence[Row], notes: Iterable[str] = ()) -> Record:
    """Return everything that the page shows as JSON values, with numbers for names. `notes` are lines of text."""
    names: dict[str, int] = {}

    def number(text: Any) -> int:
        return names.setdefault(str(text), len(names))

    table = [
        [
            *(number(v) for v in (short(row["model"]), group_name(row), row["metric"], row["protocol"])),
            *(number(row["img_size"]), row["n"]),
            *(_rounded(row.get(name)) for name in ("baseline", "gain", "ci_low", "ci_high")),
            None if row.get("p_holm") is None else float(f"{row['p_holm']:.2g}"),
            number(_verdict(row)),
            *(number(row.get(name) or nothing) for name, nothing in NAMED),
            row.get("macs"),
        ]
        for row in rows
    ]
    groups: dict[str, dict[str, None]] = {}  # of each record
    for row in rows:
        if row["protocol"] == "fixed":
            groups.setdefault(repr(row["key"]), {})[group_name(row)] = None
    curves = [
        [
            *(number(short(record["model"])), number(group), number(result["metric"]), number(result["scores"])),
            *(float(result["lam"]), *(_rounded(result[name]) for name in ("gain", "ci_low", "ci_high"))),
        ]
        for record in records
        for group in groups.get(repr(record["key"]), ())
        for result in record["results"]
        if result["protocol"] == "curve" and result["gain"] is not None
    ]
    flagged = any(_verdict(row) == FLAGGED for row in rows)
    return {
        "names": list(names),
        "fields": list(FIELDS),
        "rows": table,
        "curves": curves,
        "verdicts": [*VERDICTS, *([FLAGGED] if flagged else []), NOT_TESTED],
        "counted": [*VERDICTS, FLAGGED],
        "headline": [
            [f"{data} · {task}{'' if grid == 'None' else f' {grid}x{grid}'} · {size}", metric, protocol, dict(counts)]
            for (data, task, grid, size, metric, protocol), counts in headline(rows).items()
            if protocol in (*OVER_PLAIN, VERSUS)
        ],
        "pooled": [
            [one.where, one.row["metric"], one.row["protocol"], one.heads]
            + [_rounded(number) for number in (one.gain, *one.over_images, *(one.over_both or (None, None)))]
            for one in pooled(rows)
        ],
        "pooled_legend": LEGEND_OF_POOLED,
        "versus": VERSUS,
        "left_out": [*left_out(records), *deficits(records), *notes],
        "first_metrics": FIRST_METRIC,
        "failures": failures(records),
        "measured": [*_measured(records), *(["lam without labels", note] for note in agreement_notes(records))],
    }


def _verdict(row: Row) -> str:
    """Return the verdict that `headline` counts."""
    if not row.get("verdict"):
        return NOT_TESTED
    return FLAGGED if row.get("baseline_check") == FLAGGED else str(row["verdict"])


def failures(records: Iterable[Record]) -> list[Record]:
    """Return cells without a result, grouped by status and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record["status"] != "ok":
            where = f"{short(record['model'])} on {group_name(record)}"
            found.setdefault((record["status"], str(record["reason"])), []).append(where)
    return [{"status": s, "reason": reason, "cells": cells} for (s, reason), cells in sorted(found.items())]


def _measured(records: Sequence[Record]) -> list[list[str]]:
    """Describe hardware, software and options: each value, with its number of records if there are several values."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        environment, key = record.get("environment", {}), record["key"]
        said = {
            **{name: environment.get(name) for name in ("device", "platform", "python", "commit")},
            "autocast": key.get("amp"),
            "channels_last": key.get("channels_last"),
            "seed": key.get("seed"),
            "classes of the head": record.get("classes_from"),
            "weights of files": record.get("weights_from"),
            "settings (lam, T, scores)": f"{len(key.get('settings', ()))}",
            **environment.get("packages", {}),
        }
        for name, value in said.items():
            if value is None and name in SOMETIMES:
                continue
            counts.setdefault(name, Counter())[str(value)] += 1
    return [
        [name, next(iter(values)) if len(values) == 1 else ", ".join(f"{v} ({n} cells)" for v, n in values.items())]
        for name, values in counts.items()
    ]


def page(data: Record) -> str:
    """Return the HTML of the page. Its script fills Altair's plot specifications with the selected data."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    specs = {name: chart.to_dict() for name, chart in charts(data["verdicts"]).items()}
    vega = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        vega=vega.replace("</script", "<\\/script"),
        specs=json.dumps(specs).replace("</", "<\\/"),
        data=text.replace("</", "<\\/"),
    )


def charts(verdicts: Sequence[str]) -> dict[str, alt.LayerChart]:
    """Return the four plots. The page or `write_plots` supplies their named data; `verdicts` are all possible ones."""
    scale = alt.Scale(domain=list(verdicts), range=[COLOURS[verdict] for verdict in verdicts])
    colour = alt.Color("verdict:N", scale=scale, title=None)
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeDash=[4, 4], color="#7a7f87")
    gain = alt.X("gain:Q", title="gain, points")
    tooltip = [
        alt.Tooltip("model:N"),
        *(alt.Tooltip(f"{name}:Q", format="+.2f") for name in ("gain", "ci_low", "ci_high")),
        alt.Tooltip("baseline:Q", format=".2f"),
        alt.Tooltip("verdict:N"),
    ]
    rows = alt.Chart(alt.NamedData("rows"))
    order = alt.Y("model:N", sort=alt.EncodingSortField("place", order="ascending"), title=None)
    forest = rows.mark_rule().encode(x=alt.X("ci_low:Q", title="gain, points"), x2="ci_high:Q", y=order, color=colour)
    points = rows.mark_point(filled=True, size=55, opacity=1).encode(x=gain, y=order, color=colour, tooltip=tooltip)
    curve = alt.Chart(alt.NamedData("curves")).encode(x=alt.X("lam:Q", title="lam, T = inf"))
    who = alt.Color("who:N", title=None, scale=alt.Scale(range=["#2a6fb0", "#d9822b", "#7a4fb5", "#2f9e8f"]))
    band = curve.mark_area(opacity=0.25).encode(y=alt.Y("low:Q", title="gain, points"), y2="high:Q", color=who)
    line = curve.mark_line(point=True).encode(
        y=alt.Y("gain:Q", title="gain, points"),
        color=who,
        tooltip=[alt.Tooltip("who:N"), alt.Tooltip("lam:Q"), alt.Tooltip("gain:Q", format="+.2f")],
    )
    scatter = alt.Chart(alt.NamedData("every"))
    against = scatter.mark_circle(size=45, opacity=0.6).encode(
        x=alt.X("baseline:Q", title="baseline, percent", scale=alt.Scale(zero=False)),
        y=alt.Y("gain:Q", title="gain, points"),
        color=colour,
        tooltip=tooltip,
    )
    sizes = alt.Chart(alt.NamedData("sizes")).mark_circle(size=45, opacity=0.6)
    by_size = sizes.encode(
        x=alt.X("pixels:Q", title="image size, pixels", scale=alt.Scale(zero=False)),
        y=alt.Y("gain:Q", title="gain, points"),
        color=colour,
        tooltip=tooltip,
    )
    wide: dict[str, Any] = {"width": "container"}
    return {
        "forest": (zero.encode(x="zero:Q") + forest + points).properties(**wide, height=alt.Step(18)),
        "curve": (zero.encode(y="zero:Q") + band + line).properties(**wide, height=260),
        "baseline": (zero.encode(y="zero:Q") + against).properties(**wide, height=260),
        "size": (zero.encode(y="zero:Q") + by_size).properties(**wide, height=260),
    }


PLOTTED = 40  # largest number of checkpoints in a forest plot that is written to a file
PLOTS = {  # title and plots of each protocol; one curve plot shows both kinds of scores
    "fixed": ("logits, lam 0.1", ("forest", "curve", "baseline", "size")),
    "fixed_log_softmax": ("log_softmax, lam 0.3", ("forest", "baseline", "size")),
    VERSUS: ("log_softmax, lam 0.3, over logits, lam 0.1", ("forest",)),
    AGREEMENT: ("log_softmax, lam chosen without labels", ("forest", "baseline", "size")),
}


def write_plots(data: Record, out: Path) -> list[Path]:
    """Write each plot as PNG and SVG, for the first metric of each task and the protocols in `PLOTS`."""
    names = data["names"]
    rows = [dict(zip(FIELDS, row, strict=True)) for row in data["rows"]]
    for row in rows:
        for name in ("model", "group", "metric", "protocol", "img_size", "verdict"):
            row[name] = names[row[name]]
        row["pixels"] = int(str(row["img_size"]).split("x")[0]) if str(row["img_size"])[0].isdigit() else None
    written = []
    for group, protocol in itertools.product(sorted({row["group"] for row in rows}), PLOTS):
        metric = FIRST_METRIC.get(group.split(" · ")[1].split(" ")[0], "mAP")
        mine = [r for r in rows if (r["group"], r["metric"], r["protocol"]) == (group, metric, protocol)]
        if not mine:
            continue
        ranked = sorted(mine, key=lambda row: -row["gain"])
        shown = ranked if len(ranked) <= PLOTTED else [*ranked[: PLOTTED // 2], *ranked[-PLOTTED // 2 :]]
        task = group.rsplit(" · ", 1)[0]
        sets = {
            "rows": [row | {"place": place} for place, row in enumerate(shown)],
            "curves": _median_curves(
                names, [c for c in data["curves"] if (names[c[1]], names[c[2]]) == (group, metric)]
            ),
            "every": mine,
            "sizes": [
                r
                for r in rows
                if r["pixels"]
                and (r["group"].rsplit(" · ", 1)[0], r["metric"], r["protocol"]) == (task, metric, protocol)
            ],
        }
        what, wanted = PLOTS[protocol]
        for name, chart in charts(data["verdicts"]).items():
            if name not in wanted:
                continue
            title = f"{group}, {metric}{'' if name == 'curve' else f', {what}'}"
            spec = chart.properties(width=520, title=title).to_dict()
            spec["datasets"] = {**spec.get("datasets", {}), **sets}
            of = "" if protocol == "fixed" else f"-{protocol}"
            stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{name}-{group}-{metric}{of}")
            svg = vl_convert.vegalite_to_svg(spec)
            write_text(out / "plots" / f"{stem}.svg", svg)
            (out / "plots" / f"{stem}.png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
            written.append(out / "plots" / f"{stem}.png")
    return written


def _median_curves(names: Sequence[str], curves: Iterable[Sequence[Any]]) -> list[Record]:
    """Return the median curve over checkpoints for each kind of scores, with the band of the middle 80 %."""
    by_lam: dict[tuple[str, float], list[float]] = {}
    for _, _, _, scores, lam, gain, *_ in curves:
        by_lam.setdefault((names[scores], lam), []).append(gain)
    found = []
    for (scores, lam), gains in sorted(by_lam.items()):
        gains.sort()
        low, middle, high = (gains[round(share * (len(gains) - 1))] for share in (0.1, 0.5, 0.9))
        who = f"{scores}: median, 80 % of checkpoints"
        found.append({"who": who, "lam": lam, "gain": middle, "low": low, "high": high})
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


assert CONFIDENCE == 0.95  # the texts of the page say 95 %
