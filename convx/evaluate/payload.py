"""Per-image results inside a metrics file: arrays as short text, so that intervals can resample images from the JSON alone.

Booleans are packed to bits; everything is zlib-compressed and written in base64: 10,000 images take a few kilobytes.
"""

import base64
import zlib

import numpy as np


def encode(array: np.ndarray) -> dict:
    """Return a boolean or uint8 array [N] as {"dtype", "n", "data"}."""
    array = np.asarray(array)
    if array.ndim != 1 or array.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"a per-image payload is a bool or uint8 vector, this is {array.dtype} of shape {array.shape}")
    raw = np.packbits(array) if array.dtype == np.bool_ else array
    data = base64.b64encode(zlib.compress(raw.tobytes(), 9)).decode()
    return {"dtype": str(array.dtype), "n": len(array), "data": data}


def decode(payload: dict) -> np.ndarray:
    """Return the array that :func:`encode` was given."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(payload["data"])), dtype=np.uint8)
    if payload["dtype"] == "bool":
        return np.unpackbits(raw, count=payload["n"]).astype(bool)
    return raw.copy()
