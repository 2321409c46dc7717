"""Resizing and statistics of blocks of uint8 images [N, H, W, C]."""

import numpy as np


def resize_block(images_NHWC: np.ndarray, size: int) -> np.ndarray:
    """Resize a uint8 block [N, h, w, C] to [N, size, size, C], bilinear with Pillow (antialiased when it
    shrinks).
    """
    if images_NHWC.shape[1:3] == (size, size):
        return images_NHWC
    from PIL import Image

    n, _, _, channels = images_NHWC.shape
    out = np.empty((n, size, size, channels), np.uint8)
    for i, image_HWC in enumerate(images_NHWC):
        picture = Image.fromarray(image_HWC[..., 0] if channels == 1 else image_HWC)
        out[i] = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, channels)
    return out


def pixel_statistics(blocks) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation per channel, in 0..1, over all pixels of uint8 blocks [N, H, W, C].

    Exact: the sums run over integers.
    """
    count, total, squares = 0, 0, 0
    for block in blocks:
        for part in np.array_split(block, max(1, len(block) // 1000)):
            x = part.reshape(-1, part.shape[-1]).astype(np.int64)
            count, total, squares = count + len(x), total + x.sum(0), squares + (x * x).sum(0)
    mean = total / count
    return mean / 255, np.sqrt(squares / count - mean**2) / 255
