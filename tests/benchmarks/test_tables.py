"""What a sweep prints: nothing is lost, on a narrow terminal either."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.reporting.overview import print_overview, too_many
from benchmarks.reporting.summary import headline, rows_of
from benchmarks.reporting.tables import print_headline, print_records

RESULT = {
    "metric": "mAP",
    "n": 125,
    "scores": "logits",
    "lam": "0.1",
    "temperature": "inf",
    "baseline": 50.0,
    "value": 51.25,
    "gain": 1.25,
}
RECORDS = [
    {
        "model": "local-dir:/some/where/mine",
        "data": "photos",
        "task": "mosaic",
        "img_size": 224,
        "status": "ok",
        "n": 125,
        "results": [
            RESULT | {"protocol": "fixed", "ci_low": 0.5, "ci_high": 2.0},
            RESULT | {"protocol": "fixed_log_softmax", "gain": 2.75, "ci_low": 1.5, "ci_high": 4.0},
            RESULT | {"protocol": "log_softmax_vs_logits", "gain": 1.5, "ci_low": 0.25, "ci_high": 2.5},
            RESULT
            | {"protocol": "crossfit", "gain": -3.5, "ci_low": -4.0, "ci_high": -3.0, "lam": "0.2;1"}
            | {"scores": "log_softmax;log_softmax", "temperature": "5;5"},
            RESULT | {"protocol": "best", "gain": None, "ci_low": None, "ci_high": None},
            RESULT
            | {"protocol": "max_pool", "gain": 7.75, "ci_low": 6.5, "ci_high": 9.0, "lam": "", "temperature": ""},
            RESULT | {"protocol": "curve", "gain": 99.0, "ci_low": 98.0, "ci_high": 100.0},
        ],
    },
    {
        "model": "resnet50.a1_in1k",
        "data": "photos",
        "task": "single",
        "img_size": "224x320",
        "status": "failed",
        "reason": "OSError: [Errno 28] no space",
        "results": [],
    },
]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_every_number_is_printed(width: int) -> None:
    out = io.StringIO()
    print_records(RECORDS, Console(file=out, width=width))
    text = " ".join(out.getvalue().split())
    wide = ("+2.75", "[+1.50,", "0.2;1", "log_softmax lam 0.2;1", "+1.50", "max_pool", "+7.75")
    elsewhere = "summary.csv has the settings of crossfit, and the other protocols: log_softmax_vs_logits, max_pool."
    for expected in (
        "mine",
        "mosaic",
        "224",
        "mAP",
        "125",
        "50.00",
        "+1.25",
        "[+0.50,",
        "+2.00]",
        "-3.50",
        "+2.75",
        *(wide if width == 200 else [elsewhere]),
    ):
        assert expected in text, expected
    assert "+99.00" not in text
    assert "…" not in out.getvalue()
    assert "failed: resnet50.a1_in1k on photos, single, 224x320 px: OSError: [Errno 28] no space" in text
    assert "fixed: logits, lam 0.1, T inf, as in the paper. fixed_log_softmax: lam 0.3, T inf." in text
    assert "over the n images that count for the metric" in text
    assert ("Other columns: the plain model with another pooling." in text) == (width == 200)
    assert "best:" not in text  # which these records lack


def test_the_legend_explains_what_the_table_has() -> None:
    ok = RECORDS[0]
    results = [
        {**result, "ci_low": None, "ci_high": None, "protocol": protocol}
        for result, protocol in zip(ok["results"], ("fixed", "best"), strict=False)  # type: ignore[arg-type]
    ]
    out = io.StringIO()
    print_records([{**ok, "results": results}], Console(file=out, width=200))
    text = " ".join(out.getvalue().split())
    assert "gains over lam=0 in points of the n images" in text and "bootstrap" not in text
    assert "best: settings chosen on the test images themselves, optimistic." in text and "crossfit" not in text


def test_a_metric_takes_one_line_of_120_columns() -> None:
    metrics = ("mAP", "lrap", "r_precision", "CF1_top3", "OF1_top3")
    results = [
        {
            **result,
            "metric": metric,
            "n": 44 if metric == "lrap" else 5000,
            "baseline": 41.25,
            "gain": -12.34,
            "ci_low": -15.0,
            "ci_high": -9.87,
        }
        for metric in metrics
        for result in RECORDS[0]["results"]  # type: ignore[attr-defined]
        if result["protocol"] != "best"
    ]
    long = "vit_base_patch16_clip_224.openai_ft_in12k_in1k"
    records = [RECORDS[0] | {"model": f"{long}{i}", "grid": 2, "results": results} for i in range(3)]
    out = io.StringIO()
    print_records(records, Console(file=out, width=120))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 120
    assert lines[:3] == [
        f"{long}0, photos, mosaic 2x2, 224 px",
        "  metric          n  lam=0                   fixed       fixed_log_softmax                crossfit",
        "  mAP          5000  41.25  -12.34 [-15.00, -9.87]  -12.34 [-15.00, -9.87]  -12.34 [-15.00, -9.87]",
    ]
    assert len([line for line in lines if line.startswith("  ")]) == 1 + 3 * len(metrics)  # and one line of names
    assert [line.split()[:2] for line in lines if line.startswith("  lrap")] == [["lrap", "44"]] * 3
    # Losses are as visible as gains, and nothing is cut.
    assert out.getvalue().count("-12.34 [-15.00, -9.87]") == 3 * 3 * len(metrics)


def of_the_sample(model: str, metric: str) -> dict:
    best = RESULT | {"metric": metric, "n": 35, "protocol": "best", "gain": 12.34, "ci_low": None, "ci_high": None}
    best |= {"scores": "log_softmax", "lam": "0.05"}
    protocols = ("fixed", "fixed_log_softmax", "log_softmax_vs_logits", "max_pool", "test_time_pool")
    others = [best | {"protocol": name, "gain": -12.34} for name in protocols]
    about = {"data": "sample", "task": "mosaic", "grid": 2, "img_size": 224, "status": "ok", "n": 35}
    return about | {"model": model, "results": [best, *others]}


def test_the_sample_fits_into_120_columns() -> None:
    records = [of_the_sample(f"pypi:tf_efficientnet_lite{i}", "r_precision") for i in range(3)]
    out = io.StringIO()
    print_records(records, Console(file=out, width=120))
    title, *lines = out.getvalue().splitlines()
    assert title.strip() == "sample, mosaic 2x2, n = 35"  # what all have in common is said once
    header = next(i for i, line in enumerate(lines) if line.startswith("model"))
    assert "crossfit" not in " ".join(lines[: header + 1])  # nobody has one
    rows = [line for line in lines if line.startswith("tf_efficientnet_lite")]
    assert len(rows) == 3 and all(line.count("-12.34") == 5 for line in rows)
    assert sum("log_softmax lam 0.05 T inf" in line for line in lines) == 3
    assert max(map(len, lines[: header + 7])) <= 120


def many(count: int) -> list[dict]:
    """Checkpoints whose gains go from minus to plus, each over three metrics; one in three has no result."""
    records = []
    for i in range(count):
        key = {"model": f"checkpoint{i:04d}.tag", "task": "mosaic", "data": "photos"}
        about = {**key, "key": key, "grid": 2, "img_size": 224, "requested": "1x", "n": 125, "baseline_check": None}
        if i % 3 == 2:
            told = {"status": "not_applicable", "reason": f"{1 + i % 2} classes are unknown"}
            records.append(about | told | {"results": []})
            continue
        gain = (i - count / 2) / 10
        results = [
            RESULT
            | {
                "metric": metric,
                "protocol": protocol,
                "gain": share * gain,
                "ci_low": share * gain - 1,
                "ci_high": share * gain + 1,
                "p_value": 0.04 if abs(gain) < 2 else 1e-9,
            }
            for metric, scale in (("mAP", 1), ("lrap", 3), ("r_precision", 3))
            for protocol, share in (
                ("fixed", scale),
                ("fixed_log_softmax", 2 * scale),
                ("crossfit", scale),
                ("best", 9),
                ("max_pool", 9),
            )
        ]
        records.append(about | {"status": "ok", "reason": None, "results": results})
    return records


def test_of_many_cells_the_largest_gains_and_losses_are_printed(tmp_path: Path) -> None:
    records = many(1800)
    flagged = records[1798]  # would gain most
    flagged["baseline_check"] = "flagged"
    assert too_many(records)
    rows = rows_of(records)
    out = io.StringIO()
    console = Console(file=out, width=120)
    print_headline(headline(rows), console)
    print_overview(records, rows, tmp_path, console)
    lines = out.getvalue().splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 120 + len(str(tmp_path))
    shown = [line.split() for line in lines if line.startswith("checkpoint")]
    assert len(shown) == 20
    finished = [i for i in range(1800) if i % 3 != 2 and i != 1798]
    expected = [*finished[:-11:-1], *finished[:10]]
    assert [words[0] for words in shown] == [f"checkpoint{i:04d}.tag" for i in expected]
    for words, i in zip(shown, expected, strict=True):
        gain = 2 * (i - 900) / 10  # of the protocol in which it changes most, by the first metric
        interval = [f"{gain:+.2f}", f"[{gain - 1:+.2f},", f"{gain + 1:+.2f}]"]
        assert words[1:] == ["photos", "mosaic", "2x2", "224", "mAP", "125", "50.00", "fixed_log_softmax", *interval]
    text = " ".join(out.getvalue().split())
    assert text.index("flagged") < text.index("Largest gains") < text.index("Largest losses")
    assert "Flagged, and left out here: checkpoint1798.tag." in text
    assert "300 cells not_applicable: 1 classes are unknown" in text
    assert "1200 of 1800 cells have a result." in text
    assert "summary.csv; for a page with plots and tables: python -m benchmarks.report" in text


def test_few_cells_are_all_printed_and_no_gain_is_said(tmp_path: Path) -> None:
    assert not too_many(many(20))
    assert too_many(many(30))
    assert too_many([record for record in many(160) if record["status"] != "ok"])  # a line each, too
    losses = [record for record in many(60) if not record["results"] or record["results"][0]["gain"] < 0]
    out = io.StringIO()
    print_overview(losses, rows_of(losses), tmp_path, Console(file=out, width=120))
    assert "Largest gains: none." in out.getvalue()
    assert sum(line.startswith("checkpoint") for line in out.getvalue().splitlines()) == 10


def test_verdicts_of_many_groups_are_by_the_first_metric() -> None:
    counts = {("d", "mosaic", str(grid), "1x", metric, "fixed"): {"better": grid} for grid in range(2, 22) for metric in ("mAP", "lrap", "r_precision")}  # fmt: skip
    out = io.StringIO()
    print_headline(counts, Console(file=out, width=120))
    assert out.getvalue().count("mAP") == 20
    assert "r_precision" not in out.getvalue()
    assert "The verdicts of 40 more groups, by other metrics, are in the report." in out.getvalue()
