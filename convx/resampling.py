"""Bootstrap intervals: seeds and images, aggregates over data sets, probability of improvement, ratios.

No torch. Meant to be read through `convx.statistics`, which re-exports it. Every function is a pure function
of its arguments and its ``seed``: the same bits at every call.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import stats

from convx.intervals import PERCENT, Interval, _level, _sample, wilson_interval

_CHUNK = 4_000_000  # resampled numbers held at once (32 MB)


def bootstrap_seeds_images(
    correct_SN: np.ndarray,
    other_SN: np.ndarray | None = None,
    *,
    paired_seeds: bool = False,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    scale: float = PERCENT,
) -> Interval:
    """Interval of a mean accuracy, or a difference of two, over populations of seeds *and* of test images.

    ``correct_SN`` is [seeds, images]: 0/1, or the share of an image's corruption cells that were right (cells
    of one image are not independent, so the image is the unit that is resampled). ``other_SN`` shares the
    images; with ``paired_seeds`` it shares the seeds row by row (by design), else its seeds are an
    independent sample.

    Why not simply resample rows and columns: with 3 to 6 seeds, resampled row means have only (S-1)/S of the
    seeds' variance and no heavier tails for not knowing it, which under-covers; resampling columns as well
    counts the seed by image noise twice, which over-covers where seeds hardly differ. Here each component is
    taken once:

    - seeds: R = s²(row means) / S, an unbiased estimate that already holds the interaction (of two
      independent sets of seeds: their sum). Its true value v is unknown, so it is drawn:
      v = R df / chi²(df), df = S - 1 (Satterthwaite's for two sets);
    - images: the image means are resampled, shrunk to b = s²(image means)/N - MSE/(SN), the images' own part
      (two-way analysis of variance, MSE = interaction mean square, b >= 0);
    - the sum of two variances, one known badly, is the Behrens-Fisher problem. Equal weights on the draws of
      v are Fisher's solution, too wide; weights (v + b) / v are the probability-matching prior of Ghosh and
      Kim (2001, Canadian Journal of Statistics 29), which holds for many seeds. In between, at the power 2/3,
      lies our choice: integrated exactly for normal data and every b / v, a nominal 95 % covers

      =======  ============  =============  ============
      seeds    Fisher        power 2/3      Ghosh-Kim
      =======  ============  =============  ============
      3        95.0 to 97.6  94.3 to 96.0   93.6 to 95.4
      4        95.0 to 96.8  94.8 to 95.7   94.4 to 95.2
      6        95.0 to 96.2  95.0 to 95.4   94.8 to 95.1
      2        95.0 to 98.8  92.2 to 96.5   90.4 to 95.5
      =======  ============  =============  ============

    Without seed variance this is the bootstrap over images; without image variance it is Student's interval
    over seeds. A single seed adds no seed variance, and ``method`` says so. Returns units of ``scale``
    (percent or pp).
    """
    first = _matrix(correct_SN, "correct_SN")
    groups = [first]
    if other_SN is not None:
        second = _matrix(other_SN, "other_SN")
        if second.shape[1] != first.shape[1] or (paired_seeds and second.shape != first.shape):
            raise ValueError(f"variants must share their images (and paired seeds); got {first.shape}, {second.shape}")
        groups = [first - second] if paired_seeds else [first, second]
    elif paired_seeds:
        raise ValueError("paired_seeds needs other_SN, the second variant")

    images = first.shape[1]
    seeds = [len(group) for group in groups]
    image_means_N = groups[0].mean(0) - (groups[1].mean(0) if len(groups) == 2 else 0.0)
    estimate = float(image_means_N.mean())
    if other_SN is None and np.all(first == first[0, 0]) and first[0, 0] in (0.0, 1.0):
        # No error (or no success) at all: nothing to resample, but the test set still bounds the accuracy.
        exact = wilson_interval(int(first[0, 0]) * images, images, level)
        method = f"Wilson over {images} images (all outcomes equal)"
        return Interval(exact.estimate * scale, exact.low * scale, exact.high * scale, level, seeds[0], method)

    components = [_components(group) for group in groups]
    column = float(image_means_N.var(ddof=1)) / images
    own = max(0.0, column - sum(interaction for _, interaction in components))
    rng = np.random.default_rng(seed)
    draws = _resampled_means(rng, image_means_N, resamples) - estimate
    draws *= math.sqrt(own / column) if column else 0.0
    weights = np.ones(resamples)
    parts = [(between, count - 1) for (between, _), count in zip(components, seeds) if between > 0]
    if parts:
        between = sum(part for part, _ in parts)
        df = between**2 / sum(part**2 / df for part, df in parts)  # Satterthwaite; S - 1 for one set of seeds
        variance = between * df / rng.chisquare(df, resamples)
        draws += np.sqrt(variance) * rng.standard_normal(resamples)
        weights = (1 + own / variance) ** (2 / 3)
    low, high = _weighted_quantiles(draws, weights, [0.5 - _level(level) / 2, 0.5 + level / 2]) + estimate
    text = f"{seeds[0]} paired seeds" if paired_seeds else " and ".join(map(str, seeds)) + " seed(s)"
    method = f"bootstrap over {text} and {images} images"
    if min(seeds) == 1:
        method += "; a single seed: its seed variance is not covered"
    return Interval(estimate * scale, float(low) * scale, float(high) * scale, level, sum(seeds), method)


def probability_of_improvement(
    a: np.ndarray | Sequence[float],
    b: np.ndarray | Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """P(a run of A beats a run of B), ties half (Mann-Whitney), with a percentile bootstrap over runs.

    ``a`` and ``b`` are [runs] or [runs, data sets]; several data sets are resampled each on its own and
    averaged (Agarwal et al. 2021, arXiv 2108.13264). When the runs are fully separated the bootstrap
    collapses to a point; the bound then is the exact one of k = min(runs) independent pairs that all agree,
    (alpha/2)^(1/k): 0.29 for k = 3.
    """
    a_ST, b_ST = (_columns(x, name) for x, name in ((a, "a"), (b, "b")))
    if a_ST.shape[1] != b_ST.shape[1]:
        raise ValueError(f"a and b must have the same data sets; got {a_ST.shape[1]} and {b_ST.shape[1]}")
    rng = np.random.default_rng(seed)
    estimate, draws = 0.0, np.zeros(resamples)
    tasks = a_ST.shape[1]
    for task in range(tasks):
        wins = (np.sign(a_ST[:, task, None] - b_ST[None, :, task]) + 1) / 2
        weight_a, weight_b = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in wins.shape)
        estimate += wins.mean() / tasks
        draws += np.einsum("ra,ab,rb->r", weight_a, wins, weight_b) / tasks
    low, high = np.quantile(draws, [0.5 - _level(level) / 2, 0.5 + level / 2])
    method = "percentile bootstrap over runs, ties half"
    pairs = min(len(a_ST), len(b_ST))
    if math.isclose(low, high) and (math.isclose(estimate, 1) or estimate == 0):
        bound = (0.5 - level / 2) ** (1 / pairs)
        low, high = (bound, 1.0) if estimate > 0.5 else (0.0, 1 - bound)
        method = f"exact bound of {pairs} independent pairs (runs fully separated)"
    return Interval(float(estimate), float(low), float(high), level, len(a_ST) + len(b_ST), method)


def interquartile_mean(values: np.ndarray | Sequence[float], axis: int | None = None) -> np.ndarray | float:
    """Mean of the middle half of the values (25 % trimmed from each side), over all or along ``axis``."""
    return stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=axis)


def stratified_bootstrap(
    scores: Sequence[Sequence[float]] | dict[str, Sequence[float]],
    statistic: Callable[..., np.ndarray] = interquartile_mean,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of an aggregate over data sets: runs are resampled within each data set, never across them.

    ``scores`` holds one list of runs a data set (comparable units); ``statistic`` reduces along ``axis``.
    Percentile interval (Agarwal et al. 2021, arXiv 2108.13264): meant for seeds x data sets, not for a single
    cell of few seeds.
    """
    strata = [_sample(runs, "scores") for runs in (scores.values() if isinstance(scores, dict) else scores)]
    if not strata:
        raise ValueError("scores must hold at least one data set")
    total = sum(map(len, strata))
    rng = np.random.default_rng(seed)
    draws = np.concatenate(
        [
            statistic(np.hstack([runs[rng.integers(0, len(runs), (size, len(runs)))] for runs in strata]), axis=1)
            for size in _chunks(resamples, total)
        ]
    )
    low, high = np.quantile(draws, [0.5 - _level(level) / 2, 0.5 + level / 2])
    estimate = float(statistic(np.concatenate(strata), axis=0))
    method = f"stratified percentile bootstrap over {len(strata)} data set(s)"
    return Interval(estimate, float(low), float(high), level, total, method)


def ratio_of_medians_interval(
    a: Sequence[float],
    b: Sequence[float],
    *,
    paired: bool = True,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of median(a) / median(b) for positive samples, e.g. latencies of a variant and its baseline.

    ``paired``: a[i] and b[i] were taken next to each other, so pairs are resampled (drift cancels); else each
    on its own.
    """
    x, y = _sample(a, "a"), _sample(b, "b")
    if (paired and x.size != y.size) or min(x.min(), y.min()) <= 0:
        raise ValueError(f"ratio of medians needs positive samples{', matched one to one' if paired else ''}")
    rng = np.random.default_rng(seed)
    draws = []
    for size in _chunks(resamples, x.size + y.size):
        first = rng.integers(0, x.size, (size, x.size))
        second = first if paired else rng.integers(0, y.size, (size, y.size))
        draws.append(np.median(x[first], axis=1) / np.median(y[second], axis=1))
    low, high = np.quantile(np.concatenate(draws), [0.5 - _level(level) / 2, 0.5 + level / 2])
    design = "interleaved pairs" if paired else "independent samples"
    method = f"percentile bootstrap of the ratio of medians, {design}"
    n = x.size if paired else x.size + y.size
    return Interval(float(np.median(x) / np.median(y)), float(low), float(high), level, n, method)


def _components(values_SN: np.ndarray) -> tuple[float, float]:
    """Return (s²(row means)/S, interaction mean square/(SN)), variances of the grand mean; 0 for one row."""
    S, N = values_SN.shape
    if S == 1:
        return 0.0, 0.0
    rows_S1 = values_SN.mean(1, keepdims=True)
    residual_SN = values_SN - rows_S1 - values_SN.mean(0) + rows_S1.mean()
    mean_square = float(np.square(residual_SN).sum()) / ((S - 1) * (N - 1))
    return float(rows_S1.var(ddof=1)) / S, mean_square / (S * N)


def _resampled_means(rng: np.random.Generator, values_N: np.ndarray, resamples: int) -> np.ndarray:
    """Return the means of ``resamples`` bootstrap samples of the images."""
    N = values_N.size
    values, counts = np.unique(values_N, return_counts=True)
    if len(values) <= N // 8:  # 0/1 results of a few seeds: drawing how often each mean occurs is cheaper
        draws = [rng.multinomial(N, counts / N, size=k) @ values / N for k in _chunks(resamples, len(values))]
    else:
        draws = [values_N[rng.integers(0, N, (k, N))].mean(1) for k in _chunks(resamples, N)]
    return np.concatenate(draws)


def _weighted_quantiles(draws: np.ndarray, weights: np.ndarray, probabilities: list[float]) -> np.ndarray:
    order = np.argsort(draws)
    mass = weights[order] / weights.sum()
    return np.interp(probabilities, np.cumsum(mass) - mass / 2, draws[order])


def _chunks(resamples: int, width: int) -> Iterator[int]:
    """Split ``resamples`` rows of ``width`` numbers so that each piece stays under `_CHUNK` numbers."""
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100 for an interval, got {resamples}")
    step = max(1, _CHUNK // max(1, width))
    return (min(step, resamples - start) for start in range(0, resamples, step))


def _matrix(values: np.ndarray, name: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 2 or not np.all((x >= 0) & (x <= 1)):
        raise ValueError(f"{name} must be [seeds, images] with at least two images and shares between 0 and 1")
    return x


def _columns(values: np.ndarray | Sequence[float], name: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or x.size == 0 or not np.all(np.isfinite(x)):
        raise ValueError(f"{name} must be finite numbers, [runs] or [runs, data sets]")
    return x
