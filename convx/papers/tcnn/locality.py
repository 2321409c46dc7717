"""What evaluator and figures share: the columns of a layer's heads, and the closed forms of how local a layer starts.

The standard library only.
"""

import math

HEADS = ("non_locality", "content_share", "centre_y", "centre_x", "span")  # columns of the arrays heads/<layer>


def distance_of_taps(heads: int) -> float | None:
    """Return the mean distance in pixels of the taps of a square kernel of odd side from its centre, or None for others.

    It is the non-locality of a recast layer at the start, where each head looks at its tap: 1.073 for 3x3.
    """
    side = math.isqrt(heads)
    if side * side != heads or side % 2 == 0:
        return None
    reach = range(-(side // 2), side // 2 + 1)
    return math.fsum(math.hypot(y, x) for y in reach for x in reach) / heads


def epsilon(alpha: float) -> float:
    """Return the positional attention that misses its pixel on an unbounded grid: ``1 - theta(alpha)^-2``.

    ``theta = sum over all n of exp(-alpha n^2)``; about ``4 exp(-alpha)`` from alpha = 4 on, the relative
    error of a layer.
    """
    reach = 1 + int(math.sqrt(745 / alpha))
    beside = 2 * math.fsum(math.exp(-alpha * n * n) for n in range(1, reach + 1))
    return -math.expm1(-2 * math.log1p(beside))
