"""Closed-form intervals and contrasts: Student, Welch, paired, Wilson, a paper's table, medians. No torch.

Everything here is meant to be read through `convx.statistics`, which re-exports it. SciPy gives the
distributions; the standard error and the degrees of freedom are kept in a `Contrast`, because the 90 %
interval, the 95 % interval, the p value and the two one-sided tests of one comparison must all come from the
same two numbers.

One run has no spread. Such an interval is (-inf, inf), never an error and never a point: the tables always
build, and a verdict on it can only be `inconclusive`. Where nothing was trained there is no spread to know:
`paired_images` compares such networks over their test images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special, stats

PERCENT = 100.0  # accuracies are stored in percent: one is this many units


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    ``n`` counts the independent observations behind it (of two samples: their sum); ``method`` says in words
    how it was made and on which assumption; ``level`` is the nominal coverage.
    """

    estimate: float
    low: float
    high: float
    level: float
    n: int
    method: str

    def shifted(self, offset: float) -> "Interval":
        """Return the interval of (quantity + offset), e.g. a measured ratio minus the paper's ratio."""
        return replace(self, estimate=self.estimate + offset, low=self.low + offset, high=self.high + offset)

    def reversed(self) -> "Interval":
        """Return the interval of minus the quantity: b - a instead of a - b."""
        return replace(self, estimate=-self.estimate, low=-self.high, high=-self.low)


@dataclass(frozen=True)
class Equivalence:
    """Outcome of two one-sided tests (Schuirmann 1987).

    ``equivalent`` is ``p_value < alpha``; the same as ``interval`` (level 1 - 2 alpha) inside ±margin.
    """

    p_value: float
    interval: Interval
    margin: float
    alpha: float
    equivalent: bool
    method: str


@dataclass(frozen=True)
class Contrast:
    """A difference with its standard error and degrees of freedom, in the unit of the values."""

    estimate: float
    se: float
    df: float
    n: int
    method: str

    def interval(self, level: float = 0.95) -> Interval:
        """Return the two-sided t interval at ``level``."""
        half = self.se and float(special.stdtrit(self.df, 0.5 + _level(level) / 2)) * self.se
        return Interval(self.estimate, self.estimate - half, self.estimate + half, level, self.n, self.method)

    def tail(self, value: float, above: bool) -> float:
        """Return the one-sided p value of "the true difference is ``value``" against "above" (or below)."""
        distance = self.estimate - value if above else value - self.estimate
        return _upper_tail(distance, self.se, self.df)

    def p_value(self) -> float:
        """Return the two-sided p value of "the true difference is zero"."""
        return min(1.0, 2 * min(self.tail(0.0, above=True), self.tail(0.0, above=False)))

    def tost(self, margin: float, alpha: float = 0.05) -> Equivalence:
        """Two one-sided tests of "the true difference lies outside (-margin, margin)".

        ``margin`` is a constant in the unit of the values, fixed before the runs; it is never computed from
        them.
        """
        margin = checked_margin(margin)
        p_value = max(self.tail(-margin, above=True), self.tail(margin, above=False))
        interval = self.interval(1 - 2 * alpha)
        return Equivalence(p_value, interval, margin, alpha, p_value < alpha, f"TOST, {self.method}")


@dataclass(frozen=True)
class _SingleRun(Contrast):
    """One run against a point: score tests on its test images, and the Wilson interval that inverts them."""

    paper_value: float
    successes: int
    images: int
    scale: float

    def interval(self, level: float = 0.95) -> Interval:
        ours = wilson_interval(self.successes, self.images, level)
        low, high = ours.low * self.scale - self.paper_value, ours.high * self.scale - self.paper_value
        return Interval(self.estimate, low, high, level, 1, self.method)

    def tail(self, value: float, above: bool) -> float:
        null = min(1.0, max(0.0, (self.paper_value + value) / self.scale))
        distance = self.successes / self.images - null
        return _upper_tail(distance if above else -distance, math.sqrt(null * (1 - null) / self.images), math.inf)


@dataclass(frozen=True)
class _PairedImages(Contrast):
    """One pair of runs on the same images: score tests of a difference of paired proportions (Tango 1998)."""

    gained: int  # images that only the first has right
    lost: int  # images that only the second has right
    images: int
    scale: float

    def interval(self, level: float = 0.95) -> Interval:
        z = float(special.ndtri(0.5 + _level(level) / 2))
        share = self.estimate / self.scale
        ends = [  # the score falls through +-z once on either side of the estimate
            optimize.brentq(lambda at, sign=sign: self._score(at) - sign * z, *span) if span[0] < span[1] else share
            for sign, span in ((1, (-1 + 1e-9, share)), (-1, (share, 1 - 1e-9)))
        ]
        return Interval(self.estimate, ends[0] * self.scale, ends[1] * self.scale, level, self.images, self.method)

    def tail(self, value: float, above: bool) -> float:
        score = self._score(min(1.0, max(-1.0, value / self.scale)))
        return float(special.ndtr(-score if above else score))

    def _score(self, null: float) -> float:
        """Return (estimate - null) over its standard error under the null, whose lost share is the most likely one."""
        n, b, c = self.images, self.gained, self.lost
        linear = (2 * n - b + c) * null - b - c
        product = -c * null * (1 - null)
        lost = (math.sqrt(max(0.0, linear**2 - 8 * n * product)) - linear) / (4 * n)
        variance = n * (2 * lost + null * (1 - null))
        distance = b - c - n * null
        return (
            distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0
        )


def paired_images(a_N: Sequence[bool], b_N: Sequence[bool], scale: float = PERCENT) -> Contrast:
    """Contrast of two accuracies on the same images, which are its only chance: for networks that nothing was trained in.

    Tango's (1998) score interval for paired proportions, which has a width where not one image differs, and its one-sided tests.
    """
    a, b = np.asarray(a_N, dtype=bool), np.asarray(b_N, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"paired images must match one to one; got shapes {a.shape} and {b.shape}")
    n, gained, lost = a.size, int((a & ~b).sum()), int((b & ~a).sum())
    share = (gained - lost) / n
    se = max(gained + lost - n * share**2, 1.0) ** 0.5 / n  # where no image differs, as if one did: for the power alone
    method = f"Tango's score interval, {n} images of which {gained + lost} differ; nothing was trained, so no seeds"
    return _PairedImages(share * scale, se * scale, math.inf, 1, method, gained, lost, n, scale)


def one_sample(values: Sequence[float], constant: float = 0.0) -> Contrast:
    """Contrast of the mean of ``values`` with a constant (Student)."""
    x = _sample(values, "values")
    mean, sd = _mean_sd(x)
    return Contrast(mean - constant, sd / math.sqrt(x.size), max(1, x.size - 1), x.size, f"t, n={x.size}")


def paired(a: Sequence[float], b: Sequence[float]) -> Contrast:
    """Contrast mean(a - b) of values paired by design (same starting checkpoint or data order)."""
    x, y = _sample(a, "a"), _sample(b, "b")
    if x.size != y.size:
        raise ValueError(f"paired values must match one to one; got {x.size} and {y.size} (unpaired runs: use welch)")
    return replace(one_sample(x - y), method=f"paired t, n={x.size} pairs")


def welch(a: Sequence[float], b: Sequence[float]) -> Contrast:
    """Contrast mean(a) - mean(b) of independent samples, variances apart (Welch; Satterthwaite's df)."""
    x, y = _sample(a, "a"), _sample(b, "b")
    return from_summaries(*_mean_sd(x), x.size, *_mean_sd(y), y.size)


def from_summaries(mean1: float, sd1: float, n1: int, mean2: float, sd2: float, n2: int) -> Contrast:
    """Welch contrast mean1 - mean2 from sample sds; for printed standard errors give ``se * sqrt(n)``."""
    if min(n1, n2) < 1 or not (sd1 >= 0 and sd2 >= 0 and math.isfinite(mean1) and math.isfinite(mean2)):
        raise ValueError(f"summaries need finite means, sd >= 0 and n >= 1; got {(mean1, sd1, n1, mean2, sd2, n2)}")
    part1, part2 = (sd**2 / n if n > 1 else math.inf for sd, n in ((sd1, n1), (sd2, n2)))
    method = f"Welch t, n={n1} and {n2}"
    return _combined(mean1 - mean2, [(part1, n1 - 1), (part2, n2 - 1)], n1 + n2, method)


def compare_to_paper(
    values: Sequence[float],
    paper_value: float,
    paper_sd: float | None = None,
    paper_n: int | None = None,
    test_images: int | None = None,
    scale: float = PERCENT,
) -> Contrast:
    """Contrast of our runs with a printed number; ``method`` states which of these assumptions was used.

    ==============================  =====================================================================
    known                           contrast
    ==============================  =====================================================================
    paper sd and paper n >= 2       Welch from summaries
    test_images only                paper is a point; its binomial test-set variance added in quadrature
                                    (conservative: both were measured on the same images)
    none of them (not accuracy)     paper is a point without error: one-sample t
    one run of ours, test_images    Wilson interval of its test set only; seed variance is not covered
    one run of ours, no size        no interval: (-inf, inf)
    ==============================  =====================================================================

    ``values`` and ``paper_value`` share a unit in which certainty is ``scale`` (100 for percent).
    ``paper_sd`` is the sample sd over runs; without ``paper_n`` it says nothing about the error of the mean
    and is not used.
    """
    x = _sample(values, "values")
    mean, sd = _mean_sd(x)
    delta = mean - paper_value
    if test_images is not None:
        if test_images < 1:
            raise ValueError(f"test_images must be at least 1, got {test_images}")
        if not (0 <= paper_value <= scale and np.all((x >= 0) & (x <= scale))):
            raise ValueError(f"test_images is for accuracies between 0 and {scale:g}; leave it out for other metrics")
    if x.size == 1:
        if test_images is None:
            return Contrast(delta, math.inf, 1.0, 1, "n=1 and test-set size unknown: no interval")
        successes = round(x[0] / scale * test_images)
        size = f"Wilson, {test_images} images"
        method = f"n=1, test-set CI only ({size}); paper as a point; seed variance not covered"
        share = successes / test_images
        se = math.sqrt(share * (1 - share) / test_images) * scale
        return _SingleRun(delta, se, math.inf, 1, method, paper_value, successes, test_images, scale)
    if paper_sd is not None and paper_n is not None and paper_n >= 2:
        contrast = from_summaries(mean, sd, x.size, paper_value, paper_sd, paper_n)
        return replace(contrast, n=x.size, method=f"Welch t, ours n={x.size}, paper n={paper_n} with its sd")
    # A printed spread without n cannot be turned into an error of the mean, so both cases below ignore it.
    unknown = "n unknown" if paper_n is None else ("single run" if paper_n == 1 else "sd unknown")
    if test_images is None:
        method = f"t, n={x.size}; paper ({unknown}) as a point without error"
        return replace(one_sample(x, paper_value), method=method)
    share = paper_value / scale
    binomial = share * (1 - share) / test_images * scale**2
    method = f"t, n={x.size}; paper ({unknown}) as a point with the binomial SE of {test_images} test images"
    return _combined(delta, [(sd**2 / x.size, x.size - 1), (binomial, math.inf)], x.size, method)


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of ``values``; (-inf, inf) for a single value."""
    return one_sample(values).interval(level)


def welch_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Welch interval of mean(a) - mean(b), independent samples."""
    return welch(a, b).interval(level)


def summary_difference(
    mean1: float, sd1: float, n1: int, mean2: float, sd2: float, n2: int, level: float = 0.95
) -> Interval:
    """Welch interval of mean1 - mean2 from means, sample sd and n, e.g. of a paper's "mean ± sd (n)"."""
    return from_summaries(mean1, sd1, n1, mean2, sd2, n2).interval(level)


def paired_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Interval of mean(a - b) for values paired by design."""
    return paired(a, b).interval(level)


def delta_to_paper(
    values: Sequence[float],
    paper_value: float,
    paper_sd: float | None = None,
    paper_n: int | None = None,
    test_images: int | None = None,
    level: float = 0.95,
    scale: float = PERCENT,
) -> Interval:
    """Interval of (our mean - the paper's value); cases and assumptions as in `compare_to_paper`."""
    return compare_to_paper(values, paper_value, paper_sd, paper_n, test_images, scale).interval(level)


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (0 to 1): ``successes`` of ``n``."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval needs 0 <= successes <= n and n >= 1; got {successes} of {n}")
    bounds = stats.binomtest(int(successes), int(n)).proportion_ci(_level(level), method="wilson")
    return Interval(successes / n, float(bounds.low), float(bounds.high), level, int(n), f"Wilson, n={n}")


def latency_median_interval(samples: Sequence[float], level: float = 0.95) -> Interval:
    """Distribution-free interval of the median by order statistics (ranks from the binomial law).

    Takes independent samples; ``ValueError`` when there are too few for ``level`` (95 % needs six).
    """
    x = _sample(samples, "samples")
    bounds = stats.quantile_test(x, p=0.5).confidence_interval(_level(level))
    if not (math.isfinite(bounds.low) and math.isfinite(bounds.high)):
        raise ValueError(f"{x.size} samples are too few for a {level:.0%} interval of the median; take more (95 %: 6)")
    method = f"order statistics of the median, n={x.size}"
    return Interval(float(np.median(x)), float(bounds.low), float(bounds.high), level, x.size, method)


def checked_margin(margin: float) -> float:
    """Return ``margin`` as a float, or raise unless it is a finite number above zero."""
    if isinstance(margin, bool) or not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin must be a finite number above 0 in the metric's unit, got {margin}")
    return float(margin)


def _combined(estimate: float, parts: list[tuple[float, float]], n: int, method: str) -> Contrast:
    """Add independent (variance, df) of means: Satterthwaite's df; a known variance has df inf."""
    variance = sum(part for part, _ in parts)
    if not math.isfinite(variance):
        return Contrast(estimate, math.inf, 1.0, n, f"{method}; a single run has no spread")
    spread = sum((part / variance) ** 2 / df for part, df in parts) if variance else 0.0
    return Contrast(estimate, math.sqrt(variance), 1 / spread if spread else math.inf, n, method)


def _upper_tail(distance: float, se: float, df: float) -> float:
    """Return P(T_df >= distance / se); with se = 0 the sign of the distance decides."""
    if se == 0:
        return 0.5 if distance == 0 else float(distance < 0)
    return float(special.stdtr(df, -distance / se))


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1 (0.95 for 95 %), got {level}")
    return level


def _sample(values: Sequence[float], name: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or not np.all(np.isfinite(x)):
        raise ValueError(f"{name} must be a non-empty list of finite numbers, got {values!r:.120}")
    return x


def _mean_sd(x: np.ndarray) -> tuple[float, float]:
    """Return mean and sample sd; equal values have exactly no spread, one value an unknown (infinite) one."""
    if x.size == 1:
        return float(x[0]), math.inf
    if np.ptp(x) == 0:
        return float(x[0]), 0.0
    return float(x.mean()), float(x.std(ddof=1))
