"""Snow, frost, fog and spatter (Hendrycks & Dietterich, 2019); same signature as in ``transforms``."""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path

import cv2
import numpy as np

from convx.data.corruptions import filters
from convx.data.corruptions.transforms import transform

FROST_PICTURES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg", "frost6.jpg")


@transform()
def snow(x, streams, c, protocol):
    """Bleaches the image and adds flakes: an enlarged, thresholded normal field, blurred along a steep path,
    and that field turned by half a circle.

    c: mean and standard deviation of the field, its enlargement, its threshold, radius and sigma of the path,
    share of the image kept. The generators differ in where the flakes are rounded to 8 bits
    (``protocol.snow_layer``): before the motion blur, by truncation, and again by ImageMagick after it, or
    only after it. They also differ in the cut of the enlarged field.
    """
    mean, deviation, factor, threshold, radius, sigma, kept = c
    height, width = x.shape[1:3]
    field = np.empty((*x.shape[:3], 1), np.float32)
    angles = np.empty(len(x))
    for n, rng in enumerate(streams):
        rng.standard_normal(dtype=np.float32, out=field[n, ..., 0])
        angles[n] = -135 + 90 * rng.random()
    field *= np.float32(deviation)
    field += np.float32(mean)
    # imagecorruptions cuts the field to the image after its motion blur: the last rows see flakes beyond the
    # border
    flakes = filters.enlarge(field, float(factor), "none" if protocol.trim == "corner" else protocol.trim)
    flakes[flakes < threshold] = 0
    flakes = np.clip(flakes, 0, 1, out=flakes) * np.float32(255)
    if protocol.snow_layer == "before":
        flakes = np.floor(flakes)
    for n, angle in enumerate(angles):
        flakes[n] = filters.motion_blur(flakes[n], radius, sigma, angle)
    flakes = np.round(flakes[:, :height, :width])

    x = x.astype(np.float32)
    bleached = np.maximum(x, filters.luma(x) * np.float32(1.5) + np.float32(127.5))
    y = np.float32(kept) * x + np.float32(1 - kept) * bleached
    y += flakes
    y += flakes[:, ::-1, ::-1]
    return filters.to_uint8(y)


def _frost_folder() -> Path:
    """The pictures in the package ``imagecorruptions``; found without importing it, which takes seconds."""
    spec = importlib.util.find_spec("imagecorruptions")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("frost: needs the pictures of the package imagecorruptions; install imagecorruptions-imaug")
    return Path(spec.submodule_search_locations[0]) / "frost"


@functools.lru_cache(maxsize=64)
def _frost_picture(index: int, height: int, width: int, scale: float | None) -> np.ndarray:
    """uint8 RGB frost picture at the protocol's scale, a pixel or more larger than the image each way."""
    picture = cv2.imread(str(_frost_folder() / FROST_PICTURES[index]), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(
            f"{_frost_folder() / FROST_PICTURES[index]}: cannot be read; install imagecorruptions-imaug again"
        )
    tall, wide = picture.shape[:2]
    if scale is None:
        factor = 1.1 * max(1.0, height / tall, width / wide)
        size = math.ceil(wide * factor), math.ceil(tall * factor)
        picture = cv2.resize(picture, dsize=size, interpolation=cv2.INTER_CUBIC)
    else:
        factor = max(
            scale, (height + 1) / tall, (width + 1) / wide
        )  # larger images than the protocol's own still find room
        size = max(width + 1, round(wide * factor)), max(height + 1, round(tall * factor))
        picture = cv2.resize(picture, dsize=size, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(picture[..., ::-1])


@transform()
def frost(x, streams, c, protocol):
    """c[0] x + c[1] f, with f a random crop of a random frost picture of the package ``imagecorruptions``."""
    height, width = x.shape[1:3]
    frost_layer = np.empty_like(x)
    for out, rng in zip(frost_layer, streams, strict=True):
        which = int(rng.integers(0, protocol.frost_pictures))
        picture = _frost_picture(which, height, width, protocol.frost_scale)
        top = int(rng.integers(0, picture.shape[0] - height))
        left = int(rng.integers(0, picture.shape[1] - width))
        out[:] = picture[top : top + height, left : left + width]
    y = x * np.float32(c[0])
    y += frost_layer * np.float32(c[1])
    return filters.to_uint8(y)


def plasma(streams, count: int, size: int, decay: float) -> np.ndarray:
    """Diamond-square height maps [count, size, size] in 0..1 on a torus; ``size`` a power of two.

    Each level sets midpoints to the mean of their four neighbours plus w^2 U(-1, 1), then halves the step and
    divides w (100 at first) by ``decay`` (Fournier, Fussell & Carpenter, 1982).
    """
    draws = np.empty((count, size * size - 1), np.float32)
    for out, rng in zip(draws, streams, strict=True):
        rng.random(dtype=np.float32, out=out)
    draws *= np.float32(2)
    draws -= np.float32(1)

    height = np.zeros((count, size, size), np.float32)
    used, step, roughness = 0, size, 100.0

    def bump(neighbours):
        nonlocal used
        cells = neighbours.shape[1] * neighbours.shape[2]
        noise = draws[:, used : used + cells].reshape(neighbours.shape)
        used += cells
        neighbours *= np.float32(0.25)
        neighbours += noise * np.float32(roughness * roughness)
        return neighbours

    while step >= 2:
        half = step // 2
        corners = height[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        height[:, half::step, half::step] = bump(pairs + np.roll(pairs, -1, axis=2))
        middles = height[:, half::step, half::step]
        height[:, ::step, half::step] = bump(
            middles + np.roll(middles, 1, axis=1) + (corners + np.roll(corners, -1, axis=2))
        )
        height[:, half::step, ::step] = bump(
            middles + np.roll(middles, 1, axis=2) + (corners + np.roll(corners, -1, axis=1))
        )
        step, roughness = half, roughness / decay
    height -= height.min(axis=(1, 2), keepdims=True)
    height /= height.max(axis=(1, 2), keepdims=True)
    return height


@transform()
def fog(x, streams, c, protocol):
    """(x + c[0] f) m / (m + c[0]), f a plasma fractal of decay c[1], m the image's largest value, range 1."""
    height, width = x.shape[1:3]
    size = 1 << (max(height, width) - 1).bit_length()
    layer = plasma(streams, len(x), size, c[1])[:, :height, :width, None]
    brightest = x.max(axis=(1, 2, 3), keepdims=True).astype(np.float32)
    amount = np.float32(255 * c[0])
    y = x + layer * amount
    y *= brightest / (brightest + amount)
    return filters.to_uint8(y)


@transform()
def spatter(x, streams, c, protocol):
    """Drops of water (c[5] = 0) or mud (1) where a smoothed normal field exceeds c[3].

    Water: the field times a relief of the distance to the drops' edges, scaled to a largest value of c[4],
    times a pale turquoise, is added. Mud: brown replaces the image to the share of the smoothed (c[4] px)
    mask, where that is 0.8 or more. A field without any drop leaves the image as it is.
    """
    mean, deviation, smoothing, threshold, strength, is_mud = c
    y = np.empty(x.shape, np.float32)
    for image, out, rng in zip(x, y, streams, strict=True):
        field = np.float32(mean) + np.float32(deviation) * rng.standard_normal(image.shape[:2], dtype=np.float32)
        liquid = filters.gaussian(field[None, ..., None], smoothing)[0, ..., 0]
        liquid[liquid < threshold] = 0
        if is_mud:
            mask = (liquid > threshold).astype(np.float32)
            mask = filters.gaussian(mask[None, ..., None], strength)[0]
            mask[mask < 0.8] = 0
            out[:] = image * (1 - mask) + mask * np.array([63, 42, 20], np.float32)
        else:
            relief = _water_relief(np.clip(liquid * 255, 0, 255).astype(np.uint8))
            peak = relief.max()
            if peak > 0:
                relief *= np.float32(strength) / peak
            out[:] = image + relief[..., None] * np.array([175, 238, 238], np.float32)
    return filters.to_uint8(y)


def _water_relief(liquid_HW: np.ndarray) -> np.ndarray:
    """float32 [H, W]: the liquid times an embossed, equalised map of the distance to its edges (at most 20
    px)."""
    distance = cv2.distanceTransform(255 - cv2.Canny(liquid_HW, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, np.float32(20)), (3, 3)).astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, emboss)
    return liquid_HW * cv2.blur(relief, (3, 3)).astype(np.float32)
