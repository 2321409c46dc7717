"""Filters and resampling on batches of images, shared by the transforms.

All work on float32 [N, H, W, C] in grey levels 0..255 and give each image the same bits whatever stands
beside it: sums run in a fixed order, no BLAS, and what has data-dependent tiling (the FFT path of OpenCV's
filter) is called image by image.
"""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np
from scipy import ndimage

GUARD = np.float32(2**-10)
"""Added before the truncation to 8 bits (the generators truncate, they do not round). Where the exact result
is a whole grey level, as on flat regions, rounding errors must not push it one level down."""

LIGHTEST_TAP = 1e-8
"""Filter taps below this share are left out: together they move a pixel by less than 0.0001 grey levels."""


def to_uint8(y: np.ndarray) -> np.ndarray:
    """Clips to 0..255 and truncates; overwrites its float32 argument."""
    y += GUARD
    np.clip(y, 0, 255, out=y)
    return y.astype(np.uint8)


def luma(x_NHWC: np.ndarray) -> np.ndarray:
    """[N, H, W, 1] grey values of RGB floats, ITU-R 601 weights."""
    r, g, b = (x_NHWC[..., i : i + 1] for i in range(3))
    return r * np.float32(0.299) + g * np.float32(0.587) + b * np.float32(0.114)


# ---------------------------------------------------------------------------------------------- gaussian blur
@functools.lru_cache(maxsize=64)
def gaussian_taps(sigma: float, truncate: float) -> np.ndarray:
    """Normalised taps [2 r + 1], r = int(truncate * sigma + 0.5); one tap for sigma 0."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return np.ones(1)
    taps = np.array([math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)])
    return taps / math.fsum(taps)


def gaussian(x_NHWC: np.ndarray, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> np.ndarray:
    """Separable gaussian blur over H and W; ``mode`` as in scipy.ndimage (nearest, reflect)."""
    taps = gaussian_taps(float(sigma), float(truncate))
    radius = len(taps) // 2
    if radius == 0:
        return x_NHWC.astype(np.float32)
    for axis in (1, 2):
        if radius > 4:  # scipy's line filter wins over shifted sums from here on
            x_NHWC = ndimage.correlate1d(x_NHWC, taps, axis=axis, output=np.float32, mode=mode)
            continue
        pad = [(0, 0)] * 4
        pad[axis] = (radius, radius)
        x_pad = np.pad(x_NHWC, pad, mode="edge" if mode == "nearest" else "symmetric")
        size = x_NHWC.shape[axis]
        part = [x_pad[:, i : i + size] if axis == 1 else x_pad[:, :, i : i + size] for i in range(len(taps))]
        y = part[radius] * np.float32(taps[radius])
        for i in range(1, radius + 1):
            pair = part[radius - i] + part[radius + i]
            pair *= np.float32(taps[radius + i])
            y += pair
        x_NHWC = y
    return x_NHWC


# ---------------------------------------------------------------------------------------------------- defocus
@functools.lru_cache(maxsize=64)
def disk(radius: float, rim: float) -> np.ndarray:
    """The out-of-focus kernel, float32: a disk of ``radius`` px softened by a gaussian of ``rim`` px.

    The disk is drawn on at least 17 x 17 points; empty outer rows are cut off, so that small disks are cheap.
    As in the generators, a disk that touches the border of that grid (8 and 10 px) is softened with the
    border mirrored and not normalised again: its taps sum to 1.013 and 1.011, so these severities brighten a
    little.
    """
    reach = 8 if radius <= 8 else int(radius)
    grid = np.arange(-reach, reach + 1)
    kernel = (grid[:, None] ** 2 + grid[None, :] ** 2 <= radius**2).astype(np.float32)
    kernel /= kernel.sum()
    kernel = cv2.GaussianBlur(kernel, ksize=(3, 3) if radius <= 8 else (5, 5), sigmaX=rim)
    kernel[kernel < LIGHTEST_TAP] = 0
    cut = reach - max(int(np.abs(grid[kernel.any(axis=1)]).max()), 0)
    return kernel[cut : kernel.shape[0] - cut, cut : kernel.shape[1] - cut].copy()


def filter2d(x_NHWC: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """2-D correlation with a centred odd kernel, borders mirrored without repeating the edge pixel."""
    radius, (height, width) = kernel.shape[0] // 2, x_NHWC.shape[1:3]
    taps = [(i, j, kernel[i, j]) for i in range(kernel.shape[0]) for j in range(kernel.shape[1]) if kernel[i, j]]
    if (
        len(taps) > 40
    ):  # many taps: OpenCV filters through the FFT, in float64 since its rounding depends on the processor
        y = [cv2.filter2D(x, cv2.CV_64F, kernel, borderType=cv2.BORDER_REFLECT_101) for x in x_NHWC.astype(np.float64)]
        return np.stack(y).astype(np.float32)
    x_pad = np.pad(x_NHWC, ((0, 0), (radius, radius), (radius, radius), (0, 0)), mode="reflect")
    y, scratch = np.zeros_like(x_NHWC), np.empty_like(x_NHWC)
    for i, j, weight in taps:
        y += np.multiply(x_pad[:, i : i + height, j : j + width], weight, out=scratch)
    return y


# ----------------------------------------------------------------------------------------------------- motion
@functools.lru_cache(maxsize=64)
def motion_taps(radius: int, sigma: float) -> tuple[float, ...]:
    """One-sided gaussian weights along the path, 2 radius + 1, normalised (ImageMagick's motion blur)."""
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    total = math.fsum(weights)
    return tuple(w / total for w in weights)


def motion_blur(x_HWC: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Blurs one image along a straight path that starts at each pixel; edges are continued outwards.

    Step i looks up the pixel round(i sin a) rows below and round(i cos a) columns to the right, halves
    rounded down, for the angle a.
    """
    height, width = x_HWC.shape[:2]
    along_x, along_y = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    steps: dict[tuple[int, int], float] = {}
    for i, weight in enumerate(motion_taps(radius, sigma)):
        if weight >= LIGHTEST_TAP:
            where = (
                math.ceil(i * along_y - 0.5),
                math.ceil(i * along_x - 0.5),
            )  # row, column that is looked up
            steps[where] = steps.get(where, 0.0) + weight
    top, left = max(0, -min(s[0] for s in steps)), max(0, -min(s[1] for s in steps))
    below, right = max(0, max(s[0] for s in steps)), max(0, max(s[1] for s in steps))
    x_pad = cv2.copyMakeBorder(x_HWC, top, below, left, right, cv2.BORDER_REPLICATE)
    x_pad = x_pad.reshape(height + top + below, width + left + right, -1)
    y = np.zeros(x_HWC.shape, np.float32)
    scratch = np.empty_like(y)
    for (row, column), weight in steps.items():
        window = x_pad[top + row : top + row + height, left + column : left + column + width]
        y += np.multiply(window, np.float32(weight), out=scratch)
    return y


# ---------------------------------------------------------------------------------------- enlarging, sampling
@functools.lru_cache(maxsize=512)
def _enlarging(size: int, factor: float, trim: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower neighbour, upper neighbour, weight of the upper one for the output points along one axis.

    The middle ceil(size / factor) pixels are spread linearly, end point on end point, over round(... *
    factor) points, of which the first (``corner``) or the middle (``centre``) ``size`` or all (``none``) are
    kept.
    """
    inner = math.ceil(size / factor)
    outer = round(inner * factor)
    skip = (outer - size) // 2 if trim == "centre" else 0
    kept = outer if trim == "none" else size
    position = np.arange(skip, skip + kept) * ((inner - 1) / (outer - 1))
    low = np.minimum(position.astype(np.intp), inner - 2)
    first = (size - inner) // 2
    return first + low, first + low + 1, (position - low).astype(np.float32)


def enlarge(x_NHWC: np.ndarray, factor: float, trim: str) -> np.ndarray:
    """Zooms into the middle by ``factor`` (bilinear); same shape out, or a little more with trim none."""
    low, high, weight = _enlarging(x_NHWC.shape[1], factor, trim)
    y, upper = x_NHWC.take(low, axis=1), x_NHWC.take(high, axis=1)
    upper -= y
    upper *= weight[:, None, None]
    y += upper
    low, high, weight = _enlarging(x_NHWC.shape[2], factor, trim)
    z, upper = y.take(low, axis=2), y.take(high, axis=2)
    upper -= z
    upper *= weight[:, None]
    z += upper
    return z


def _fold(index: np.ndarray, size: int, repeat_edge: bool) -> np.ndarray:
    """Mirrors whole positions into 0..size-1, repeating the edge pixel (c b a a b c) or not (c b a b c)."""
    period = 2 * size if repeat_edge else 2 * size - 2
    index = np.mod(index, period)
    return np.minimum(index, (2 * size - 1 if repeat_edge else period) - index)


def bilinear(x_NHWC: np.ndarray, rows_NHW: np.ndarray, columns_NHW: np.ndarray, repeat_edge: bool) -> np.ndarray:
    """Samples each image at real positions (float32); outside, the image is mirrored."""
    count, height, width, channels = x_NHWC.shape
    flat = x_NHWC.reshape(count * height * width, channels)
    row, column = np.floor(rows_NHW), np.floor(columns_NHW)
    down, right = (rows_NHW - row)[..., None], (columns_NHW - column)[..., None]
    row, column = row.astype(np.int32), column.astype(np.int32)
    start = (np.arange(count, dtype=np.int32) * (height * width))[:, None, None]
    row_0 = _fold(row, height, repeat_edge) * np.int32(width) + start
    row_1 = _fold(row + 1, height, repeat_edge) * np.int32(width) + start
    column_0, column_1 = _fold(column, width, repeat_edge), _fold(column + 1, width, repeat_edge)
    y, side = flat.take(row_0 + column_0, axis=0), flat.take(row_0 + column_1, axis=0)
    side -= y
    side *= right
    y += side
    below, side = flat.take(row_1 + column_0, axis=0), flat.take(row_1 + column_1, axis=0)
    side -= below
    side *= right
    below += side
    below -= y
    below *= down
    y += below
    return y


def line_gaussian(x_NHW: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    """Gaussian blur along one axis, mirrored with the edge pixel repeated, cut off at three sigma."""
    return ndimage.correlate1d(x_NHW, gaussian_taps(float(sigma), 3.0), axis=axis, output=np.float32, mode="reflect")
