"""Pooled gains: their intervals against simulation, and which checkpoints are pooled."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.records.resampled import packed, unpacked
from benchmarks.reporting.pooled import ALL, intervals, pooled, unpooled
from benchmarks.reporting.summary import rows_of


def bootstrapped(gains: np.ndarray, rng: np.random.Generator, resamples: int = 200) -> np.ndarray:
    """The mean gain `(M, B)` in resamples of images, of gains of each image `(M, n)`."""
    images = rng.integers(0, gains.shape[1], (resamples, gains.shape[1]))
    return gains[:, images].mean(axis=2)


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_intervals_hold_what_they_should(shared: float) -> None:
    """Over images: the mean gain of the same checkpoints, whether an image helps or harms all of them alike or not.
    Over both: the mean gain of the population that checkpoints are drawn from."""
    rng, runs, checkpoints, images = np.random.default_rng(0), 400, 10, 150
    narrow = wide = 0
    for _ in range(runs):
        true = rng.normal(0.3, 0.2, checkpoints)
        common = shared**0.5 * rng.standard_normal(images)
        each = (1 - shared) ** 0.5 * rng.standard_normal((checkpoints, images))
        of_images = true[:, None] + 2 * (common + each)
        first, second = intervals(of_images.mean(axis=1), bootstrapped(of_images, rng))
        assert second is not None
        narrow += first[0] <= true.mean() <= first[1]
        wide += second[0] <= 0.3 <= second[1]
        assert second[0] < first[0] < first[1] < second[1]
    assert stats.binomtest(narrow, runs, 0.95).pvalue > 0.001
    assert stats.binomtest(wide, runs, 0.95, alternative="less").pvalue > 0.001
    assert wide < runs  # it is wide, not endless


def test_it_is_the_interval_of_the_mean_gain_of_each_image() -> None:
    rng = np.random.default_rng(1)
    of_images = rng.standard_normal((3, 400)) + 0.1
    (low, high), both = intervals(of_images.mean(axis=1), bootstrapped(of_images, rng, 20_000))
    mean = of_images.mean(axis=0)
    reach = 1.959964 * mean.std() / 20
    assert (low, high) == pytest.approx((mean.mean() - reach, mean.mean() + reach), abs=0.003)
    assert both is None  # of three checkpoints nothing is said about others


def record(model: str, gain: float, seed: int, **more: object) -> dict:
    key = {"model": model, "data": "d", "task": "single", "img_size": 64, "grid": None, "weights": model}
    noise = np.random.default_rng(seed).normal(0, 0.4, 200)
    result = {"metric": "top1", "protocol": "fixed", "baseline": 80.0, "value": 80 + gain, "gain": gain, "p_value": 0.3}
    result |= {"lam": "0.1", "temperature": "inf", "scores": "logits", "ci_low": -1.0, "ci_high": 2.0, "n": 100}
    result |= {"resampled": packed(gain + noise)}
    about = {"status": "ok", "n": 100, "requested": ["1x"], "kind": "exact", "head_classes": 1000, "finished": "1"}
    return {**key, **about, **more, "key": key, "results": [result, result | {"protocol": "curve"}]}


def test_many_small_gains_are_evidence_together() -> None:
    records = [record(f"m{number}", 0.4, number) for number in range(8)]
    rows = rows_of(records)
    assert {row["verdict"] for row in rows} == {"no evidence"}
    (found,) = pooled(rows)
    assert found.models == tuple(f"m{number}" for number in range(8))
    assert found.gain == pytest.approx(0.4)
    assert found.over_images[0] > 0
    assert found.over_both is not None
    assert found.over_both[0] > 0
    row = found.as_row()
    assert (row["kind"], row["checkpoints"], row["head_classes"], row["smallest"]) == ("exact", 8, 1000, 0.4)


def test_only_what_is_comparable_is_pooled() -> None:
    records = [
        record("a", 1.0, 0),
        record("b", 2.0, 1),
        record("token", -3.0, 2, kind="token"),
        record("ten", 9.0, 3, head_classes=10),
        record("ten too", 9.0, 4, head_classes=10),
        record("flagged", 9.0, 5),
    ]
    records[0]["results"][0]["resampled"] = packed(np.full(200, 1.0))
    replaced = record("a", 50.0, 6)
    replaced["key"] = replaced["key"] | {"weights": "old"}
    replaced["finished"] = "0"
    rows = rows_of([*records, replaced])
    for row in rows:
        row["baseline_check"] = "flagged" if row["model"] == "flagged" else None
    found = {(p.kind, p.row["head_classes"]): p for p in pooled(rows)}
    assert {name: p.models for name, p in found.items()} == {
        ("exact", 1000): ("a", "b"),
        (ALL, 1000): ("a", "b", "token"),
        ("exact", 10): ("ten", "ten too"),
    }
    assert found["exact", 1000].gain == pytest.approx(1.5)
    assert found[ALL, 1000].gain == pytest.approx(0)


def test_what_is_packed() -> None:
    gains = np.random.default_rng(0).normal(0, 3, 200)
    assert unpacked(packed(gains)) == pytest.approx(gains, rel=1e-3)
    with pytest.raises(ValueError, match="base64"):
        unpacked("no gains!")


def test_what_failed_is_not_pooled() -> None:
    rows = rows_of([record("a", 1.0, 0), record("b", 1.0, 1), record("c", 9.0, 2, status="failed")])
    assert [p.models for p in pooled(rows)] == [("a", "b")]
    assert [row.get("verdict") for row in rows if row["model"] == "c"] == [None]


def test_what_cannot_be_pooled_with_the_others_is_said() -> None:
    records = [record(name, 1.0, number) for number, name in enumerate("abcdef")]
    records[2]["results"][0]["n"] = 99
    records[3]["results"][0].pop("resampled")
    records[4]["results"][0]["resampled"] = packed(np.ones(100))
    records[5].pop("head_classes")
    rows = rows_of(records)
    assert [p.models for p in pooled(rows)] == [("a", "b")]
    assert unpooled(rows) == [
        "d \u00b7 single \u00b7 1x: not pooled: c with 99 images for top1, where others have 100.",
        "d \u00b7 single \u00b7 1x: not pooled: d, e, f, whose records lack head_classes, kind or as many resampled gains as "
        "others: measure them again.",
    ]
    many = [record(f"m{number}", 1.0, number) for number in range(60)]
    for each in many:
        each.pop("head_classes")
    assert unpooled(rows_of(many)) == [
        "d \u00b7 single \u00b7 1x: not pooled: m0, m1, m10 and 57 more, whose records lack head_classes, kind or as many "
        "resampled gains as others: measure them again.",
    ]
