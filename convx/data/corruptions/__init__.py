"""Common corruptions of images (Hendrycks & Dietterich, ICLR 2019): regenerated and published sets.

>>> from convx.data.corruptions import PROTOCOLS, corrupt, build, open_corrupted
>>> y_HWC = corrupt(x_HWC, "fog", 3, "cifar_c", seed=0, index=17)
>>> build(x_NHWC, "cifar_c", None, None, "corrupted/cifar10", seed=0, workers=2)
>>> open_corrupted("corrupted/cifar10")["fog"].shape
(5, 10000, 32, 32, 3)

The transforms are written from the published definitions with the constants as data (`constants`); given the
constants of ImageNet-C and the same random numbers they agree with the package ``imagecorruptions`` to one
grey level, but for:

- **impulse_noise**: one random number a value instead of two (the same law).
- **motion_blur**: continues the image beyond its edge where that package stops summing, which darkens images
  that are shorter than the path (32 px at severity 5). ImageMagick, by which the archives were made, rounds
  to 8 bits between; this does not.
- **spatter**: a draw without any drop leaves the image as it is (a division by zero there).
- the arithmetic is float32 on 0..255 with a guard of 1/1024 before the final truncation, so that whole grey
  levels survive.

Importing this package imports neither torch, OpenCV nor SciPy; the first corruption does.
"""

from convx.data.corruptions.constants import EXTRA, MAIN, PROTOCOLS, SEVERITIES, Protocol, protocol_of
from convx.data.corruptions.metrics import ALEXNET_CLEAN_ERROR, ALEXNET_ERROR, mean_ce

_LAZY = {
    "corrupt": "engine",
    "corrupt_batch": "engine",
    "build": "store",
    "open_corrupted": "store",
    "CorruptedSet": "store",
    "open_official": "official",
    "verified_folder": "official",
    "ARCHIVES": "official",
}

__all__ = [
    "ALEXNET_CLEAN_ERROR",
    "ALEXNET_ERROR",
    "EXTRA",
    "MAIN",
    "PROTOCOLS",
    "SEVERITIES",
    "Protocol",
    "mean_ce",
    "protocol_of",
    *_LAZY,
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
