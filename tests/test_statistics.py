"""Protocols and intervals, against direct computation."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from scipy import stats

from timm_csra.evaluation.metrics import evaluate
from timm_csra.evaluation.samples import Evaluation, PerImage, Rows, weighted
from timm_csra.evaluation.scoring import DEFAULT, DEFAULT_LOG_SOFTMAX, PLAIN, Setting
from timm_csra.evaluation.statistics import Comparison, Table, best, crossfit, halves, without_choice

HIGH = Setting(0.5, (1.0,))


def grid(seed: int = 0, count: int = 400, gain: float = 10.0) -> dict[Setting, PerImage]:
    rng = np.random.default_rng(seed)
    plain = 100.0 * (rng.random(count) < 0.6)
    return {PLAIN: PerImage(plain)} | {
        setting: PerImage(plain + rng.normal(share * gain, 20, count)) for setting, share in ((DEFAULT, 0.5), (HIGH, 1))
    }


def on_all(metric: str, settings: Mapping[Setting, Evaluation], count: int) -> Table:
    return Table.of(metric, settings, [np.arange(count)])


def fixed(metric: str, settings: Mapping[Setting, Evaluation], count: int, seed: int | None) -> Comparison:
    return without_choice(on_all(metric, settings, count), seed)[0]


def crossfitted(metric: str, settings: Mapping[Setting, Evaluation], split: Sequence[Rows], seed: int) -> Comparison:
    return crossfit(Table.of(metric, settings, split), seed)


def test_every_comparison_says_how_many_images_count() -> None:
    labels = torch.rand(40, 6, generator=torch.Generator().manual_seed(1)) < 0.2
    counted = int(labels.any(1).sum())
    assert 2 < counted < 40
    found = [evaluate(torch.randn(40, 6, generator=torch.Generator().manual_seed(i)), labels) for i in range(3)]
    settings = (PLAIN, DEFAULT, DEFAULT_LOG_SOFTMAX)
    for metric, n in (("lrap", counted), ("mAP", 40)):
        of = {setting: one[metric] for setting, one in zip(settings, found, strict=True)}
        whole = on_all(metric, of, 40)
        comparisons = [*without_choice(whole, 0), best(whole), crossfitted(metric, of, halves(40, 0), 0)]
        assert {one.protocol for one in comparisons} >= {"fixed", "log_softmax_vs_logits", "curve", "crossfit", "best"}
        assert {one.n for one in comparisons} == {n}


def test_halves_are_stratified_disjoint_and_seeded() -> None:
    classes = np.repeat(np.arange(7), [10, 4, 1, 7, 20, 3, 6])
    first, second = halves(classes, seed=3)
    assert sorted([*first, *second]) == list(range(len(classes)))
    assert abs(len(first) - len(second)) <= 1
    counts = np.bincount(classes[first], minlength=7) - np.bincount(classes[second], minlength=7)
    assert abs(counts).max() <= 1
    assert all(np.array_equal(a, b) for a, b in zip(halves(classes, 3), (first, second), strict=True))
    assert not np.array_equal(halves(classes, 4)[0], first)
    assert sorted(np.concatenate(halves(9, 0))) == list(range(9))


def test_fixed_interval_is_paired() -> None:
    settings = grid()
    comparison = fixed("top1", settings, 400, seed=0)
    difference = settings[DEFAULT].values - settings[PLAIN].values
    assert comparison.settings == (DEFAULT,)
    assert comparison.gain == pytest.approx(difference.mean())
    assert comparison.value - comparison.baseline == pytest.approx(comparison.gain)
    low, high = stats.t.interval(0.95, 399, difference.mean(), stats.sem(difference))
    # An unpaired interval would be four times as wide: the spread of the plain metric is 49 points.
    assert comparison.interval == pytest.approx((low, high), abs=0.35)
    assert fixed("top1", settings, 400, seed=0) == comparison
    assert fixed("top1", settings, 400, seed=1).interval != comparison.interval
    assert fixed("top1", settings, 400, seed=None).interval is None


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        interval = fixed("top1", grid(seed, count=100), 100, seed).interval
        assert interval is not None
        covered += interval[0] <= 5.0 <= interval[1]
    assert stats.binomtest(covered, 200, 0.95).pvalue > 0.001


def test_crossfit_measures_each_choice_on_the_other_half() -> None:
    first, second = np.arange(0, 10), np.arange(10, 20)
    plain = np.zeros(20)
    good_on_first = np.where(np.arange(20) < 10, 8.0, -6.0)
    good_on_second = np.where(np.arange(20) < 10, -2.0, 4.0)
    settings = {PLAIN: PerImage(plain), DEFAULT: PerImage(good_on_first), HIGH: PerImage(good_on_second)}
    comparison = crossfitted("top1", settings, (first, second), seed=0)
    assert comparison.settings == (HIGH, DEFAULT)  # chosen on the second half for the first, and the reverse
    assert comparison.gain == pytest.approx((-2.0 - 6.0) / 2)
    assert comparison.interval == pytest.approx((-4.0, -4.0))
    assert best(on_all("top1", settings, 20)).settings == (DEFAULT,)
    assert best(on_all("top1", settings, 20)).gain == pytest.approx(1.0)
    assert best(on_all("top1", settings, 20)).interval is None


def test_a_clear_choice_adds_nothing_to_the_interval() -> None:
    """Where every resample chooses the same, the interval is that of the setting, within parts."""
    settings = grid(count=400)
    split = halves(400, seed=0)
    comparison = crossfitted("top1", settings, split, seed=0)
    assert comparison.settings == (HIGH, HIGH)
    parts = [
        settings[setting].values[rows] - settings[PLAIN].values[rows]
        for setting, rows in zip(comparison.settings, split, strict=True)
    ]
    error = np.sqrt(sum(stats.sem(part) ** 2 for part in parts)) / 2
    mean = np.mean([part.mean() for part in parts])
    assert comparison.interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.4)


def test_among_equals_the_smallest_lam_is_chosen() -> None:
    same = PerImage(np.ones(8))
    assert best(on_all("top1", {HIGH: same, DEFAULT: same, PLAIN: same}, 8)).settings == (PLAIN,)
    undefined = PerImage(np.full(8, np.nan))
    comparison = crossfitted("mAP", dict.fromkeys((PLAIN, DEFAULT), undefined), halves(8, 0), seed=0)
    assert comparison.settings == (PLAIN, PLAIN)
    assert comparison.interval is None


def test_the_curve_holds_fixed_and_shares_its_resamples() -> None:
    settings = grid() | {Setting(0.3, DEFAULT.temperature): grid()[HIGH]}
    one, *points = without_choice(on_all("lrap", settings, 400), seed=0)
    assert [point.settings[0].lam for point in points] == [0.1, 0.3]  # HIGH has another temperature
    assert (points[0].gain, points[0].interval) == (one.gain, one.interval)
    assert points[0].p_value is None
    assert one.p_value is not None
    assert points[1].interval is not None
    assert points[1].interval[0] < points[1].gain < points[1].interval[1]
    assert all(point.interval is None for point in without_choice(on_all("lrap", settings, 400), seed=None))


def both(seed: int = 0, count: int = 400) -> dict[Setting, PerImage]:
    """A grid of logits, and one of log-probabilities that gains less."""
    other = grid(seed + 1, count)
    return grid(seed, count) | {
        DEFAULT_LOG_SOFTMAX: PerImage(
            grid(seed, count)[PLAIN].values + other[DEFAULT].values - other[PLAIN].values - 3
        ),
        Setting(2.0, (1.0,), "log_softmax"): grid(seed, count)[HIGH],
    }


def test_both_fixed_settings_and_the_one_over_the_other() -> None:
    settings = both()
    table = on_all("lrap", settings, 400)
    fixed_, log_softmax, between, *curve = without_choice(table, seed=0)
    protocols = [comparison.protocol for comparison in (fixed_, log_softmax, between)]
    assert protocols == ["fixed", "fixed_log_softmax", "log_softmax_vs_logits"]
    assert (fixed_.settings, log_softmax.settings) == ((DEFAULT,), (DEFAULT_LOG_SOFTMAX,))
    assert log_softmax.baseline == fixed_.baseline
    assert (between.baseline, between.value) == (fixed_.value, log_softmax.value)
    difference = settings[DEFAULT_LOG_SOFTMAX].values - settings[DEFAULT].values
    assert between.gain == pytest.approx(difference.mean())
    assert between.gain == pytest.approx(log_softmax.gain - fixed_.gain)
    assert between.interval == pytest.approx(
        stats.t.interval(0.95, 399, difference.mean(), stats.sem(difference)), abs=0.35
    )
    assert between.test == "paired t"
    reference = stats.ttest_rel(settings[DEFAULT_LOG_SOFTMAX].values, settings[DEFAULT].values)
    assert between.p_value == pytest.approx(reference.pvalue)
    assert [point.settings for point in curve] == [(DEFAULT,), (DEFAULT_LOG_SOFTMAX,)]  # T = 1 is on no curve
    assert without_choice(table, seed=None)[2].interval is None


def test_hits_of_the_fixed_settings_are_compared_by_mcnemars_test() -> None:
    rng = np.random.default_rng(0)
    hits = {setting: rng.random(300) < share for setting, share in
            ((PLAIN, 0.5), (DEFAULT, 0.55), (DEFAULT_LOG_SOFTMAX, 0.7))}  # fmt: skip
    values = {setting: PerImage(100.0 * hit, binary=True) for setting, hit in hits.items()}
    between = without_choice(on_all("top1", values, 300), seed=0)[2]
    gained = int((hits[DEFAULT_LOG_SOFTMAX] & ~hits[DEFAULT]).sum())
    lost = int((hits[DEFAULT] & ~hits[DEFAULT_LOG_SOFTMAX]).sum())
    assert between.test == "McNemar exact"
    assert between.p_value == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert between.gain == pytest.approx(100 * (gained - lost) / 300)


def test_the_fixed_settings_have_one_curve_each_and_no_comparison_where_one_is_missing() -> None:
    settings = {key: value for key, value in both().items() if key != DEFAULT_LOG_SOFTMAX}
    protocols = [comparison.protocol for comparison in without_choice(on_all("lrap", settings, 400), seed=0)]
    assert protocols == ["fixed", "curve"]
    settings = both() | {
        Setting(1.0, DEFAULT.temperature, scores): grid()[HIGH] for scores in ("logits", "log_softmax")
    }
    curve = [c.settings[0] for c in without_choice(on_all("lrap", settings, 400), seed=None) if c.protocol == "curve"]
    assert [(s.scores, s.lam) for s in curve] == [
        ("logits", 0.1), ("logits", 1.0), ("log_softmax", 0.3), ("log_softmax", 1.0),
    ]  # fmt: skip


def test_the_comparison_of_equals_is_found_as_rarely_as_its_p_value_says() -> None:
    """mAP, whose test is made of the bootstrap."""
    rejected = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.rand(120, 3, generator=generator) < 0.3
        signal = targets.float() + torch.randn(120, 3, generator=generator)
        values = {
            setting: evaluate(signal + 0.5 * torch.randn(120, 3, generator=generator), targets)["mAP"]
            for setting in (PLAIN, DEFAULT, DEFAULT_LOG_SOFTMAX)
        }
        between = without_choice(on_all("mAP", values, 120), seed)[2]
        assert between.test == "bootstrap z"
        assert between.p_value is not None
        rejected += between.p_value < 0.05
    assert stats.binomtest(rejected, 60, 0.05).pvalue > 0.001


def test_choices_are_among_both_kinds_of_scores() -> None:
    settings = {PLAIN: PerImage(np.zeros(20)), DEFAULT: PerImage(np.where(np.arange(20) < 10, 8.0, -6.0)),
                DEFAULT_LOG_SOFTMAX: PerImage(np.where(np.arange(20) < 10, -2.0, 4.0))}  # fmt: skip
    halves_ = (np.arange(0, 10), np.arange(10, 20))
    assert crossfitted("top1", settings, halves_, seed=0).settings == (DEFAULT_LOG_SOFTMAX, DEFAULT)
    assert best(on_all("top1", settings, 20)).settings == (DEFAULT,)


def test_rivals_are_compared_under_their_names_on_the_same_resamples() -> None:
    settings = grid()
    table = Table.of("lrap", settings | {"crops": settings[DEFAULT], "other": settings[HIGH]}, [np.arange(400)])
    first, crops, other, *curve = without_choice(table, seed=0)
    assert [comparison.protocol for comparison in (first, crops, other)] == ["fixed", "crops", "other"]
    assert {comparison.protocol for comparison in curve} == {"curve"}
    assert (crops.settings, crops.value, crops.interval) == ((), first.value, first.interval)
    assert crops.p_value == first.p_value
    assert other.gain > first.gain
    assert best(table).settings == (HIGH,)  # of the settings alone


def test_p_values_of_means_over_images() -> None:
    settings = grid()
    plain, value = settings[PLAIN].values, settings[DEFAULT].values
    comparison = fixed("lrap", settings, 400, seed=0)
    assert comparison.test == "paired t"
    assert comparison.p_value == pytest.approx(stats.ttest_rel(value, plain).pvalue)
    same = fixed("lrap", {PLAIN: settings[PLAIN], DEFAULT: settings[PLAIN]}, 400, seed=0)
    assert same.p_value == 1.0

    split = halves(400, seed=0)
    comparison = crossfitted("lrap", settings, split, seed=0)
    differences = np.concatenate(
        [settings[setting].values[rows] - plain[rows] for setting, rows in zip(comparison.settings, split, strict=True)]
    )
    assert differences.mean() == pytest.approx(comparison.gain)
    assert comparison.test == "bootstrap z"
    assert comparison.interval is not None
    z = comparison.gain / ((comparison.interval[1] - comparison.interval[0]) / 2 / stats.norm.ppf(0.975))
    assert comparison.p_value == pytest.approx(2 * stats.norm.sf(abs(z)))
    assert best(on_all("lrap", settings, 400)).p_value is None


def test_p_values_of_hits_are_mcnemars() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(300) < 0.7
    after = np.where(rng.random(300) < 0.1, ~before, before)
    values = {PLAIN: PerImage(100.0 * before, binary=True), DEFAULT: PerImage(100.0 * after, binary=True)}
    comparison = fixed("top1", values, 300, seed=0)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    assert comparison.test == "McNemar exact"
    assert comparison.p_value == pytest.approx(stats.binomtest(won, won + lost).pvalue)
    assert fixed("top1", {PLAIN: values[PLAIN], DEFAULT: values[PLAIN]}, 300, seed=0).p_value == 1.0


def test_p_values_of_map_reject_as_rarely_as_they_say() -> None:
    """Two scores of the same quality: a test at 5 % calls them different about once in twenty times."""
    rejected = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.rand(120, 3, generator=generator) < 0.3
        signal = targets.float() + torch.randn(120, 3, generator=generator)
        values = {
            setting: evaluate(signal + 0.5 * torch.randn(120, 3, generator=generator), targets)["mAP"]
            for setting in (PLAIN, DEFAULT)
        }
        comparison = fixed("mAP", values, 120, seed)
        assert comparison.test == "bootstrap z"
        rejected += comparison.p_value < 0.05
    assert stats.binomtest(rejected, 100, 0.05).pvalue > 0.001
    better = {PLAIN: values[PLAIN], DEFAULT: evaluate(targets.float(), targets)["mAP"]}
    assert fixed("mAP", better, 120, 0).p_value < 1e-4


def test_a_choice_among_equals_widens_the_interval() -> None:
    """Twenty settings of one quality: what is chosen on a half changes from resample to resample, and so does what it
    is measured to gain. An interval that holds the choice fixed misses that."""
    wider, false = [], 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        plain = rng.normal(50, 10, 200)
        settings = {PLAIN: PerImage(plain)} | {
            Setting(0.1 * i, (1.0,)): PerImage(plain + rng.normal(0, 10, 200)) for i in range(1, 21)
        }
        split = halves(200, seed)
        comparison = crossfitted("lrap", settings, split, seed)
        assert comparison.interval is not None
        assert comparison.p_value is not None
        low, high = comparison.interval
        parts = [settings[key].values[rows] - plain[rows] for key, rows in zip(comparison.settings, split, strict=True)]
        wider.append((high - low) / (2 * 1.96 * np.sqrt(sum(stats.sem(part) ** 2 for part in parts)) / 2))
        false += not low <= 0 <= high
        assert (comparison.p_value < 0.05) == (not low <= 0 <= high)
    assert 1.05 < np.median(wider) < 1.3
    assert stats.binomtest(false, 80, 0.05).pvalue > 0.001


def test_settings_are_weighted_together_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    some = rng.random(50) < 0.3
    evaluations = [PerImage(np.where(some, np.nan, rng.normal(50, 20, 50))) for _ in range(4)]
    weights = rng.integers(0, 3, (50, 7)).astype(np.float32)
    weights[::4] = 0
    together = weighted(evaluations, weights)
    np.testing.assert_allclose(together, [one.weighted(weights) for one in evaluations])
    for values, one in zip(together, evaluations, strict=True):
        kept = weights * ~np.isnan(one.values)[:, None]
        np.testing.assert_allclose(values, (kept * np.nan_to_num(one.values)[:, None]).sum(0) / kept.sum(0))


def test_map_of_classes_with_few_positives_has_no_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.zeros(60, 5, dtype=torch.int8)
    for label, count in enumerate((2, 4, 3, 30, 0)):
        targets[:count, label] = 1
    found = [evaluate(torch.randn(60, 5, generator=generator), targets) for _ in range(3)]
    settings = (PLAIN, DEFAULT, DEFAULT_LOG_SOFTMAX)
    of = {setting: one["mAP"] for setting, one in zip(settings, found, strict=True)}
    comparisons = [*without_choice(on_all("mAP", of, 60), 0), crossfitted("mAP", of, halves(60, 0), 0)]
    assert {one.interval for one in comparisons} == {one.p_value for one in comparisons} == {None}
    assert {one.no_interval for one in comparisons} == {
        "the median class of 4 has 3.5 images; expected at least 5: see mAP_5"
    }
    assert {one.classes for one in comparisons} == {4}
    of = {setting: one["mAP_5"] for setting, one in zip(settings, found, strict=True)}
    first, *_ = without_choice(on_all("mAP_5", of, 60), 0)
    assert (first.classes, first.no_interval) == (1, None)
    assert first.interval is not None
    assert first.interval[0] <= first.gain <= first.interval[1]
