"""Correction for many checkpoints, and baselines against published figures."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.records.files import record_path, write_record
from benchmarks.reporting.documents import markdown
from benchmarks.reporting.expected import check, keep_expected, precision_notes
from benchmarks.reporting.summary import headline, read_folder, rows_of, versus, write_summary

PUBLISHED = """model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation
one,80.000,20.000,95.000,5.000,25.0,224,0.875,bicubic
two,75.000,25.000,93.000,7.000,25.0,288,1.000,bicubic
"""


def record(model: str, gain: float, p: float | None, **more: object) -> dict:
    key = {"model": model, "data": "d", "task": "single", "img_size": 224, "grid": None, "seed": 0, "weights": model}
    key |= {name: more.pop(name) for name in ("task", "img_size", "seed") if name in more}
    result = {"metric": "top1", "protocol": "fixed", "baseline": 80.0, "value": 80 + gain, "gain": gain, "p_value": p}
    result |= {"lam": "0.1", "temperature": "inf", "scores": "logits", "ci_low": None, "ci_high": None}
    curve = result | {"protocol": "curve", "p_value": None}
    preprocessing = {"crop_pct": 0.875, "interpolation": "bicubic"}
    about = {"status": "ok", "n": 50_000, "requested": ["1x"], "preprocessing": preprocessing, **more}
    return {**key, **about, "key": key, "results": [result, curve]}


def holm(p: list[float]) -> list[float]:
    """Holm (1979): the k-th smallest of m is multiplied by m - k + 1, and never smaller than the one before."""
    order = np.argsort(p)
    corrected, highest = np.empty(len(p)), 0.0
    for k, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - k) * p[index]))
        corrected[index] = highest
    return corrected.tolist()


def test_holm_over_the_checkpoints_of_one_request() -> None:
    values = [0.004, 0.03, 0.0001, 0.04, 0.013]
    gains = [1.0, 2.0, -3.0, 1.0, -1.0]
    records = [
        record(f"m{i}", gain, p, img_size=224 + i) for i, (gain, p) in enumerate(zip(gains, values, strict=True))
    ]
    alone = [record("m0", 1.0, 0.03, seed=1), record("m0", 1.0, 0.03, img_size=448, requested=["2x"])]
    alone.append(record("m0", 1.0, None, task="mosaic"))
    rows = rows_of([*records, *alone])
    assert len(rows) == 8  # the curve is no row
    assert [row["p_holm"] for row in rows[:5]] == pytest.approx(holm(values))
    assert [row["verdict"] for row in rows[:5]] == ["better", "no evidence", "worse", "no evidence", "worse"]
    assert [row.get("p_holm") for row in rows[5:]] == [0.03, 0.03, None]
    assert "verdict" not in rows[7]
    counts = headline(rows[:5])
    assert counts == {
        ("d (seed 0)", "single", "None", "1x", "top1", "fixed"): {"better": 1, "worse": 2, "no evidence": 2}
    }


def test_the_comparison_of_the_fixed_settings_is_a_family_of_its_own() -> None:
    records = [record(f"m{i}", gain, p) for i, (gain, p) in enumerate([(2.0, 0.001), (1.0, 0.03), (-1.0, 0.002)])]
    for one, (gain, p) in zip(records, [(1.0, 0.01), (-2.0, 0.001), (0.5, 0.6)], strict=True):
        fixed = one["results"][0]
        one["results"].append(fixed | {"protocol": "log_softmax_vs_logits", "gain": gain, "p_value": p})
    rows = rows_of(records)
    by = {name: [row for row in rows if row["protocol"] == name] for name in ("fixed", "log_softmax_vs_logits")}
    assert [row["p_holm"] for row in by["fixed"]] == pytest.approx(holm([0.001, 0.03, 0.002]))
    assert [row["p_holm"] for row in by["log_softmax_vs_logits"]] == pytest.approx(holm([0.01, 0.001, 0.6]))
    assert versus(headline(rows)) == [
        "d, single, 1x, top1: log_softmax better than logits on 1 checkpoints, worse on 1, no evidence on 1"
    ]


def test_baselines_against_published_ones(tmp_path: Path) -> None:
    (tmp_path / "published.csv").write_text(PUBLISHED)
    out = tmp_path / "out"
    keep_expected(str(tmp_path / "published.csv"), out)
    records = [
        record("one", 1.0, 1e-9),
        record("one", 1.0, 1e-9, seed=1, results=None) | {"results": []},
        record("two", 1.0, 1e-9),
        record("three", 1.0, 1e-9),
        record("one", 1.0, 1e-9, seed=2, n=500),
    ]
    records[1]["results"] = [records[0]["results"][0] | {"baseline": 79.8}]
    for one in records:
        write_record(record_path(out, one["key"]), one)
    rows = write_summary(out)[1].rows
    found = {(row["model"], row["seed"]): row["baseline_check"] for row in rows}
    assert found == {
        ("one", 0): "agrees",
        ("one", 1): "flagged",
        ("two", 0): "not compared: img_size 224, published for 288 (see --img-size test)",
        ("three", 0): "not compared: no published figure",
        ("one", 2): "not compared: 500 images of task single, not all 50000 of the validation set",
    }
    verdicts = sum(headline(rows).values(), start=type(next(iter(headline(rows).values())))())
    assert verdicts == {"better": 4, "flagged": 1}
    table = {"one": {"top1": "80.1", "img_size": "224", "crop_pct": "0.875", "interpolation": "bicubic"}}
    assert check(records[0], table) == "agrees"
    table["one"]["top1"] = "80.101"
    assert check(records[0], table) == "flagged"
    table["one"]["interpolation"] = "bilinear"
    assert check(records[0], table) == "not compared: interpolation bicubic, published for bilinear"


def measured(model: str, top1: float, baseline_check: str | None, **key: object) -> dict:
    """A record whose lam = 0 has this top-1."""
    found = record(model, 1.0, 1e-9) | {"baseline_check": baseline_check}
    found["results"] = [result | {"baseline": top1} for result in found["results"]]
    found["key"] = found["key"] | {"amp": "none", "settings": [top1]} | key
    return found


BF16 = {"amp": "bf16", "channels_last": True}
WITHIN = "Measured in bf16 and channels_last: top-1 at lam = 0 of {} checkpoints is within 0.1 points of the float32"


def test_whether_precision_moves_top1_is_said() -> None:
    lines = precision_notes(
        [
            measured("published", 80.05, "agrees", **BF16),
            measured("both", 79.85, "flagged", **BF16),  # for another reason
            measured("both", 79.80, "flagged"),
            measured("moved", 79.80, "flagged", **BF16),
            measured("moved", 80.00, "agrees"),
            measured("unknown", 79.80, "flagged", **BF16),
            measured("elsewhere", 79.80, "flagged", **BF16),
            measured("elsewhere", 80.00, "agrees", device="cpu"),
            measured("half", 70.00, "flagged", amp="fp16"),
            measured("float32", 70.00, "flagged"),
        ]
    )
    assert lines == [
        WITHIN.format(2) + " figure in this folder or, where there is none, of the published figure.",
        "Measured in bf16 and channels_last: top-1 at lam = 0 changes by more than 0.1 points: moved (79.80, in float32 "
        "80.00).",
        "Flagged, and measured in bf16 and channels_last: elsewhere, unknown. To see whether that is the reason, run these "
        "again with --amp none --no-channels-last and the same --out.",
        "Flagged, and measured in fp16: half. To see whether that is the reason, run these again with --amp none "
        "--no-channels-last and the same --out.",
    ]


def test_nothing_is_said_of_precision_in_float32_or_without_published_figures() -> None:
    assert precision_notes([measured("one", 70.0, "flagged"), measured("two", 80.0, "agrees")]) == []
    assert precision_notes([measured("one", 70.0, None, **BF16), measured("one", 80.0, None)]) == []
    assert precision_notes([measured("one", 70.0, "not compared: 500 images", **BF16)]) == []
    assert precision_notes([record("old", 1.0, 1e-9) | {"baseline_check": "flagged"}]) == []


def test_the_report_says_it_too(tmp_path: Path) -> None:
    keep_expected(str(_written(tmp_path / "published.csv", PUBLISHED)), tmp_path)
    one = measured("one", 79.0, None, **BF16)
    write_record(record_path(tmp_path, one["key"]), one)
    found = read_folder(tmp_path)
    assert "- Flagged, and measured in bf16 and channels_last: one. To see" in markdown(found.counted, found.rows)


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_refused_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--expected .*gone.csv: cannot be read"):
        keep_expected(str(tmp_path / "gone.csv"), tmp_path)
    (tmp_path / "other.csv").write_text("model,acc\na,1\n")
    with pytest.raises(
        ValueError, match="found no column top1, img_size, crop_pct, interpolation; expected timm's results"
    ):
        keep_expected(str(tmp_path / "other.csv"), tmp_path)
    assert not (tmp_path / "expected.csv").exists()


def test_what_old_records_do_not_say_is_not_compared() -> None:
    table = {"one": {"top1": "80.1", "img_size": "224", "crop_pct": "0.875", "interpolation": "bicubic"}}
    old = record("one", 1.0, 0.5)
    del old["preprocessing"]
    assert check(old, table) == "not compared: the record does not say crop_pct and interpolation"
    assert check(record("one", 1.0, 0.5) | {"results": []}, table) == "not compared: the record has no top1"
