"""`corrupt` and `corrupt_batch`: checks, grey images, blocks."""

from __future__ import annotations

import numpy as np

from convx.data.corruptions import filters, weather  # noqa: F401  (weather registers its transforms)
from convx.data.corruptions.constants import SMALLEST_SIDE, Protocol, protocol_of
from convx.data.corruptions.streams import Streams
from convx.data.corruptions.transforms import REGISTRY


def check_images(images_NHWC: np.ndarray) -> None:
    """ValueError unless uint8 [N, H, W, 1 or 3] with both sides of at least 32 px."""
    if not isinstance(images_NHWC, np.ndarray) or images_NHWC.dtype != np.uint8:
        kind = getattr(images_NHWC, "dtype", type(images_NHWC).__name__)
        raise ValueError(f"images to corrupt: {kind} given, a NumPy array of uint8 is needed")
    if images_NHWC.ndim != 4 or images_NHWC.shape[3] not in (1, 3):
        raise ValueError(f"images to corrupt: shape {images_NHWC.shape} given, [N, H, W, 1] or [N, H, W, 3] is needed")
    if min(images_NHWC.shape[1:3]) < SMALLEST_SIDE:
        height, width = images_NHWC.shape[1:3]
        raise ValueError(f"images to corrupt: {height} x {width} px, at least 32 x 32 are needed: raise image_size")


def to_grey(x_NHWC: np.ndarray) -> np.ndarray:
    """[N, H, W, 1] luma of uint8 RGB: ITU-R 601 weights in 16-bit fixed point, rounded (Pillow's mode L)."""
    r, g, b = (x_NHWC[..., i : i + 1].astype(np.uint32) for i in range(3))
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).astype(np.uint8)


def corrupt_batch(
    images_NHWC, corruption: str, severity: int, protocol: str | Protocol, indices, seed: int
) -> np.ndarray:
    """Corrupts a batch: uint8 [N, H, W, C] in, the same shape out.

    ``indices`` are the images' numbers in their data set (N of them): the random stream of an image is a
    function of (seed, protocol, corruption, severity, index) alone, so any batch, order or number of workers
    gives the same bits. Grey images (C = 1) are corrupted as RGB with three equal channels and turned back to
    one by ITU-R 601 luma. ValueError for unknown names, wrong types or shapes, images below 32 px and a wrong
    number of indices.
    """
    protocol = protocol_of(protocol)
    constants = protocol.constants(corruption, severity)
    check_images(images_NHWC)
    indices = [int(i) for i in indices]
    if len(indices) != len(images_NHWC):
        raise ValueError(f"indices: {len(indices)} given for {len(images_NHWC)} images")
    function, block_pixels = REGISTRY[corruption]
    _, height, width, channels = images_NHWC.shape
    block = max(1, block_pixels // (height * width))
    out = np.empty_like(images_NHWC, subok=False)
    for a in range(0, len(indices), block):
        x = np.ascontiguousarray(images_NHWC[a : a + block])
        if channels == 1:
            x = np.repeat(x, 3, axis=3)
        y = function(x, Streams(seed, protocol.name, corruption, severity, indices[a : a + block]), constants, protocol)
        out[a : a + block] = y if channels == 3 else to_grey(y)
    return out


def corrupt(
    image_HWC, corruption: str, severity: int, protocol: str | Protocol, seed: int, index: int = 0
) -> np.ndarray:
    """Corrupts one image, uint8 [H, W, 1 or 3]; ``index`` is its number in its data set. See
    `corrupt_batch`."""
    image_HWC = np.asarray(image_HWC)
    if image_HWC.ndim != 3:
        raise ValueError(f"image to corrupt: shape {image_HWC.shape} given, [H, W, 1] or [H, W, 3] is needed")
    return corrupt_batch(image_HWC[None], corruption, severity, protocol, [index], seed)[0]
