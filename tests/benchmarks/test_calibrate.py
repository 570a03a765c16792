"""The simulation of intervals: its population, and one small condition of it."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.calibrate import SETTINGS, Condition, Outcome, drawn, gains, main, summed
from timm_csra.evaluation.scoring import DEFAULT, PLAIN


def test_under_the_null_all_settings_rank_alike_and_differently() -> None:
    targets, logits = drawn(Condition("top1", "null", 20_000), 20_000, np.random.default_rng(1))
    hits = {setting: (of.argmax(1) == targets).double().mean().item() for setting, of in logits.items()}
    assert set(logits) == set(SETTINGS)
    error = np.sqrt(hits[PLAIN] * (1 - hits[PLAIN]) / 20_000)
    assert all(abs(hit - hits[PLAIN]) < 4 * error for hit in hits.values())
    largest = max(SETTINGS, key=lambda setting: setting.lam)
    assert (logits[largest].argmax(1) == logits[PLAIN].argmax(1)).double().mean() < 0.8


def test_the_gain_of_an_effect_is_that_of_other_images() -> None:
    expected = gains("top1", "effect")
    targets, logits = drawn(Condition("top1", "effect", 50_000), 50_000, np.random.default_rng(2))
    right = {setting: (of.argmax(1) == targets).double().numpy() for setting, of in logits.items()}
    for setting in SETTINGS:
        difference = 100 * (right[setting] - right[PLAIN])
        assert difference.mean() == pytest.approx(expected[setting], abs=5 * stats.sem(difference) + 1e-9)
    assert expected[DEFAULT] > 0.2
    assert set(gains("top1", "null").values()) == {0.0}


def test_what_is_counted() -> None:
    outcomes = [
        [Outcome("fixed", 1.0, (0.5, 2.0), "better")],
        [Outcome("fixed", 1.0, (-2.0, -1.0), "worse")],
        [Outcome("fixed", 1.0, None, "no evidence")],
        [Outcome("fixed", 1.0, (-1.0, 1.0), "no evidence")],
    ]
    (row,) = summed(Condition("mAP", "effect", 100), outcomes)
    assert (row["runs"], row["intervals"], row["covered"], row["coverage"]) == (4, 3, 2, 66.67)
    assert (row["better"], row["worse"], row["median_width"]) == (25.0, 25.0, 1.5)


def test_a_small_condition(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No protocol is far from what it says: 95 % of intervals hold the truth, and 5 % of the verdicts are false."""
    out = tmp_path / "calibration.csv"
    arguments = ["--runs", "60", "--images", "80", "--metrics", "top1", "--truth", "null", "--jobs", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["protocol"] for row in rows] == ["fixed", "agreement", "crossfit", "tune"]
    printed = capsys.readouterr().out
    monkeypatch.setattr("benchmarks.calibrate.summed", None)  # what is there is not simulated again
    assert main([*arguments, "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed
    assert main([*arguments, "--runs", "50", "--out", str(out)]) == 2
    told = f"--out {out}: found other columns, or conditions of another number of runs than 50; name another file."
    assert told in " ".join(capsys.readouterr().err.split())
    for row in rows:
        assert row["protocol"] in printed
        assert int(row["intervals"]) == 60
        assert stats.binomtest(int(row["covered"]), 60, 0.95, alternative="less").pvalue > 0.001
        assert float(row["better"]) + float(row["worse"]) < 17  # 10 of 60: the chance of that is 1 in 1,000 at 5 %
