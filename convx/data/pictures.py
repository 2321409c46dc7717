"""From a picture file to uint8 RGB: which files are read, and how each kind of pixel is converted.

=====================  ==================================================================================
grey, palette, CMYK,   as Pillow converts them to RGB (what torchvision's loaders do too)
YCbCr, LAB, 1 bit
16-bit grey            v / 257, rounded: the whole range of 16 bits is the whole range of 8
16-bit colour          Pillow reads its upper 8 bits
alpha                  dropped, as torchvision does: the colours below it count
several frames         the first
32-bit and float       an error: their range is not known
=====================  ==================================================================================
"""

import warnings

import numpy as np

MAX_PIXELS = 2**27  # of one picture, 400 MB as RGB; a small file can claim many more


def read_rgb(source, name: str):
    """Return the picture in ``source`` (a path or a binary file) as a Pillow RGB picture in its own size.

    ValueError with one line, which begins with ``name``, for what is no picture, is cut off, claims more than
    ``MAX_PIXELS`` pixels, or has pixels of an unknown range. The size is looked at before any pixel is decoded.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            with Image.open(source) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise ValueError(f"{width}x{height} pixels are more than the {MAX_PIXELS:,} that are read")
                if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
                    return Image.fromarray(_eight_bits(np.asarray(picture))).convert("RGB")
                if picture.mode in ("I", "F"):
                    raise ValueError(f"pixels of mode {picture.mode} have no known range; store 8 or 16 bits")
                return picture.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise a great many kinds
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{name}: cannot be read as an image ({words})") from None


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """uint16 grey -> uint8: 65535 / 257 = 255."""
    return ((np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
