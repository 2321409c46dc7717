"""Intervals, tests, verdicts, power: against SciPy, closed forms, by property; then simulated tables."""

import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from convx import statistics as S

RUNS = [93.5, 93.7, 93.6, 93.9, 93.4]
OTHER = [93.1, 93.4, 93.0]
numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))
samples = st.lists(numbers, min_size=2, max_size=8)


def both(estimate, half90, half95):
    """The 90 % and 95 % intervals of one estimate."""
    return tuple(
        S.Interval(estimate, estimate - half, estimate + half, level, 4, "by hand")
        for half, level in ((half90, 0.90), (half95, 0.95))
    )


# --- intervals ------------------------------------------------------------------------------------


@given(samples, samples, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_t_and_welch_are_scipys(a, b, level):
    for ours, theirs in (
        (S.one_sample(a, 1.5), lambda: stats.ttest_1samp(a, 1.5)),
        (S.welch(a, b), lambda: stats.ttest_ind(a, b, equal_var=False)),
    ):
        if ours.se < 1e-6:  # SciPy answers nan for samples without spread
            continue
        result, shift = theirs(), 1.5 if ours.method.startswith("t,") else 0.0
        expected = result.confidence_interval(level)
        interval = ours.interval(level)
        np.testing.assert_allclose([interval.low + shift, interval.high + shift], expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose([ours.df, ours.p_value()], [result.df, result.pvalue], rtol=1e-8, atol=1e-12)


@given(samples, st.data())
@settings(max_examples=40, deadline=None)
def test_paired_is_scipys(a, data):
    b = data.draw(st.lists(numbers, min_size=len(a), max_size=len(a)))
    ours = S.paired(a, b)
    if ours.se > 1e-6:
        result = stats.ttest_rel(a, b)
        expected = result.confidence_interval(0.95)
        interval = S.paired_interval(a, b)
        np.testing.assert_allclose([interval.low, interval.high], expected, rtol=1e-9, atol=1e-9)
        assert ours.p_value() == pytest.approx(result.pvalue, rel=1e-8, abs=1e-12)


def test_t_interval_by_hand():
    # mean 2, sd 1, n 3: half width 4.302653 / sqrt(3)
    interval = S.t_interval([1, 2, 3])
    assert (interval.estimate, interval.n, interval.level) == (2, 3, 0.95)
    assert interval.high - 2 == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)


def test_summaries_equal_raw_data_and_swap_sign():
    raw = S.welch_interval(RUNS, OTHER)
    summary = S.summary_difference(np.mean(RUNS), np.std(RUNS, ddof=1), 5, np.mean(OTHER), np.std(OTHER, ddof=1), 3)
    assert (summary.low, summary.high) == pytest.approx((raw.low, raw.high))
    swapped = S.welch_interval(OTHER, RUNS).reversed()
    assert (swapped.low, swapped.high) == pytest.approx((raw.low, raw.high))
    assert S.t_interval(RUNS).shifted(-93).low == pytest.approx(S.one_sample(RUNS, 93).interval().low)


@pytest.mark.parametrize("successes, n", [(0, 10), (10, 10), (9365, 10_000), (1, 2)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_closed_form(successes, n, level):
    z, p = stats.norm.ppf(0.5 + level / 2), successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    interval = S.wilson_interval(successes, n, level)
    assert (interval.low, interval.high) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_one_run_has_no_interval_and_no_spread_is_a_point():
    for single in (S.t_interval([93.0]), S.welch_interval(RUNS, [93.0]), S.paired_interval([1.0], [2.0])):
        assert (single.low, single.high) == (-math.inf, math.inf)
    point = S.t_interval([0.1, 0.1, 0.1])
    assert point.low == point.high == 0.1
    assert S.one_sample([0.1, 0.1], 0.1).p_value() == 1 and S.one_sample([0.2, 0.2], 0.1).p_value() == 0
    assert S.tost([5.0, 5.0], 5.1, 0.2, "one_sample").p_value == 0
    assert not S.tost([5.0, 5.0], 5.3, 0.2, "one_sample").equivalent


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: S.t_interval([]), "values must be a non-empty list"),
        (lambda: S.t_interval([1.0, math.nan]), "finite"),
        (lambda: S.t_interval(RUNS, 95), "level must lie between 0 and 1"),
        (lambda: S.paired_interval(RUNS, OTHER), "got 5 and 3"),
        (lambda: S.wilson_interval(3, 2), "got 3 of 2"),
        (lambda: S.summary_difference(1, -1, 3, 1, 1, 3), "sd >= 0"),
        (lambda: S.latency_median_interval([1, 2, 3, 4, 5]), "5 samples are too few"),
        (lambda: S.tost(RUNS, OTHER, 0.0), "margin must be"),
        (lambda: S.tost(RUNS, 93.0, 0.5), "design 'welch' compares with a list"),
        (lambda: S.tost(RUNS, OTHER, 0.5, "one_sample"), "compares with a constant"),
        (lambda: S.tost(RUNS, OTHER, 0.5, "student"), "design must be one of"),
        (lambda: S.delta_to_paper(RUNS, 930.0, test_images=10), "test_images is for accuracies"),
        (lambda: S.direction_verdict(*both(1, 1, 1), direction="up"), "direction must be"),
        (lambda: S.absolute_verdict(*both(1, 1, 1)[::-1], 0.5), "need the 90 % and the 95 %"),
        (lambda: S.absolute_verdict(*both(math.nan, 1, 1), 0.5), "NaN"),
        (lambda: S.holm([0.5, 1.5]), "p values"),
        (lambda: S.mcnemar([0.5], [1]), "0/1 per image"),
        (lambda: S.tost_power(0.1, 1, 0.5), "n >= 2"),
        (
            lambda: S.minimum_detectable_effect(0.1, 3, design="paired", other_n=3),
            "belong to the design 'welch'",
        ),
        (lambda: S.bootstrap_seeds_images(np.full((2, 5), 75.0)), "shares between 0 and 1"),
        (lambda: S.bootstrap_seeds_images(np.eye(3), np.eye(4)), "share their images"),
        (lambda: S.ratio_of_medians_interval([1, 2], [1]), "one to one"),
        (lambda: S.stratified_bootstrap([[1, 2]], resamples=10), "at least 100"),
    ],
)
def test_users_errors_are_one_clear_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


# --- against a paper ------------------------------------------------------------------------------


def test_delta_to_paper_states_and_uses_its_assumption():
    welch = S.delta_to_paper(RUNS, 93.65, paper_sd=0.18, paper_n=4, test_images=10_000)
    expected = S.summary_difference(np.mean(RUNS), np.std(RUNS, ddof=1), 5, 93.65, 0.18, 4)
    assert (welch.low, welch.high) == (expected.low, expected.high) and "paper n=4" in welch.method

    # n unknown: s²/n and the binomial variance in quadrature, Satterthwaite's df over the first only
    quadrature = S.delta_to_paper(RUNS, 93.65, paper_sd=0.18, test_images=10_000)
    ours, binomial = np.var(RUNS, ddof=1) / 5, 93.65 * 6.35 / 10_000
    half = stats.t.ppf(0.975, (ours + binomial) ** 2 / (ours**2 / 4)) * math.sqrt(ours + binomial)
    assert quadrature.high - quadrature.estimate == pytest.approx(half)
    assert "n unknown" in quadrature.method and "binomial SE of 10000" in quadrature.method

    point = S.delta_to_paper(RUNS, 93.65)
    assert point.low == pytest.approx(S.t_interval(RUNS).low - 93.65) and "without error" in point.method
    assert "single run" in S.delta_to_paper(RUNS, 93.65, paper_n=1).method
    assert "sd unknown" in S.delta_to_paper(RUNS, 93.65, paper_n=4).method


def test_a_single_run_gets_the_test_set_interval_only():
    interval = S.delta_to_paper([93.5], 93.65, paper_sd=0.18, paper_n=4, test_images=10_000)
    wilson = S.wilson_interval(9350, 10_000)
    assert (interval.low, interval.high) == pytest.approx((100 * wilson.low - 93.65, 100 * wilson.high - 93.65))
    assert interval.n == 1 and "n=1, test-set CI only" in interval.method
    unknown = S.delta_to_paper([93.5], 93.65)
    assert (unknown.low, unknown.high) == (-math.inf, math.inf) and "no interval" in unknown.method


# --- equivalence ----------------------------------------------------------------------------------


@given(samples, numbers, st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_tost_is_two_one_sided_tests_and_its_interval(values, constant, margin):
    result = S.tost(values, constant, margin, "one_sample")
    if S.one_sample(values, constant).se > 1e-6:
        low = stats.ttest_1samp(values, constant - margin, alternative="greater").pvalue
        high = stats.ttest_1samp(values, constant + margin, alternative="less").pvalue
        assert result.p_value == pytest.approx(max(low, high), rel=1e-8, abs=1e-12)
    edge = min(result.interval.low + margin, margin - result.interval.high)
    if abs(edge) > 1e-9:
        assert result.equivalent == (edge > 0)
    assert result.interval.level == pytest.approx(0.90)


def test_tost_welch_and_paired():
    a, b = np.array(RUNS), np.array([93.1, 93.4, 93.3, 93.5, 93.2])
    for design, test in (("welch", lambda x: stats.ttest_ind(x, b, equal_var=False)), ("paired", None)):
        result = S.tost(a, b, 0.6, design)
        if test is None:
            test = lambda x: stats.ttest_rel(x, b)  # noqa: E731
        low, high = test(a + 0.6), test(a - 0.6)
        expected = max(stats.t.sf(low.statistic, low.df), stats.t.cdf(high.statistic, high.df))
        assert result.p_value == pytest.approx(expected, rel=1e-9)


def test_single_run_tost_inverts_wilson():
    contrast = S.compare_to_paper([93.5], 93.65, test_images=10_000)
    interval = contrast.interval(0.90)
    assert contrast.tost(-interval.low).p_value == pytest.approx(0.05, rel=1e-6)  # the far bound decides
    assert contrast.tail(interval.high, above=False) == pytest.approx(0.05, rel=1e-6)
    z = (0.935 - 0.9365) / math.sqrt(0.9365 * 0.0635 / 10_000)
    assert contrast.p_value() == pytest.approx(2 * stats.norm.cdf(z), rel=1e-9)
    assert contrast.tost(2.0).equivalent and not contrast.tost(0.3).equivalent


# --- verdicts -------------------------------------------------------------------------------------

CASES = [  # estimate, half widths at 90 % and 95 %, margin; absolute word; direction word
    (0.0, 0.3, 0.4, 0.5, "replicated", "no relevant difference"),
    (0.2, 0.15, 0.18, 0.5, "replicated", "no relevant difference"),  # significant, small
    (-0.2, 0.15, 0.18, 0.5, "replicated", "no relevant difference"),
    (0.1, 0.35, 0.5, 0.5, "replicated", "no relevant difference"),  # the 95 % interval may stick out
    (1.0, 0.3, 0.4, 0.5, "higher", "supported"),  # wholly beyond the margin
    (0.7, 0.5, 0.6, 0.5, "higher", "supported"),  # beyond 0, straddles the margin, estimate beyond it
    (-1.0, 0.3, 0.4, 0.5, "lower", "contradicted"),
    (-0.7, 0.5, 0.6, 0.5, "lower", "contradicted"),
    (0.4, 0.2, 0.3, 0.5, "inconclusive", "inconclusive"),  # sign clear, size not
    (-0.4, 0.2, 0.3, 0.5, "inconclusive", "inconclusive"),
    (0.7, 0.6, 0.8, 0.5, "inconclusive", "inconclusive"),  # only the 90 % interval excludes 0
    (0.0, 3.0, 4.0, 0.5, "inconclusive", "inconclusive"),
    (0.0, math.inf, math.inf, 0.5, "inconclusive", "inconclusive"),  # a single run
    (0.0, 0.5, 0.6, 0.5, "inconclusive", "inconclusive"),  # touching the margin is not inside it
    (0.5, 0.3, 0.4, 0.5, "inconclusive", "inconclusive"),  # nor is the margin itself beyond it
]


@pytest.mark.parametrize("estimate, half90, half95, margin, absolute, direction", CASES)
def test_verdict_tables(estimate, half90, half95, margin, absolute, direction):
    intervals = both(estimate, half90, half95)
    assert S.absolute_verdict(*intervals, margin) == absolute
    assert S.direction_verdict(*intervals, margin) == direction


@pytest.mark.parametrize(
    "estimate, half95, word",
    [
        (0.1, 0.05, "supported"),
        (-0.1, 0.05, "contradicted"),
        (0.1, 0.1, "inconclusive"),
        (0.1, 0.2, "inconclusive"),
    ],
)
def test_without_a_margin_the_sign_decides(estimate, half95, word):
    assert S.direction_verdict(*both(estimate, half95 * 0.8, half95)) == word


@given(samples, st.one_of(st.none(), st.floats(0.01, 1e3)))
@settings(max_examples=150, deadline=None)
def test_verdicts_are_antisymmetric_and_agree(values, margin):
    contrast = S.one_sample(values)
    forward = contrast.interval(0.90), contrast.interval(0.95)
    mirrored = tuple(x.reversed() for x in forward)
    swap = {"supported": "contradicted", "contradicted": "supported"}
    word = S.direction_verdict(*forward, margin)
    assert S.direction_verdict(*mirrored, margin) == swap.get(word, word)
    assert S.direction_verdict(*mirrored, margin, "lower") == word
    if margin is not None:
        renamed = {"replicated": "no relevant difference", "higher": "supported", "lower": "contradicted"}
        absolute = S.absolute_verdict(*forward, margin)
        assert renamed.get(absolute, absolute) == word
        if abs(contrast.tost(margin).p_value - 0.05) > 1e-9:
            assert (absolute == "replicated") == contrast.tost(margin).equivalent
    if word in swap:
        assert contrast.p_value() < 0.05


# --- p values -------------------------------------------------------------------------------------


def test_holm_by_hand_and_order():
    # sorted: 0.005*4, 0.01*3, 0.03*2, 0.04*1 -> running maximum
    np.testing.assert_allclose(S.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert S.holm([]).size == 0 and S.holm([0.9, 0.8]).tolist() == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=80, deadline=None)
def test_holm_is_between_raw_and_bonferroni_and_keeps_order(p):
    adjusted = S.holm(p)
    assert np.all(adjusted >= np.array(p)) and np.all(adjusted <= np.minimum(1, np.array(p) * len(p)) + 1e-15)
    assert all(a <= b for a, b in pairwise(adjusted[np.argsort(p, kind="stable")]))
    assert adjusted[np.argmin(p)] == pytest.approx(min(1, min(p) * len(p)))


def test_mcnemar_exact_by_hand():
    # 5 images only A gets right, 1 only B: 2 * (C(6,5) + C(6,6)) / 2^6 = 14/64
    a = [1] * 5 + [0] + [1] * 10 + [0] * 4
    b = [0] * 5 + [1] + [1] * 10 + [0] * 4
    result = S.mcnemar(a, np.array(b, dtype=bool))
    assert (result.only_a, result.only_b, result.n) == (5, 1, 20)
    assert result.p_value == pytest.approx(14 / 64) and result.difference == pytest.approx(0.2)
    assert S.mcnemar(a, a).p_value == 1


# --- power ----------------------------------------------------------------------------------------


def test_power_of_one_sample_equivalence_is_owens_integral():
    sd, n, margin, delta = 0.3, 5, 0.5, 0.1
    se, t = sd / math.sqrt(n), stats.t.ppf(0.95, n - 1)

    def inside(chi):
        half = margin - t * se * chi / math.sqrt(n - 1)
        density = stats.chi.pdf(chi, n - 1)
        return density * (stats.norm.cdf((half - delta) / se) - stats.norm.cdf((-half - delta) / se))

    expected, _ = integrate.quad(inside, 0, margin / (t * se) * math.sqrt(n - 1))
    assert S.tost_power(sd, n, margin, delta) == pytest.approx(expected, abs=2e-3)
    assert S.tost_power(sd, n, margin, -delta) == pytest.approx(S.tost_power(sd, n, margin, delta))


@pytest.mark.parametrize(
    "n, margin, spreads, quoted",
    [  # Table 1 of arXiv 2301.11360 (n = 4): baseline, LC learned, LC frozen
        (4, 0.5, (0.18, 0.18, 0.06), (91, 91, 100)),
        (6, 0.5, (0.23, 0.29, 0.10), (80, 53, 100)),
        (10, 0.5, (0.23, 0.29, 0.10), (86, 63, 100)),
        (4, 1.5, (0.52, 0.55, 0.74), (93, 90, 58.6)),
    ],
)
def test_power_against_a_papers_table(n, margin, spreads, quoted):
    powers = [100 * S.tost_power(sd, n, margin, paper_n=4, paper_sd=sd) for sd in spreads]
    assert powers == pytest.approx(quoted, abs=0.5)


@pytest.mark.parametrize("sd, n", [(0.2, 3), (0.2, 6), (1.5, 4)])
def test_detectable_effect_is_the_noncentral_t(sd, n):
    effect = S.minimum_detectable_effect(sd, n, design="one_sample")
    critical = stats.t.ppf(0.975, n - 1)
    power = stats.nct.sf(critical, n - 1, effect * math.sqrt(n) / sd)
    assert power == pytest.approx(0.8, abs=3e-3)
    assert S.minimum_detectable_effect(sd, n, design="paired") == effect
    assert S.minimum_detectable_effect(3 * sd, n, design="one_sample") == pytest.approx(3 * effect)


def test_detectable_effect_grows_with_margin_and_spread():
    plain = S.minimum_detectable_effect(0.2, 4)
    assert S.minimum_detectable_effect(0.2, 4, other_n=8) < plain < S.minimum_detectable_effect(0.2, 4, other_sd=0.4)
    # far above the noise the margin plus the power's normal quantile is what it takes
    expected = 2 + stats.norm.ppf(0.8) * 0.2 * math.sqrt(0.5)
    assert S.minimum_detectable_effect(0.2, 4, margin=2.0) == pytest.approx(expected, rel=1e-3)
    assert S.minimum_detectable_effect(0.2, 1) == math.inf
    assert S.minimum_detectable_effect(0.0, 3, margin=0.5) == 0.5


# --- bootstraps and medians -----------------------------------------------------------------------


def test_seeds_and_images_reduces_to_its_two_limits():
    rng = np.random.default_rng(0)
    same = np.tile(rng.random(4000) < 0.9, (4, 1))  # seeds agree: the bootstrap over images
    interval = S.bootstrap_seeds_images(same, resamples=20_000)
    half = 1.96 * 100 * same[0].std(ddof=1) / math.sqrt(4000)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.03)
    levels = np.array([0.90, 0.92, 0.93, 0.94, 0.96])  # images agree: Student over seeds
    interval = S.bootstrap_seeds_images(np.tile(levels[:, None], (1, 50)), resamples=20_000)
    expected = S.t_interval(100 * levels)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.1)
    assert interval.estimate == pytest.approx(expected.estimate)


def test_seeds_and_images_designs():
    rng = np.random.default_rng(1)
    a, b = rng.random((4, 500)) < 0.9, rng.random((4, 500)) < 0.8
    paired = S.bootstrap_seeds_images(a, b, paired_seeds=True)
    free = S.bootstrap_seeds_images(a, b)
    assert paired.estimate == pytest.approx(free.estimate) == pytest.approx(100 * (a.mean() - b.mean()))
    assert "paired" in paired.method and "4 and 4" in free.method
    assert S.bootstrap_seeds_images(a, b) == free  # same seed, same bits
    assert S.bootstrap_seeds_images(a, b, seed=1) != free
    assert (S.bootstrap_seeds_images(a, a, paired_seeds=True).low) == 0
    single = S.bootstrap_seeds_images(a[:1])
    wilson = S.wilson_interval(int(a[0].sum()), 500)
    assert (single.low, single.high) == pytest.approx((100 * wilson.low, 100 * wilson.high), abs=0.5)
    assert "a single seed" in single.method
    perfect = S.bootstrap_seeds_images(np.ones((3, 500)))
    assert perfect.high == 100 and 98 < perfect.low < 100


def test_probability_of_improvement_is_mann_whitney():
    a, b = [3.0, 5.0, 4.0, 2.0], [1.0, 3.0, 2.0]
    interval = S.probability_of_improvement(a, b)
    assert interval.estimate == pytest.approx(stats.mannwhitneyu(a, b).statistic / 12)
    assert interval.low < interval.estimate < interval.high <= 1
    separated = S.probability_of_improvement([4, 5, 6], [1, 2, 3])
    assert (separated.low, separated.high) == pytest.approx((0.025 ** (1 / 3), 1))
    reverse = S.probability_of_improvement([1, 2, 3], [4, 5, 6])
    assert (reverse.low, reverse.high) == pytest.approx((0, 1 - 0.025 ** (1 / 3)))
    two = S.probability_of_improvement(np.c_[a, a], np.c_[[1.0, 3.0, 2.0], [9.0, 9.0, 9.0]])
    assert two.estimate == pytest.approx(interval.estimate / 2)


def test_aggregates():
    assert S.interquartile_mean([100, 1, 2, 3, 4, 5, 6, -100]) == pytest.approx(3.5)
    scores = {"a": [1.0, 2.0, 3.0], "b": [11.0, 12.0, 13.0]}
    interval = S.stratified_bootstrap(scores, np.mean)
    assert interval.estimate == pytest.approx(7)
    # resampling within data sets only: the gap between the data sets does not enter (sd sqrt(2/3)/sqrt(6))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(2 / 3 / 6), rel=0.1)
    assert S.stratified_bootstrap(list(scores.values()), np.mean) == interval


def test_median_interval_by_order_statistics():
    x = np.random.default_rng(0).permutation(np.arange(20.0))
    interval = S.latency_median_interval(x)
    # Binomial(20, 1/2): P(X <= 5) = 0.0207 <= 0.025 < P(X <= 6): the 6th and 15th smallest
    assert (interval.low, interval.estimate, interval.high) == (5.0, 9.5, 14.0)


def test_ratio_of_medians_uses_the_pairs():
    rng = np.random.default_rng(0)
    drift = np.exp(np.cumsum(rng.normal(0, 0.1, 200)))
    b = drift * rng.uniform(1, 1.01, 200)
    a = 1.2 * drift * rng.uniform(1, 1.01, 200)
    paired = S.ratio_of_medians_interval(a, b)
    free = S.ratio_of_medians_interval(a, b, paired=False)
    assert paired.estimate == pytest.approx(np.median(a) / np.median(b))
    assert paired.low < 1.2 < paired.high
    assert (paired.high - paired.low) < 0.2 * (free.high - free.low)
    assert S.ratio_of_medians_interval(a, b) == paired


def test_import_needs_no_torch():
    code = "import sys, convx.statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- simulated tables: what the intervals and verdicts promise ------------------------------------

TABLES = 4000  # Monte Carlo error of a 95 % coverage: 0.34 pp


def covered(intervals, truth=0.0):
    """Share of the intervals that hold the truth, in percent."""
    return 100 * np.mean([interval.low <= truth <= interval.high for interval in intervals])


@pytest.mark.parametrize("n", [3, 4, 6])
def test_t_and_paired_intervals_cover(n):
    rng = np.random.default_rng(n)
    runs = rng.normal(92, 0.25, (TABLES, n))
    other = runs + rng.normal(0.3, 0.1, (TABLES, n))
    assert 94 <= covered([S.t_interval(x) for x in runs], 92) <= 96.5
    assert 94 <= covered([S.paired_interval(y, x) for x, y in zip(runs, other)], 0.3) <= 96.5


WELCH = [(4, 4, 1), (6, 4, 1), (6, 4, 2), (4, 4, 3), (3, 5, 2), (6, 6, 1)]


@pytest.mark.parametrize("n, m, ratio", WELCH)
def test_welch_interval_covers(n, m, ratio):
    rng = np.random.default_rng(10 * n + m)
    a, b = rng.normal(92, 0.2, (TABLES, n)), rng.normal(91, 0.2 * ratio, (TABLES, m))
    assert 94 <= covered([S.welch_interval(x, y) for x, y in zip(a, b)], 1.0) <= 96.5


def test_delta_to_a_papers_point_covers():
    """The paper's number has the binomial error of its test set; ours the spread of its seeds."""
    rng = np.random.default_rng(3)
    papers = 100 * rng.binomial(10_000, 0.92, TABLES) / 10_000
    runs = rng.normal(92, 0.25, (TABLES, 4))
    intervals = [S.delta_to_paper(x, paper, test_images=10_000) for x, paper in zip(runs, papers)]
    assert 94 <= covered(intervals) <= 96.5


def crossed(rng, tables, seeds, accuracy, image_sd, seed_sd, shared=None, images=1000):
    """0/1 results [tables, seeds, images] of a probit model with easy and hard images, good and bad seeds."""
    centre = stats.norm.ppf(accuracy) * math.sqrt(1 + image_sd**2 + seed_sd**2)
    shape = (tables, seeds, images)
    easy = rng.standard_normal((tables, 1, images), dtype=np.float32) if shared is None else shared
    good = rng.standard_normal((tables, seeds, 1), dtype=np.float32)
    return centre + image_sd * easy + seed_sd * good + rng.standard_normal(shape, dtype=np.float32) > 0


# easy and hard images: sd 2 of the latent score makes most errors common to all seeds, as on CIFAR
CROSSED = [(3, 0.92, 2.0, 0.05), (3, 0.7, 1.5, 0.1), (4, 0.92, 2.0, 0.15), (6, 0.92, 2.0, 0.05)]


@pytest.mark.slow
@pytest.mark.parametrize("seeds, accuracy, image_sd, seed_sd", CROSSED)
def test_seeds_and_images_bootstrap_covers(seeds, accuracy, image_sd, seed_sd):
    rng = np.random.default_rng(seeds)
    intervals = []
    for _ in range(10):
        tables = crossed(rng, 500, seeds, accuracy, image_sd, seed_sd)
        intervals += [S.bootstrap_seeds_images(table, resamples=1000) for table in tables]
    assert 94 <= covered(intervals, 100 * accuracy) <= 96.5


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("seeds", [3, 5])
def test_difference_over_seeds_and_images_covers(seeds, paired):
    rng = np.random.default_rng(seeds)
    intervals = []
    for _ in range(5):
        easy = rng.standard_normal((500, 1, 1000), dtype=np.float32)
        a = crossed(rng, 500, seeds, 0.92, 2.0, 0.1, easy)
        b = crossed(rng, 500, seeds, 0.90, 2.0, 0.1, easy)
        kwargs = {"paired_seeds": paired, "resamples": 1000}
        intervals += [S.bootstrap_seeds_images(x, y, **kwargs) for x, y in zip(a, b)]
    assert 94 <= covered(intervals, 2.0) <= 96.5


def verdict_of(contrast, margin):
    return S.absolute_verdict(contrast.interval(0.90), contrast.interval(0.95), margin)


@pytest.mark.parametrize("sd", [0.05, 0.18, 0.3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_false_replications_at_the_margin_are_rare(sd, sign):
    """True difference exactly at the margin of 0.5 pp: "replicated" is wrong; at most 6 % of tables."""
    rng = np.random.default_rng(7)
    runs = rng.normal(92 + sign * 0.5, sd, (TABLES, 4))
    paper = rng.normal(92, sd, (TABLES, 4))
    mean, spread = paper.mean(1), paper.std(1, ddof=1)
    for contrasts in (
        [S.compare_to_paper(x, m, s, 4) for x, m, s in zip(runs, mean, spread)],
        [S.paired(x, y) for x, y in zip(runs, paper)],
        [S.one_sample(x, 92.0) for x in runs],
    ):
        assert 100 * np.mean([verdict_of(c, 0.5) == "replicated" for c in contrasts]) <= 6


def test_false_differences_without_one_are_rare():
    rng = np.random.default_rng(8)
    runs, paper = rng.normal(92, 0.8, (TABLES, 4)), rng.normal(92, 0.8, (TABLES, 4))
    contrasts = [S.welch(x, y) for x, y in zip(runs, paper)]
    assert 100 * np.mean([verdict_of(c, 0.5) in ("higher", "lower") for c in contrasts]) <= 6
    words = [S.direction_verdict(c.interval(0.90), c.interval(0.95)) for c in contrasts]
    assert 100 * np.mean([w != "inconclusive" for w in words]) <= 6


@pytest.mark.parametrize("shared_baseline", [False, True])
def test_family_wise_error_of_primary_claims(shared_baseline):
    """Eight true null hypotheses; the claims may share their baseline's runs, as they do in a study."""
    rng = np.random.default_rng(9)
    claims, tables = 8, 2000
    a = rng.normal(92, 0.25, (tables, claims, 4))
    b = rng.normal(92, 0.25, (tables, 1 if shared_baseline else claims, 4))
    b = np.broadcast_to(b, a.shape)
    smallest = [min(S.holm([S.welch(x, y).p_value() for x, y in zip(*table)])) for table in zip(a, b)]
    assert 100 * np.mean(np.array(smallest) < 0.05) <= 6


@pytest.mark.slow
def test_ratio_and_median_intervals_cover():
    rng = np.random.default_rng(11)
    a, b = (rng.lognormal(mu, 0.1, (2000, 60)) for mu in (math.log(1.3), 0.0))
    ratios = [S.ratio_of_medians_interval(x, y, resamples=400) for x, y in zip(a, b)]
    assert 94 <= covered(ratios, 1.3) <= 96.5
    assert covered([S.latency_median_interval(x) for x in rng.normal(5, 1, (2000, 40))], 5) >= 94.5
