"""Arrays inside a metrics file, as short text: results per image, which intervals resample, and small pictures.

Booleans are packed to bits, pictures are in half precision; everything is zlib-compressed and written in base64: 10,000
images take a few kilobytes.
"""

import base64
import zlib

import numpy as np

from convx.records import inflate


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
    n, packed = payload["n"], payload["dtype"] == "bool"
    raw = np.frombuffer(inflate(payload["data"], -(-n // 8) if packed else n), dtype=np.uint8)
    return np.unpackbits(raw, count=n).astype(bool) if packed else raw.copy()


def pack(array: np.ndarray) -> dict:
    """Return a float array of any shape as {"dtype", "shape", "data"}, in half precision (three digits, for pictures)."""
    array = np.asarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"a picture is an array of floats, this is {array.dtype}")
    raw = np.ascontiguousarray(array, dtype="<f2")
    data = base64.b64encode(zlib.compress(raw.tobytes(), 9)).decode()
    return {"dtype": "float16", "shape": list(array.shape), "data": data}


def unpack(payload: dict) -> np.ndarray:
    """Return the array that :func:`pack` was given, as float32 of half precision."""
    size = 2 * int(np.prod(payload["shape"], dtype=np.int64))
    raw = np.frombuffer(inflate(payload["data"], size), dtype="<f2")
    return raw.reshape(payload["shape"]).astype(np.float32)
