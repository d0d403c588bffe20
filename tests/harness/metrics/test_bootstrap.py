"""Bootstrap intervals: known distributions, clustering, pairing, determinism, and the smallest samples."""

import numpy as np
import pytest

from cacheslide.errors import DataError
from harness.metrics import bootstrap


def contains(estimate, truth):
    return estimate.low <= truth <= estimate.high


def coverage(draw, estimate, truth, trials=300):
    rng = np.random.default_rng(7)
    return np.mean([contains(estimate(draw(rng)), truth) for _ in range(trials)])


def test_mean_interval_covers_the_true_mean_as_often_as_it_says():
    found = coverage(lambda rng: rng.normal(3.0, 2.0, 60), lambda x: bootstrap.mean(x, resamples=500), 3.0)
    assert 0.90 <= found <= 0.98
    narrow = coverage(lambda rng: rng.normal(3.0, 2.0, 60), lambda x: bootstrap.mean(x, level=0.5, resamples=500), 3.0)
    assert 0.40 <= narrow <= 0.60


def test_mean_interval_has_the_width_of_the_normal_theory():
    sample = np.random.default_rng(0).normal(size=400)
    estimate = bootstrap.mean(sample)
    half = 1.96 * sample.std() / np.sqrt(400)
    assert estimate.value == pytest.approx(sample.mean())
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.05)


def test_clusters_widen_the_interval_to_where_it_covers():
    """30 prompts of 8 questions whose scores are nearly equal within a prompt: the questions are no 240 samples."""
    clusters = np.repeat(np.arange(30), 8)

    def draw(rng):
        return rng.normal(size=30)[clusters] + 0.1 * rng.normal(size=240)

    naive = coverage(draw, lambda x: bootstrap.mean(x, resamples=400), 0.0)
    clustered = coverage(draw, lambda x: bootstrap.mean(x, clusters, resamples=400), 0.0)
    assert naive < 0.70
    assert 0.88 <= clustered <= 0.98


def test_clusters_are_resampled_whole_and_may_differ_in_size():
    estimate = bootstrap.mean([1, 1, 1, 5], ["a", "a", "a", "b"])
    assert (estimate.n, estimate.values, estimate.value) == (2, 4, 2.0)
    # the possible resamples are aa, ab, ba, bb with means 1, 2, 2, 5
    assert (estimate.low, estimate.high) == (1.0, 5.0)
    half = bootstrap.mean([1, 1, 1, 5], ["a", "a", "a", "b"], level=0.4)
    assert (half.low, half.high) == (2.0, 2.0)


def test_cluster_labels_need_no_order():
    values, labels = [3.0, 1.0, 4.0, 1.0, 5.0], ["x", "y", "x", "z", "y"]
    order = [0, 2, 1, 4, 3]
    assert bootstrap.mean(values, labels) == bootstrap.mean([values[i] for i in order], [labels[i] for i in order])


def test_pairing_removes_what_both_systems_share():
    rng = np.random.default_rng(1)
    hardness = rng.normal(size=200)
    a, b = hardness + 0.3 + 0.1 * rng.normal(size=200), hardness + 0.1 * rng.normal(size=200)
    paired = bootstrap.paired_difference(a, b)
    assert paired.value == pytest.approx(a.mean() - b.mean())
    assert contains(paired, 0.3) and paired.low > 0.2
    alone = bootstrap.mean(a)
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    flipped = bootstrap.paired_difference(b, a)
    assert (flipped.low, flipped.high) == pytest.approx((-paired.high, -paired.low))


def test_paired_difference_covers_zero_for_equal_systems():
    clusters = np.repeat(np.arange(40), 3)

    def draw(rng):
        return rng.normal(size=40)[clusters] + rng.normal(size=120)

    found = coverage(draw, lambda d: bootstrap.paired_difference(d, np.zeros(120), clusters, resamples=400), 0.0)
    assert 0.89 <= found <= 0.98


def test_median_and_p95():
    sample = np.arange(1.0, 102.0)
    middle, tail = bootstrap.median(sample), bootstrap.p95(sample)
    assert (middle.statistic, middle.value, middle.n) == ("median", 51.0, 101)
    assert (tail.statistic, tail.value) == ("p95", 96.0)
    assert 40 < middle.low < 51 < middle.high < 62
    assert 85 < tail.low < 96 < tail.high <= 101


def test_median_interval_covers_the_true_median():
    found = coverage(lambda rng: rng.exponential(size=80), lambda x: bootstrap.median(x, resamples=400), np.log(2))
    assert 0.89 <= found <= 0.99


def test_ratio_of_medians_is_paired():
    rng = np.random.default_rng(3)
    base = rng.lognormal(0, 1, size=150)
    a, b = base * 0.5 * rng.lognormal(0, 0.02, 150), base
    ratio = bootstrap.ratio_of_medians(a, b)
    assert ratio.value == pytest.approx(np.median(a) / np.median(b))
    assert contains(ratio, 0.5)
    assert ratio.high - ratio.low < 0.1  # the prompts themselves differ by far more
    unpaired = bootstrap.ratio_of_medians(a, rng.permutation(b))
    assert unpaired.high - unpaired.low > 3 * (ratio.high - ratio.low)


ONE_SAMPLE = [bootstrap.mean, bootstrap.median, bootstrap.p95]
TWO_SAMPLES = [bootstrap.paired_difference, bootstrap.ratio_of_medians]


@pytest.mark.parametrize("estimator", ONE_SAMPLE)
def test_one_value_has_no_interval(estimator):
    estimate = estimator([2.5])
    assert (estimate.n, estimate.value, estimate.low, estimate.high) == (1, 2.5, None, None)


def test_one_pair_and_one_cluster_have_no_interval():
    assert bootstrap.paired_difference([2.0], [0.5]).low is None
    assert bootstrap.ratio_of_medians([2.0], [0.5]).high is None
    one = bootstrap.mean([1.0, 2.0], ["a", "a"])
    assert (one.n, one.values, one.value, one.low) == (1, 2, 1.5, None)


@pytest.mark.parametrize("estimator", ONE_SAMPLE)
def test_the_seed_decides(estimator):
    sample = np.random.default_rng(5).normal(size=50)
    assert estimator(sample, seed=1) == estimator(sample, seed=1)
    assert estimator(sample, seed=1).low != estimator(sample, seed=2).low


def test_blocks_change_memory_only(monkeypatch):
    sample = np.random.default_rng(5).normal(size=50)
    whole = bootstrap.mean(sample, resamples=1000)
    monkeypatch.setattr(bootstrap, "BLOCK", 700)
    parts = bootstrap.mean(sample, resamples=1000)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high))


@pytest.mark.parametrize("estimator", ONE_SAMPLE)
@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")], [[1.0], [2.0]]])
def test_unusable_values_are_refused(estimator, values):
    with pytest.raises(DataError):
        estimator(values)


def test_mismatched_or_meaningless_arguments_are_refused():
    for estimator in TWO_SAMPLES:
        with pytest.raises(DataError, match="equal lengths, got 2 and 1"):
            estimator([1.0, 2.0], [1.0])
    with pytest.raises(DataError, match="2 values but 1 cluster"):
        bootstrap.mean([1.0, 2.0], ["a"])
    with pytest.raises(DataError, match="positive"):
        bootstrap.ratio_of_medians([1.0, 2.0], [0.0, 1.0])
    with pytest.raises(DataError, match="level"):
        bootstrap.mean([1.0, 2.0], level=95)
    with pytest.raises(DataError, match="resamples"):
        bootstrap.mean([1.0, 2.0], resamples=0)
    with pytest.raises(DataError, match="q must"):
        bootstrap.quantile([1.0, 2.0], 95)


def crossed(rng, seeds=6, prompts=20, between=1.0, within=1.0):
    """Scores of every seed on every prompt: an effect of the seed, one of the prompt, one of both."""
    table = between * rng.normal(size=(seeds, 1)) + within * rng.normal(size=(1, prompts))
    return (table + 0.3 * rng.normal(size=(seeds, prompts))).ravel()


@pytest.mark.parametrize(("between", "within"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_crossed_interval_covers_where_seeds_or_prompts_differ(between, within):
    """A bootstrap over prompts alone misses the spread of seeds; the crossed one covers (few seeds: a little less)."""
    first, second = np.repeat(np.arange(6), 20), np.tile(np.arange(20), 6)

    def estimate(x):
        return bootstrap.crossed_mean(x, first, second, resamples=400)

    covered = coverage(lambda rng: crossed(rng, between=between, within=within), estimate, 0.0)
    assert 0.82 <= covered <= 1.0
    if between:
        alone = coverage(
            lambda rng: crossed(rng, between=between, within=within),
            lambda x: bootstrap.mean(x, second, resamples=400),
            0.0,
        )
        assert alone < covered - 0.1


def test_crossed_mean_of_one_group_resamples_the_other():
    values, prompts = [1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"]
    one = bootstrap.crossed_mean(values, ["s"] * 4, prompts)
    assert (one.n, one.values, one.value, one.low, one.high) == (2, 4, 2.0, 1.0, 5.0)
    assert bootstrap.crossed_mean(values, prompts, ["s"] * 4).high == 5.0
    single = bootstrap.crossed_mean([1.0, 3.0], ["s", "s"], ["a", "a"])
    assert (single.value, single.low, single.high) == (2.0, None, None)
    part = bootstrap.crossed_mean([1.0, 3.0], ["s", "t"], ["a", "b"])  # two of four pairs have no value
    assert part.n == 2 and (part.low, part.high) == (1.0, 3.0)
    with pytest.raises(DataError, match="group labels"):
        bootstrap.crossed_mean([1.0], ["s", "t"], ["a"])
