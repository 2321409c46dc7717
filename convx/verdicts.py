"""From a difference with its standard error to a verdict, and what many verdicts together allow. No torch."""

import math

import numpy as np
from scipy import optimize, special

from convx import statistics
from convx.statistics import Contrast, Interval

DECIDED = (
    *("replicated", "higher", "lower", "supported", "contradicted", "no relevant difference"),
    *("exact", "differs"),
)
VERDICTS = (*DECIDED, "inconclusive", "not comparable", "incomplete", "failed", "not run")
ALPHA = 0.05  # of one claim, and of the family of primary claims


def verdict_of(claim: dict, contrast: Contrast, measured95: Interval | None) -> dict:
    """Return verdict, intervals and p values of a difference whose null is 0."""
    margin, direction = claim["margin"], claim["direction"]
    inner, outer = contrast.interval(0.90), measured95 or contrast.interval(0.95)
    p_difference, p_equivalence = contrast.p_value(), contrast.tost(margin).p_value
    if claim["kind"] in ("absolute", "cost"):
        verdict = statistics.absolute_verdict(inner, outer, margin)
    elif direction == "not_lower":
        p_equivalence = contrast.tail(-margin, above=True)  # only "more than the margin below" is wrong
        verdict = "supported" if p_equivalence < ALPHA else "inconclusive"
        if outer.high < 0 and contrast.estimate < -margin:
            verdict = "contradicted"
    else:
        verdict = statistics.direction_verdict(inner, outer, margin, direction)
    return {
        "delta": contrast.estimate,
        "delta_ci_low": outer.low,
        "delta_ci_high": outer.high,
        "delta_ci90_low": inner.low,
        "delta_ci90_high": inner.high,
        "p_difference": p_difference,
        "p_equivalence": p_equivalence,
        "verdict": verdict,
        "method": contrast.method,
    }


def two_level(seeds: Contrast, a_SN: np.ndarray, b_SN: np.ndarray, together: bool) -> Contrast:
    """Return the contrast whose 90 and 95 % t intervals are as wide as those resampled over seeds and images.

    Two widths fix a standard error and a number of degrees of freedom, so that p values and intervals agree.
    """
    found = [
        statistics.bootstrap_seeds_images(a_SN, b_SN, paired_seeds=together, level=level, resamples=2000)
        for level in (0.90, 0.95)
    ]
    inner, outer = ((i.high - i.low) / 2 for i in found)
    if not outer:
        return seeds

    def excess(log_df: float) -> float:
        narrow, wide = (special.stdtrit(math.exp(log_df), q) for q in (0.95, 0.975))
        return float(narrow / wide) - inner / outer

    low, high = 0.0, math.log(1e6)  # the quotient of the quantiles grows with the degrees of freedom
    log_df = low if excess(low) >= 0 else high
    if excess(low) < 0 < excess(high):
        log_df = optimize.brentq(excess, low, high)
    df = math.exp(log_df)
    se = max(inner / float(special.stdtrit(df, 0.95)), outer / float(special.stdtrit(df, 0.975)))
    return Contrast(seeds.estimate, se, df, seeds.n, found[1].method)


def detectable(contrast: Contrast, margin: float) -> float:
    """Return the true difference that would be decided with 80 % power; infinite without a spread."""
    if not math.isfinite(contrast.se):
        return math.inf
    # A one-sample design with the standard error and degrees of freedom of this contrast.
    n = 1 + round(min(max(contrast.df, 1), 10_000))
    sd = contrast.se * math.sqrt(n)
    return statistics.minimum_detectable_effect(sd, n, margin=margin, design="one_sample")


def correct(rows: list[dict]) -> None:
    """Let a primary claim keep its verdict only if that survives Holm's correction over the measured ones.

    A claim has two null hypotheses that cannot both hold: "no difference" and "a relevant difference" (for
    `not_lower`: "more than the margin below"). One may be true although the other decided the claim, so plain
    Holm over the decisions made errs too often. Shaffer's (1986) form of that procedure takes them all: of m
    claims at most m null hypotheses are true, one less for each claim of which both are rejected.
    """
    family = [row for row in rows if row["role"] == "primary" and row.get("p_difference") is not None]
    adjusted = shaffer([(row["p_difference"], row["p_equivalence"]) for row in family])
    for row, (difference, equivalence) in zip(family, adjusted):
        favourable = ("replicated", "no relevant difference")
        if row["direction"] == "not_lower":
            favourable = ("supported",)
        row["holm_p"] = p = float(equivalence if row["verdict"] in favourable else difference)
        if row["verdict"] in DECIDED and p >= ALPHA:
            row["reason"] = f"{row['verdict']!r} alone, not among {len(family)} primary claims (Holm: p = {p:.2g})"
            row["verdict"] = "inconclusive"


def shaffer(pairs: list[tuple[float, float]]) -> np.ndarray:
    """Return the adjusted p values [m, 2] of m pairs of hypotheses of which at most one of a pair is true."""
    p = np.asarray(pairs, dtype=float).reshape(-1, 2)
    adjusted, rejected, largest = np.ones_like(p), np.zeros(len(p), int), 0.0
    for place in np.argsort(p, axis=None, kind="stable"):
        claim, which = divmod(int(place), 2)
        largest = max(largest, min(1.0, p[claim, which] * (len(p) - np.sum(rejected == 2))))
        adjusted[claim, which] = largest
        rejected[claim] += 1
    return adjusted
