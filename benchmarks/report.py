"""One self-contained page from the records of a sweep, with plots and tables to take along.

Writes to RUN_DIR/report: `index.html` (no network needed), each plot as PNG and SVG, `results.md`, and `results.csv`
with timm's column names. Gains are in percentage points over lam = 0, intervals 95 %, p-values corrected by Holm's
method over the checkpoints of the same data, task, requested size, metric and protocol.
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import altair as alt
import vl_convert
from rich.console import Console

from timm_csra.evaluation.statistics import AGREEMENT, CONFIDENCE, FIXED, VERSUS

from .records.files import Record, read_records, write_table, write_text
from .reporting.summary import OVER_PLAIN, VERDICTS, Row, headline, rows_of, versus
from .reporting.tables import LEGEND_OF_AGREEMENT, agreement_notes, left_out

PAGE = Path(__file__).with_name("report.html")
FIRST_METRIC = {"single": "top1", "real": "top1", "multilabel": "mAP", "mosaic": "mAP"}
FIELDS = (  # of a row of the page
    *("model", "group", "metric", "protocol", "img_size", "n", "baseline", "gain", "ci_low", "ci_high"),
    *("p_holm", "verdict", "scores", "lam", "kind", "macs"),
)
TIMM_COLUMNS = ("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation")
NOT_TESTED = "not tested"
NAMED = (("verdict", NOT_TESTED), ("scores", ""), ("lam", ""), ("kind", ""))  # and what stands for none
COLOURS = {"better": "#1c9b69", "worse": "#dd5a3c", "no evidence": "#878d96", NOT_TESTED: "#5b8fc9"}


def main(arguments: list[str] | None = None) -> int:
    """Write the report. Returns 0, or 2 where there is nothing to report."""
    args = _parser().parse_args(arguments)
    screen, log = Console(), Console(stderr=True)
    records = read_records(args.run_dir)
    if not records:
        log.print(
            f"benchmarks.report: no records in {args.run_dir / 'records'}; expected the --out folder of a sweep. Run "
            "python -m benchmarks.sweep --sample first.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return 2
    out = args.out or args.run_dir / "report"
    rows = [row for row in rows_of(records) if row.get("gain") is not None]
    data = page_data(records, rows)
    write_text(out / "index.html", page(data))
    write_text(out / "results.md", markdown(records, rows))
    columns = [name for name in RESULT_COLUMNS if _has_agreement(records) or AGREEMENT not in name]
    write_table(out / "results.csv", (*TIMM_COLUMNS, *columns), timm_rows(records))
    plots = [] if args.no_plots else write_plots(data, out)
    screen.print(f"{out / 'index.html'}: {len(records)} records", highlight=False, soft_wrap=True)
    screen.print(f"{len(plots)} plots, results.md and results.csv beside it", highlight=False, soft_wrap=True)
    return 0


def group_name(row: Record) -> str:
    """What belongs together: data, task with the grid of a mosaic, and the size in the words of the request."""
    grid = f" {row['grid']}x{row['grid']}" if row.get("grid") else ""
    return f"{row['data']} · {row['task']}{grid} · {row.get('requested', '1x')}"


def page_data(records: Sequence[Record], rows: Sequence[Row]) -> Record:
    """Everything the page shows, as plain JSON: tables in columns, names as numbers."""
    names: dict[str, int] = {}

    def number(text: Any) -> int:
        return names.setdefault(str(text), len(names))

    table = [
        [
            *(number(v) for v in (_short(row["model"]), group_name(row), row["metric"], row["protocol"])),
            *(number(row["img_size"]), row["n"]),
            *(_rounded(row.get(name)) for name in ("baseline", "gain", "ci_low", "ci_high")),
            None if row.get("p_holm") is None else float(f"{row['p_holm']:.2g}"),
            *(number(row.get(name) or nothing) for name, nothing in NAMED),
            row.get("macs"),
        ]
        for row in rows
    ]
    curves = [
        [
            *(number(_short(record["model"])), number(group_name(record)), number(result["metric"])),
            number(result["scores"]),
            *(float(result["lam"]), *(_rounded(result[name]) for name in ("gain", "ci_low", "ci_high"))),
        ]
        for record in records
        for result in record["results"]
        if result["protocol"] == "curve" and result["gain"] is not None
    ]
    return {
        "names": list(names),
        "fields": list(FIELDS),
        "rows": table,
        "curves": curves,
        "verdicts": [*VERDICTS, NOT_TESTED],
        "counted": [*VERDICTS, "flagged"],
        "headline": [
            [f"{data} · {task}{'' if grid == 'None' else f' {grid}x{grid}'} · {size}", metric, protocol, dict(counts)]
            for (data, task, grid, size, metric, protocol), counts in headline(rows).items()
            if protocol in (*OVER_PLAIN, VERSUS)
        ],
        "versus": VERSUS,
        "left_out": left_out(records),
        "first_metrics": FIRST_METRIC,
        "failures": _failures(records),
        "measured": [*_measured(records), *(["lam without labels", note] for note in agreement_notes(records))],
    }


def _failures(records: Iterable[Record]) -> list[Record]:
    """What has no result, the same reasons together."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record["status"] != "ok":
            where = f"{_short(record['model'])} on {group_name(record)}"
            found.setdefault((record["status"], str(record["reason"])), []).append(where)
    return [{"status": s, "reason": reason, "cells": cells} for (s, reason), cells in sorted(found.items())]


def _measured(records: Sequence[Record]) -> list[list[str]]:
    """With what: each value that occurs, and how often where there are several."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        environment = record["environment"]
        key = record["key"]
        said = {
            "device": environment["device"],
            "platform": environment["platform"],
            "python": environment["python"],
            "commit": environment.get("commit"),
            "autocast": key["amp"],
            "seed": key["seed"],
            "settings (lam, T, scores)": f"{len(key['settings'])}",
            **environment["packages"],
        }
        for name, value in said.items():
            counts.setdefault(name, Counter())[str(value)] += 1
    return [
        [name, next(iter(values)) if len(values) == 1 else ", ".join(f"{v} ({n} cells)" for v, n in values.items())]
        for name, values in counts.items()
    ]


def page(data: Record) -> str:
    """The page; the specifications of its plots are Altair's, filled with what is selected there."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    specs = {name: chart.to_dict() for name, chart in charts().items()}
    vega = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        vega=vega.replace("</script", "<\\/script"),
        specs=json.dumps(specs).replace("</", "<\\/"),
        data=text.replace("</", "<\\/"),
    )


def charts() -> dict[str, alt.LayerChart]:
    """The four plots, on named data that the page, or `write_plots`, supplies."""
    colour = alt.Color("verdict:N", scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())), title=None)
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


PLOTTED = 40  # checkpoints in the forest plot of a file
PLOTS = {  # what each protocol is called in them, and which are drawn: the curve has both kinds of scores
    "fixed": ("logits, lam 0.1", ("forest", "curve", "baseline", "size")),
    "fixed_log_softmax": ("log_softmax, lam 0.3", ("forest", "baseline", "size")),
    VERSUS: ("log_softmax, lam 0.3, over logits, lam 0.1", ("forest",)),
    AGREEMENT: ("log_softmax, lam chosen without labels", ("forest", "baseline", "size")),
}


def write_plots(data: Record, out: Path) -> list[Path]:
    """PNG and SVG of each plot, for the first metric of each task and what is without any choice on the data."""
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
        for name, chart in charts().items():
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
    """Of all checkpoints, for each kind of scores, with the band that holds 80 % of them."""
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


GAINS = {  # columns of protocols without any choice on the data
    name: (protocol, of)
    for protocol in (*FIXED, VERSUS, AGREEMENT)
    for name, of in ((f"gain_{protocol}", "gain"), (f"{protocol}_low", "ci_low"), (f"{protocol}_high", "ci_high"))
}
RESULT_COLUMNS = ("data", "task", "metric", "baseline", *GAINS, "agreement_lam", "gain_crossfit")


def timm_rows(records: Iterable[Record]) -> list[Row]:
    """One row for each cell and metric, with the columns of timm's results files where they apply."""
    rows = []
    for record in records:
        by_metric: dict[str, dict[str, Record]] = {}
        for result in record["results"]:
            by_metric.setdefault(result["metric"], {})[result["protocol"]] = result
        tops = {m: found["fixed"]["baseline"] for m, found in by_metric.items() if m in ("top1", "top5")}
        errors = {f"{m}_err": 100 - value for m, value in tops.items() if value is not None}
        preprocessing = record.get("preprocessing") or {}
        for metric, found in by_metric.items():
            rows.append(
                {
                    "model": _short(record["model"]),
                    "img_size": record["img_size"],
                    **tops,
                    **errors,
                    "param_count": record.get("param_count"),
                    "crop_pct": preprocessing.get("crop_pct"),
                    "interpolation": preprocessing.get("interpolation"),
                    "data": record["data"],
                    "task": group_name(record).split(" · ")[1],
                    "metric": metric,
                    "baseline": found["fixed"]["baseline"],
                    **{name: found.get(protocol, {}).get(of) for name, (protocol, of) in GAINS.items()},
                    "agreement_lam": found.get(AGREEMENT, {}).get("lam"),
                    "gain_crossfit": found.get("crossfit", {}).get("gain"),
                }
            )
    return rows


def markdown(records: Sequence[Record], rows: Sequence[Row]) -> str:
    """Verdicts, then a line for each checkpoint and metric; losses and failures too."""
    protocols = (*FIXED, VERSUS, *([AGREEMENT] if _has_agreement(records) else []), "crossfit")
    lines = [
        "# Results",
        "",
        "| data, task, size | metric | protocol | better | worse | no evidence |",
        "|---|---|---|--:|--:|--:|",
    ]
    counted = headline(rows)
    for (data, task, grid, size, metric, protocol), counts in counted.items():
        if protocol in OVER_PLAIN:
            named = task if grid == "None" else f"{task} {grid}x{grid}"
            numbers = " | ".join(str(counts.get(verdict, 0)) for verdict in VERDICTS)
            lines.append(f"| {data}, {named}, {size} | {metric} | {protocol} | {numbers} |")
    lines += ["", *(f"- {line}" for line in versus(counted))]
    lines += [
        "",
        "`fixed`: logits, lam 0.1. `fixed_log_softmax`: lam 0.3. Both with T inf.",
        *([LEGEND_OF_AGREEMENT] if AGREEMENT in protocols else []),
        "",
        f"| model | data, task, size | px | metric | n | lam = 0 | {' | '.join(protocols)} |",
        f"|---|---|--:|---|--:|--:|{'--:|' * len(protocols)}",
    ]
    for record in records:
        found: dict[str, dict[str, Record]] = {}
        for result in record["results"]:
            found.setdefault(result["metric"], {})[result["protocol"]] = result
        for metric, by in found.items():
            cells = [_short(record["model"]), group_name(record), record["img_size"], metric, record["n"]]
            cells += [_percent(by["fixed"]["baseline"])]
            cells += [_interval(by.get(protocol)) for protocol in protocols]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *(f"- {line}" for line in (*agreement_notes(records), *left_out(records)))]
    if failures := _failures(records):
        lines += ["", "Without a result:", ""]
        lines += [f"- {len(f['cells'])} cells, {f['status']}: {f['reason']}" for f in failures]
    return "\n".join([*lines, ""])


def _has_agreement(records: Iterable[Record]) -> bool:
    return any(result["protocol"] == AGREEMENT for record in records for result in record["results"])


def _interval(result: Record | None) -> str:
    if result is None or result["gain"] is None:
        return "-"
    interval = "" if result["ci_low"] is None else f" [{result['ci_low']:+.2f}, {result['ci_high']:+.2f}]"
    chosen = f", lam {result['lam']}" if result["protocol"] == AGREEMENT else ""
    return f"{result['gain']:+.2f}{interval}{chosen}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith("local-dir:") else model.removeprefix("pypi:")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        epilog="example:\n  python -m benchmarks.sweep --sample && python -m benchmarks.report results/sample",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the --out folder of a sweep")
    parser.add_argument("--out", type=Path, help="folder (default: RUN_DIR/report)")
    parser.add_argument("--no-plots", action="store_true", help="the page and the tables alone")
    return parser


assert CONFIDENCE == 0.95  # what the texts say

if __name__ == "__main__":
    sys.exit(main())
