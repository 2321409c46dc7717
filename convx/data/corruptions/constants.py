"""The severity constants of the corruption protocols, as data; standard library only.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR
2019) define 15 corruptions in five severities and four more for validation. The paper describes each
transform; the numbers stand in the authors' generators, and they are *three different sets*:

==================  ==========================================================================================
protocol            source of the constants
==================  ==========================================================================================
``imagenet_c``      the package ``imagecorruptions`` (bethgelab/imagecorruptions@c959e659), all 19
``cifar_c``         hendrycks/robustness ``ImageNet-C/create_c/make_cifar_c.py``, all 19
``tiny_imagenet_c`` hendrycks/robustness ``ImageNet-C/create_c/make_tinyimagenet_c.py``@8190fe32, all 19
==================  ==========================================================================================

A number made with one set must never be compared with a number made with another, and none of them is the
published archive: the generators set no seed (regenerating Tiny-ImageNet-C moves accuracy by about 10 points,
hendrycks/robustness#16). Hence every label says "regenerated".

``imagecorruptions`` took its constants from hendrycks/robustness ``make_imagenet_c.py`` (@e0377d46), by which
the archive ImageNet-C was made, and made them independent of the image size. It departs from it in
elastic_transform (no affine map, constants of its own), frost (pictures enlarged by 1.1, six instead of
five), the cut of enlarged images (corner instead of centre), the rounding of snow flakes, and pixelate
(nearest instead of box).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, field

MAIN = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The 15 corruptions that the mean corruption error averages, in the published order."""

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four validation corruptions; no mean includes them."""

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 32
"""Pixels. Below it, kernels and crops no longer mean what they meant where they were defined."""

ALGORITHM = 1
"""Version of the arithmetic. Raise it with every change that alters a bit of any corrupted image."""


@dataclass(frozen=True)
class Protocol:
    """One named set of constants.

    ``table[corruption]`` holds five constants (numbers or tuples). The remaining fields are the places in
    which the generators differ beyond their constants:

    - ``frost_scale``: factor on the frost pictures (bilinear), or None: 1.1 x the smallest scale that covers
      the image (bicubic).
    - ``frost_pictures``: how many of the six pictures can be drawn (the CIFAR and Tiny generators draw from
      five).
    - ``trim``: which part of an enlarged image is kept, its ``centre`` or its upper left ``corner``.
    - ``elastic``: ``smooth`` (a smoothed displacement field) or ``affine`` (random affine map, then the
      field).
    - ``enlarge``: Pillow filter by which a pixelated image is enlarged again, ``nearest`` or ``box``.
    - ``snow_layer``: ``before`` or ``after``: the flakes are quantised to 8 bits before or after their motion
      blur.
    """

    name: str
    label: str
    source: str
    table: dict[str, tuple] = field(repr=False)
    frost_scale: float | None
    frost_pictures: int
    trim: str
    elastic: str
    enlarge: str
    snow_layer: str

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Every corruption of the protocol: the 15 main ones first, then the extra ones that it defines."""
        return tuple(self.table)

    @property
    def digest(self) -> str:
        """sha256 (hex) over all constants, choices and the version of the arithmetic."""
        facts = {k: v for k, v in self.__dict__.items() if k not in ("label", "source")} | {"algorithm": ALGORITHM}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def constants(self, corruption: str, severity: int):
        """The constants of one cell; ValueError names the nearest corruption or the allowed severities."""
        if corruption not in self.table:
            raise ValueError(_unknown("corruption", corruption, self.corruptions) + f" (protocol {self.name})")
        if isinstance(severity, bool) or severity not in SEVERITIES:
            raise ValueError(f"severity {severity!r}: must be one of 1, 2, 3, 4, 5")
        return self.table[corruption][int(severity) - 1]


def _unknown(what: str, word: str, known) -> str:
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.4)
    return f"unknown {what} {word!r}: " + (f"did you mean {near[0]!r}?" if near else "known are " + ", ".join(known))


def _zoom(stop: float, step: float) -> tuple[float, float]:
    return (stop, step)  # zoom factors 1, 1 + step, ... below stop


IMAGENET_C = Protocol(
    name="imagenet_c",
    label="ImageNet-C constants, regenerated",
    source="bethgelab/imagecorruptions@c959e659 imagecorruptions/corruptions.py",
    frost_scale=None,
    frost_pictures=6,
    trim="corner",
    elastic="smooth",
    enlarge="nearest",
    snow_layer="after",
    table={
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, of a range of 1
        "shot_noise": (60, 25, 12, 5, 3),  # photons at white
        "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of altered values
        "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius px, sigma of its rim px
        "glass_blur": (
            (0.7, 1, 2),
            (0.9, 2, 1),
            (1, 2, 3),
            (1.1, 3, 2),
            (1.5, 4, 2),
        ),  # sigma, reach px, rounds
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # radius px, sigma px
        "zoom_blur": (
            _zoom(1.11, 0.01),
            _zoom(1.16, 0.01),
            _zoom(1.21, 0.02),
            _zoom(1.26, 0.02),
            _zoom(1.31, 0.03),
        ),
        # mean, sd of the flake field, its zoom, threshold, motion radius, motion sigma, share of the image
        # kept
        "snow": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),  # weights of image and frost
        "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),  # amount, decay of the roughness
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to V of HSV
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor about the mean
        # factor on the smoothed field; its smoothing 0.01 and its reach 0.005 are shares of the image side
        "elastic_transform": (12.5, 16.25, 21.25, 25.0, 30.0),
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # scale
        "jpeg_compression": (25, 18, 15, 10, 7),  # quality
        "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
        "gaussian_blur": (1, 2, 3, 4, 6),  # sigma px
        # mean, sd, smoothing, threshold of the liquid; strength (water) or smoothing (mud); 0 water, 1 mud
        "spatter": (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),  # S of HSV becomes factor * S + offset
    },
)

CIFAR_C = Protocol(
    name="cifar_c",
    label="CIFAR-C constants, regenerated",
    source="hendrycks/robustness ImageNet-C/create_c/make_cifar_c.py",
    frost_scale=0.2,
    frost_pictures=5,
    trim="centre",
    elastic="affine",
    enlarge="box",
    snow_layer="before",
    table={
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot_noise": (500, 250, 100, 75, 50),
        "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": (
            _zoom(1.06, 0.01),
            _zoom(1.11, 0.01),
            _zoom(1.16, 0.01),
            _zoom(1.21, 0.01),
            _zoom(1.26, 0.01),
        ),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        # displacement, its smoothing, reach of the affine map: shares of the image side (32 px where
        # published)
        "elastic_transform": (
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        "jpeg_compression": (80, 65, 58, 50, 40),
        "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
        "spatter": (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    },
)

TINY_IMAGENET_C = Protocol(
    name="tiny_imagenet_c",
    label="Tiny-ImageNet-C constants, regenerated",
    source="hendrycks/robustness ImageNet-C/create_c/make_tinyimagenet_c.py@8190fe32",
    frost_scale=0.3,
    frost_pictures=5,
    trim="centre",
    elastic="affine",
    enlarge="box",
    snow_layer="before",
    table={
        "gaussian_noise": (0.04, 0.08, 0.12, 0.15, 0.18),
        "shot_noise": (250, 100, 50, 30, 15),
        "impulse_noise": (0.01, 0.02, 0.05, 0.08, 0.14),
        "defocus_blur": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        "glass_blur": ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        "motion_blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        "zoom_blur": (
            _zoom(1.06, 0.01),
            _zoom(1.11, 0.01),
            _zoom(1.16, 0.01),
            _zoom(1.21, 0.01),
            _zoom(1.26, 0.01),
        ),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        "frost": ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
        "fog": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "elastic_transform": (
            (0, 0, 0.08),
            (0.05, 0.3, 0.06),
            (0.1, 0.08, 0.06),
            (0.1, 0.03, 0.03),
            (0.16, 0.03, 0.02),
        ),
        "pixelate": (0.9, 0.8, 0.7, 0.6, 0.5),
        "jpeg_compression": (65, 58, 50, 40, 25),
        "speckle_noise": (0.15, 0.2, 0.25, 0.3, 0.35),
        "gaussian_blur": (0.5, 0.75, 1, 1.25, 1.5),
        "spatter": (
            (0.62, 0.1, 0.7, 0.7, 0.6, 0),
            (0.65, 0.1, 0.8, 0.7, 0.6, 0),
            (0.65, 0.3, 1, 0.69, 0.6, 0),
            (0.65, 0.1, 0.7, 0.68, 0.6, 1),
            (0.65, 0.1, 0.5, 0.67, 0.6, 1),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
    },
)

PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (IMAGENET_C, CIFAR_C, TINY_IMAGENET_C)}
"""The regenerated protocols by name. The published archives are read by
``convx.data.corruptions.official``."""


def protocol_of(protocol: str | Protocol) -> Protocol:
    """The protocol of that name (or itself); ValueError with the nearest name otherwise."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        if protocol == "official":
            raise ValueError("corruption protocol 'official': read by open_official, it cannot be generated")
        raise ValueError(_unknown("corruption protocol", protocol, list(PROTOCOLS)))
    return PROTOCOLS[protocol]
