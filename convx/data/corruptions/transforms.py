"""Noise, blur and digital corruptions (Hendrycks & Dietterich, 2019), for batches.

A transform takes ``x`` (uint8 [N, H, W, 3]), ``streams`` (iterable: one generator per image, to be used up
before the next is asked for), the severity's constants ``c`` and the protocol; it returns uint8 [N, H, W, 3].
``REGISTRY`` maps names to (function, images per block): blocks keep the working set near the processor's
cache and never change a result.
"""

from __future__ import annotations

import functools
import itertools
from io import BytesIO

import numpy as np
from PIL import Image

from convx.data.corruptions import filters

REGISTRY: dict = {}


def transform(block_pixels: int = 1 << 15):
    """Registers a transform under its function's name, to be called on ``block_pixels`` pixels at a time."""

    def register(function):
        REGISTRY[function.__name__] = (function, block_pixels)
        return function

    return register


# ------------------------------------------------------------------------------------------------------ noise
def _normal(x, streams, scale):
    noise = np.empty(x.shape, np.float32)
    for layer, rng in zip(noise, streams, strict=True):
        rng.standard_normal(dtype=np.float32, out=layer)
    noise *= np.float32(scale)
    return noise


@transform()
def gaussian_noise(x, streams, c, protocol):
    """x + c e, with e standard normal per value."""
    y = _normal(x, streams, 255 * c)
    y += x
    return filters.to_uint8(y)


@transform()
def speckle_noise(x, streams, c, protocol):
    """x + x c e: multiplicative normal noise."""
    y = _normal(x, streams, c)
    y += np.float32(1)
    y *= x
    return filters.to_uint8(y)


@transform()
def shot_noise(x, streams, c, protocol):
    """Poisson(c x) / c for x in 0..1: photon counts with c photons at white."""
    rate = np.arange(256) / 255.0 * c
    y = np.empty(x.shape, np.float32)
    for image, out, rng in zip(x, y, streams, strict=True):
        out[:] = rng.poisson(rate[image])
    y *= np.float32(255 / c)
    return filters.to_uint8(y)


@transform()
def impulse_noise(x, streams, c, protocol):
    """A share c of all values becomes, evenly, 255 (salt) or 0 (pepper); one uniform draw decides both."""
    u = np.empty(x.shape, np.float32)
    for layer, rng in zip(u, streams, strict=True):
        rng.random(dtype=np.float32, out=layer)
    y = x.copy()
    y[u < np.float32(c)] = 0
    y[u < np.float32(c / 2)] = 255
    return y


# ------------------------------------------------------------------------------------------------------- blur
@transform()
def gaussian_blur(x, streams, c, protocol):
    """Gaussian of c px, edges continued."""
    return filters.to_uint8(filters.gaussian(x.astype(np.float32), c))


@transform()
def defocus_blur(x, streams, c, protocol):
    """Correlation with a softened disk of c[0] px."""
    return filters.to_uint8(filters.filter2d(x.astype(np.float32), filters.disk(*c)))


@transform()
def motion_blur(x, streams, c, protocol):
    """Gaussian-weighted path of 2 c[0] + 1 px at a random angle within 45 degrees of the rows.

    Where the path leaves the image the edge is continued, as ImageMagick does it; ``imagecorruptions`` breaks
    the sum off there and darkens images shorter than the path (32 px at severity 5 of ImageNet-C).
    """
    y = np.empty(x.shape, np.float32)
    for image, out, rng in zip(x, y, streams, strict=True):
        out[:] = filters.motion_blur(image, c[0], c[1], -45 + 90 * rng.random())
    return filters.to_uint8(y)


@transform()
def zoom_blur(x, streams, c, protocol):
    """Mean of the image and its enlargements by 1, 1 + step, ... below c[0] (the factor 1 counts again)."""
    stop, step = c
    factors = np.arange(1, stop, step)
    x = x.astype(np.float32)
    y = x.copy()
    for factor in factors:
        y += filters.enlarge(x, float(factor), protocol.trim)
    y /= np.float32(len(factors) + 1)
    return filters.to_uint8(y)


@functools.lru_cache(maxsize=16)
def _wavefronts(height: int, width: int, reach: int):
    """Schedule of the glass blur's walk: (position in the walk, bounds of the steps, index of the pixel).

    The definition visits pixels one after the other, from below right to above left, and lets each take the
    value of a neighbour at most ``reach`` away. Visits (row, column) with the same (below - row) (reach + 1)
    + (right - column) are too far apart to touch each other, and every visit that another depends on has a
    smaller sum, so they can be made at once.
    """
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    step = (np.arange(len(rows))[:, None] * (reach + 1) + np.arange(len(columns))[None, :]).ravel()
    order = np.argsort(step, kind="stable")
    bounds = np.searchsorted(step[order], np.arange(step.max() + 2))
    pixel = (rows[:, None] * width + columns[None, :]).ravel()[order]
    return order, bounds[np.concatenate([[True], np.diff(bounds) > 0])], pixel


@transform(block_pixels=1 << 18)
def glass_blur(x, streams, c, protocol):
    """Blur, c[2] rounds in which each pixel takes a random neighbour's value, blur.

    The generators meant to *swap* two pixels, but their assignment through array views makes it a copy: that,
    and not the swap, is what the published images show, and what is done here.
    """
    sigma, reach, rounds = c
    count, height, width, _ = x.shape
    order, bounds, pixel = _wavefronts(height, width, reach)
    shift = np.empty((count, rounds, len(order)), np.int32)  # where each visit takes its value from, relative
    for out, rng in zip(shift, streams, strict=True):
        step = rng.integers(-reach, reach, size=(rounds, len(order), 2), dtype=np.int8)  # column, row
        out[:] = (step[..., 1] * np.int32(width) + step[..., 0])[:, order]
    source = (shift + pixel.astype(np.int32)).transpose(1, 2, 0) * np.int32(count) + np.arange(count, dtype=np.int32)
    source = np.ascontiguousarray(source)

    start = np.zeros((count, height * width, 4), np.uint8)
    start[..., :3] = filters.to_uint8(filters.gaussian(x.astype(np.float32), sigma)).reshape(count, -1, 3)
    packed = np.ascontiguousarray(start.view(np.uint32)[..., 0].T)  # [pixels, N]: one word a pixel
    flat = packed.ravel()
    for of_round in source:
        for a, b in itertools.pairwise(bounds):
            packed[pixel[a:b]] = flat.take(of_round[a:b])
    walked = np.ascontiguousarray(packed.T).view(np.uint8).reshape(count, height, width, 4)[..., :3]
    return filters.to_uint8(filters.gaussian(walked.astype(np.float32), sigma))


# ---------------------------------------------------------------------------------------------------- digital
@transform()
def contrast(x, streams, c, protocol):
    """(x - m) c + m about the mean m of each channel."""
    pixels = x.shape[1] * x.shape[2]
    mean = x.sum(axis=(1, 2), keepdims=True, dtype=np.int64) / pixels  # whole numbers: exact in any order
    y = x.astype(np.float32)
    y *= np.float32(c)
    y += (mean * (1 - c)).astype(np.float32)
    return filters.to_uint8(y)


@transform()
def brightness(x, streams, c, protocol):
    """V of HSV grows by c (of 1) up to white; hue and saturation stay, so all channels scale by the same
    ratio."""
    value = x.max(axis=-1, keepdims=True).astype(np.float32)
    more = np.minimum(np.float32(255 * c), 255 - value)
    y = x * more
    with np.errstate(invalid="ignore"):
        y /= value
    y += x
    np.copyto(y, more, where=value == 0)  # black has no saturation and becomes grey
    return filters.to_uint8(y)


@transform()
def saturate(x, streams, c, protocol):
    """S of HSV becomes c[0] S + c[1], within 0..1; hue and value stay.

    With V the largest channel, a channel is V (1 - S f) with f given by the hue alone. Greys have no hue; as
    in the usual conversion they count as red, so an offset c[1] tints them.
    """
    factor, offset = c
    value = x.max(axis=-1, keepdims=True).astype(np.float32)
    spread = value - x.min(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        saturation = np.where(spread > 0, spread / value, np.float32(0))
        new = np.clip(saturation * np.float32(factor) + np.float32(offset), 0, 1)
        ratio = np.where(spread > 0, new / saturation, np.float32(0))
    y = value - (value - x) * ratio
    if offset:
        tint = np.where(spread == 0, value * new, np.float32(0))
        y[..., 1:] -= tint
    return filters.to_uint8(y)


@transform()
def pixelate(x, streams, c, protocol):
    """Shrinks to a share c of each side (mean of the box) and enlarges again."""
    height, width = x.shape[1:3]
    small = (int(width * c), int(height * c))
    back = {"nearest": Image.Resampling.NEAREST, "box": Image.Resampling.BOX}[protocol.enlarge]
    y = np.empty_like(x)
    for image, out in zip(x, y, strict=True):
        out[:] = Image.fromarray(image).resize(small, Image.Resampling.BOX).resize((width, height), back)
    return y


@transform()
def jpeg_compression(x, streams, c, protocol):
    """JPEG at quality c and back (Pillow's libjpeg, chroma halved)."""
    y = np.empty_like(x)
    for image, out in zip(x, y, strict=True):
        packed = BytesIO()
        Image.fromarray(image).save(packed, "JPEG", quality=c)
        out[:] = Image.open(packed)
    return y


@transform()
def elastic_transform(x, streams, c, protocol):
    """Stretches the image by a smooth random displacement; in the CIFAR and Tiny sets after a random affine
    map.

    ``smooth``: displacements uniform within 0.005 H, smoothed by 0.01 of each side, times c. ``affine``:
    corners of a square around the middle move by up to c[2] H each way; displacements uniform within 1,
    smoothed by c[1] H, times c[0] H. Positions are exact here; OpenCV's affine map rounds them to 1/32 px.
    """
    count, height, width, _ = x.shape
    grid_rows, grid_columns = (
        np.arange(height, dtype=np.float32)[:, None],
        np.arange(width, dtype=np.float32)[None, :],
    )
    affine = protocol.elastic == "affine"
    corners = np.empty((count, 3, 2))
    field = np.empty((2, count, height, width), np.float32)  # columns first, then rows: the order of the draws
    for n, rng in enumerate(streams):
        if affine:
            corners[n] = rng.random((3, 2))
        for part in field:
            rng.random(dtype=np.float32, out=part[n])
    field *= np.float32(2)
    field -= np.float32(1)

    y = x.astype(np.float32)
    if affine:
        strength, smoothing = c[0] * height, (c[1] * height, c[1] * height)
        rows, columns = _affine_positions((2 * corners - 1) * (c[2] * height), height, width)
        y = filters.bilinear(y, rows, columns, repeat_edge=False)
        if strength == 0:
            return filters.to_uint8(y)
    else:
        strength, smoothing = c * 0.005 * height, (0.01 * height, 0.01 * width)
    for part in field:
        for axis, sigma in zip((1, 2), smoothing, strict=True):
            part[:] = filters.line_gaussian(part, sigma, axis)
    field *= np.float32(strength)
    return filters.to_uint8(filters.bilinear(y, grid_rows + field[1], grid_columns + field[0], repeat_edge=True))


def _affine_positions(moves_N32: np.ndarray, height: int, width: int):
    """Positions [N, H, W] in the source image, under the affine map that moves three corners of a square by
    ``moves`` (x, y).

    The square has its centre in the middle of the image and half a side of a third of the shorter side.
    """
    centre, half = (width // 2, height // 2), min(height, width) // 3  # x, y
    low, high = [m - half for m in centre], [m + half for m in centre]
    from_32 = np.array([high, [high[0], low[1]], low], np.float64)
    to_N32 = from_32 + moves_N32
    along_x = (to_N32[:, 1] - to_N32[:, 2]) / (from_32[1, 0] - from_32[2, 0])  # image of the unit step in x: [N, 2]
    along_y = (to_N32[:, 0] - to_N32[:, 1]) / (from_32[0, 1] - from_32[1, 1])
    origin = to_N32[:, 2] - along_x * from_32[2, 0] - along_y * from_32[2, 1]
    a, c, b, d = along_x[:, 0], along_x[:, 1], along_y[:, 0], along_y[:, 1]
    determinant = a * d - b * c
    x = np.arange(width)[None, None, :] - origin[:, 0][:, None, None]
    y = np.arange(height)[None, :, None] - origin[:, 1][:, None, None]
    a, b, c, d = (v[:, None, None] for v in (a / determinant, b / determinant, c / determinant, d / determinant))
    return (a * y - c * x).astype(np.float32), (d * x - b * y).astype(np.float32)
