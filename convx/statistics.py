"""Intervals, equivalence, verdicts, paired tests and power: the numbers that decide a claim. No torch.

    >>> ours = compare_to_paper([93.5, 93.7, 93.6, 93.8], 93.65, paper_sd=0.18, paper_n=4)
    >>> absolute_verdict(ours.interval(0.90), ours.interval(0.95), margin=0.5)
    'replicated'

The closed forms live in `convx.intervals`, the bootstraps in `convx.resampling`; all are importable from
here. Margins are arguments, fixed before the runs: nothing in this module computes one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from convx.intervals import (
    Contrast,
    Equivalence,
    Interval,
    checked_margin,
    compare_to_paper,
    delta_to_paper,
    from_summaries,
    latency_median_interval,
    one_sample,
    paired,
    paired_images,
    paired_interval,
    summary_difference,
    t_interval,
    welch,
    welch_interval,
    wilson_interval,
)
from convx.resampling import (
    bootstrap_seeds_images,
    interquartile_mean,
    probability_of_improvement,
    ratio_of_medians_interval,
    stratified_bootstrap,
)

__all__ = [
    "Contrast",
    "Equivalence",
    "Interval",
    "McNemar",
    "absolute_verdict",
    "bootstrap_seeds_images",
    "compare_to_paper",
    "delta_to_paper",
    "direction_verdict",
    "from_summaries",
    "holm",
    "interquartile_mean",
    "latency_median_interval",
    "mcnemar",
    "minimum_detectable_effect",
    "one_sample",
    "paired",
    "paired_images",
    "paired_interval",
    "probability_of_improvement",
    "ratio_of_medians_interval",
    "stratified_bootstrap",
    "summary_difference",
    "t_interval",
    "tost",
    "tost_power",
    "welch",
    "welch_interval",
    "wilson_interval",
]


def tost(
    a: Sequence[float],
    b: Sequence[float] | float,
    margin: float,
    design: str = "welch",
    alpha: float = 0.05,
) -> Equivalence:
    """Two one-sided tests that mean(a) and b differ by less than ``margin`` (Schuirmann 1987).

    ``design``: ``one_sample`` (b is a constant), ``welch`` (independent runs) or ``paired`` (by design).
    ``margin`` is a constant in the unit of the values. Against a paper's table use
    ``compare_to_paper(...).tost(margin)``.
    """
    designs = {"one_sample": one_sample, "welch": welch, "paired": paired}
    if design not in designs:
        raise ValueError(f"design must be one of {', '.join(designs)}; got {design!r}")
    if (design == "one_sample") != (np.ndim(b) == 0):
        raise ValueError(f"design {design!r} compares with {'a constant' if np.ndim(b) else 'a list of values'}")
    return designs[design](a, b).tost(margin, alpha)


def absolute_verdict(interval90: Interval, interval95: Interval, margin: float) -> str:
    """Decide "our value is the paper's" from the 90 % and 95 % intervals of (ours - paper).

    With d the estimate and m the margin, exactly one row holds (the first two exclude each other, because a
    90 % interval inside ±m has |d| < m):

    ==============================  =============  =======  ============
    90 % interval                   95 % interval  d        verdict
    ==============================  =============  =======  ============
    inside (-m, m)                  any            any      replicated
    reaches -m or m                 above 0        d > m    higher
    reaches -m or m                 below 0        d < -m   lower
    reaches -m or m                 any other combination   inconclusive
    ==============================  =============  =======  ============

    So a difference that is significant but small (95 % interval above 0, 90 % interval inside ±m) is a
    replication; one that is significant while its size may lie on either side of m is called by where the
    estimate lies. Errors that are bounded: "replicated" at most 5 % when the true difference is m or more;
    "higher" or "lower" at most 5 % together when it is zero. "higher" does not say that the difference
    provably exceeds m; for that look at the interval.
    """
    return _decide(interval90, interval95, checked_margin(margin), "replicated", "higher", "lower")


def direction_verdict(
    interval90: Interval, interval95: Interval, margin: float | None = None, direction: str = "higher"
) -> str:
    """Decide "A is ``direction`` than B" (orderings and deltas) from the intervals of (A - B).

    Without a margin the sign decides: supported if the 95 % interval lies on the claimed side of 0,
    contradicted if it lies on the other, else inconclusive. ``margin`` m is the smallest relevant difference;
    with it, for "higher" (the table is mirrored for "lower", so that the reverse claim always gets the
    reverse verdict):

    ==============================  =============  =======  ======================
    90 % interval                   95 % interval  d        verdict
    ==============================  =============  =======  ======================
    inside (-m, m)                  any            any      no relevant difference
    reaches -m or m                 above 0        d > m    supported
    reaches -m or m                 below 0        d < -m   contradicted
    reaches -m or m                 any other combination   inconclusive
    ==============================  =============  =======  ======================

    It is the table of `absolute_verdict` in other words. Two consequences are deliberate: an ordering that is
    significant but proven to be smaller than m is "no relevant difference", and one whose sign is clear while
    the estimate is below m (its size may be relevant or not) stays inconclusive: a paper is neither confirmed
    nor contradicted by a difference that the claim itself calls irrelevant.
    """
    if direction not in ("higher", "lower"):
        raise ValueError(f"direction must be 'higher' or 'lower', got {direction!r}")
    if direction == "lower":
        interval90, interval95 = interval90.reversed(), interval95.reversed()
    checked = None if margin is None else checked_margin(margin)
    return _decide(interval90, interval95, checked, "no relevant difference", "supported", "contradicted")


def _decide(
    interval90: Interval, interval95: Interval, margin: float | None, within: str, above: str, below: str
) -> str:
    if not (math.isclose(interval90.level, 0.90) and math.isclose(interval95.level, 0.95)):
        raise ValueError(f"verdicts need the 90 % and the 95 % interval, got {interval90.level} and {interval95.level}")
    estimate, relevant = interval95.estimate, margin or 0.0
    if any(map(math.isnan, (estimate, interval90.low, interval90.high, interval95.low, interval95.high))):
        raise ValueError("a verdict needs numbers: the estimate or a bound is NaN")
    if margin is not None and -margin < interval90.low and interval90.high < margin:
        return within
    if interval95.low > 0 and estimate > relevant:
        return above
    if interval95.high < 0 and estimate < -relevant:
        return below
    return "inconclusive"


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's (1979) step-down adjusted p values, in the order given; valid under any dependence."""
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p values must be a list of numbers between 0 and 1, got {p_values!r:.120}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test: images that only A or only B gets right, A's lead as a share, two-sided p value."""

    only_a: int
    only_b: int
    n: int
    difference: float
    p_value: float


def mcnemar(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> McNemar:
    """Exact (binomial) McNemar test of two models' 0/1 results on the same images.

    It compares these two trained models, not the methods behind them: the seeds' variance is not in it.
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError(f"mcnemar needs two equally long lists of 0/1, got shapes {a.shape} and {b.shape}")
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("mcnemar needs 0/1 per image; for shares of corruption cells use bootstrap_seeds_images")
    only_a, only_b = int(np.sum((a == 1) & (b == 0))), int(np.sum((a == 0) & (b == 1)))
    disagreements = only_a + only_b
    p_value = float(stats.binomtest(only_a, disagreements).pvalue) if disagreements else 1.0
    return McNemar(only_a, only_b, a.size, (only_a - only_b) / a.size, p_value)


def tost_power(
    sd: float,
    n: int,
    margin: float,
    true_difference: float = 0.0,
    paper_n: int | None = None,
    paper_sd: float | None = None,
    alpha: float = 0.05,
) -> float:
    """Chance that TOST concludes equivalence, for runs with standard deviation ``sd`` (unit of the margin).

    One-sample or paired (``sd`` of the differences) without ``paper_n``; Welch against a table of ``paper_n``
    runs with ``paper_sd`` (``sd`` when left out) otherwise. Integrates over the sample variances, so it is
    exact where the usual difference of two noncentral t probabilities turns negative, and it knows
    Satterthwaite's random df.
    """
    margin = checked_margin(margin)
    se, bound = _spread(sd, n, 1 - alpha, paper_sd, paper_n)
    half = margin - bound
    if se == 0:
        return float(abs(true_difference) < margin)
    inside = special.ndtr((half - true_difference) / se) - special.ndtr((-half - true_difference) / se)
    return float(np.mean(np.maximum(0.0, inside)))


def minimum_detectable_effect(
    sd: float,
    n: int,
    *,
    margin: float = 0.0,
    level: float = 0.95,
    power: float = 0.8,
    design: str = "welch",
    other_sd: float | None = None,
    other_n: int | None = None,
) -> float:
    """Smallest true difference that would be decided on its side with the given power.

    "Decided" is the rule of the verdicts: the ``level`` interval excludes 0 and the estimate lies beyond
    ``margin``. For margin 0 it is the noncentral t result. ``design``: ``one_sample``, ``paired`` (``sd`` of
    the differences) or ``welch`` with ``other_sd`` and ``other_n`` (equal to ours when left out). A single
    run detects nothing: infinity.
    """
    if design not in ("one_sample", "welch", "paired"):
        raise ValueError(f"design must be one of one_sample, welch, paired; got {design!r}")
    if design != "welch" and (other_sd is not None or other_n is not None):
        raise ValueError(f"other_sd and other_n belong to the design 'welch', not {design!r}")
    if not (0 < power < 1 and 0 < level < 1 and margin >= 0):
        raise ValueError(f"power and level must lie between 0 and 1, margin at 0 or above; got {power, level, margin}")
    if n == 1 or (design == "welch" and other_n == 1):
        return math.inf
    other = (other_sd, n if other_n is None else other_n) if design == "welch" else (None, None)
    se, bound = _spread(sd, n, 0.5 + level / 2, *other)
    if se == 0:
        return float(margin)
    needed = np.maximum(bound, margin)

    def shortfall(effect: float) -> float:
        return float(np.mean(special.ndtr((effect - needed) / se))) - power

    return float(optimize.brentq(shortfall, needed.min() - 10 * se, needed.max() + 10 * se))


def _spread(
    sd: float, n: int, quantile: float, other_sd: float | None, other_n: int | None, grid: int = 256
) -> tuple[float, np.ndarray]:
    """Return the true standard error and t quantile times estimated one, on a grid of sample variances.

    The grid points are equally likely (midpoints of chi-square quantiles), so a mean over them integrates.
    """
    if n < 2 or not sd >= 0 or (other_n is not None and other_n < 2) or (other_sd is not None and not other_sd >= 0):
        raise ValueError(f"power needs n >= 2 and sd >= 0, got sd={sd}, n={n}, other sd={other_sd}, n={other_n}")
    if other_n is None and other_sd is not None:
        raise ValueError("a second sd needs its n")
    u = (np.arange(grid) + 0.5) / grid
    ours = sd**2 / n * _chi_square_quantile(n - 1, u) / (n - 1)
    if other_n is None:
        return sd / math.sqrt(n), special.stdtrit(n - 1, quantile) * np.sqrt(ours)
    other_sd = sd if other_sd is None else other_sd
    theirs = other_sd**2 / other_n * _chi_square_quantile(other_n - 1, u) / (other_n - 1)
    first, second = np.meshgrid(ours, theirs)
    total = np.maximum(first + second, np.finfo(float).tiny)
    df = 1 / np.maximum((first / total) ** 2 / (n - 1) + (second / total) ** 2 / (other_n - 1), 1e-12)
    return math.sqrt(sd**2 / n + other_sd**2 / other_n), special.stdtrit(df, quantile) * np.sqrt(total)


def _chi_square_quantile(df: int, probability: np.ndarray) -> np.ndarray:
    return 2 * special.gammaincinv(df / 2, probability)
