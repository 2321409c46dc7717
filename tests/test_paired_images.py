"""Tango's score interval of two accuracies on the same images: against the likelihood, known cases, by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from convx import statistics as S


def images(gained, lost, n):
    """The contrast of two networks of which the first alone has ``gained`` images right, the second alone ``lost``."""
    a, b = np.zeros((2, n), bool)
    a[:gained], b[gained : gained + lost] = True, True
    return S.paired_images(a, b)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 300), st.floats(-40, 40), st.sampled_from([0.9, 0.95]))
@settings(max_examples=60, deadline=None)
def test_paired_images_by_maximum_likelihood(gained, lost, same, null, level):
    """The score under a null, its nuisance share found by maximising the likelihood; the interval holds what is not rejected."""
    n = gained + lost + same
    if not n:
        return
    d, contrast = null / 100, images(gained, lost, n)

    def unlikely(q):
        cells = ((gained, q + d), (lost, q), (same, 1 - 2 * q - d))
        return -sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

    span = (max(0.0, -d), (1 - d) / 2)
    q = optimize.minimize_scalar(unlikely, bounds=span, method="bounded", options={"xatol": 1e-12}).x
    variance = n * (2 * q + d - d * d)
    if variance > 1e-6:
        score = (gained - lost - n * d) / math.sqrt(variance)
        assert contrast.tail(null, above=True) == pytest.approx(stats.norm.sf(score), abs=2e-4)
    inside = contrast.interval(level)
    assert (
        inside.low <= contrast.estimate == pytest.approx(100 * (gained - lost) / n) and contrast.estimate <= inside.high
    )
    if abs(contrast.estimate) < 100:
        assert contrast.tail(inside.low, above=True) == pytest.approx((1 - level) / 2, rel=1e-4)
        assert contrast.tail(inside.high, above=False) == pytest.approx((1 - level) / 2, rel=1e-4)


def test_paired_images_known_cases():
    assert images(12, 2, 50).p_value() == pytest.approx(stats.chi2.sf(100 / 14, 1))  # at zero it is McNemar's test
    none = images(0, 0, 300).interval()
    z2 = stats.norm.ppf(0.975) ** 2
    assert (none.low, none.high) == pytest.approx((-100 * z2 / (300 + z2), 100 * z2 / (300 + z2)))
    assert images(2, 12, 50).interval().low == pytest.approx(-images(12, 2, 50).interval().high)
    whole = images(0, 5, 5)
    assert whole.interval().low == -100 and whole.estimate == -100
    with pytest.raises(ValueError, match="one to one"):
        S.paired_images([True], [True, False])


def test_paired_images_cover_the_truth():
    rng, n, inside = np.random.default_rng(0), 300, 0
    for gained, lost in rng.multinomial(n, [0.04, 0.06, 0.9], size=2000)[:, :2]:
        interval = images(int(gained), int(lost), n).interval(0.95)
        inside += interval.low <= -2 <= interval.high
    assert 0.94 < inside / 2000 < 0.965
