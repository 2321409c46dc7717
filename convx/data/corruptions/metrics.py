"""Mean corruption error: `mean_ce`, with AlexNet's errors as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from convx.data.corruptions.constants import MAIN

ALEXNET_ERROR = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
"""AlexNet's top-1 error (%) on ImageNet-C, mean over the five severities: hendrycks/robustness, as quoted in
google-research/augmix imagenet.py@202cf4c8. RobustBench's AlexNet differs by up to 0.6 pp (it resizes to 224
px without a crop and took 5,000 images), so its mCE is another quantity."""

ALEXNET_CLEAN_ERROR = 43.5
"""AlexNet's clean top-1 error (%). Recalled from the literature, UNVERIFIED: nothing but ``relative_mCE``
uses it."""

MCE_PROTOCOLS = ("imagenet_c", "official_imagenet_c")


def mean_ce(
    errors: Mapping[str, Sequence[float]], clean_error: float | None = None, protocol: str = "imagenet_c"
) -> dict[str, float]:
    """Mean corruption error against AlexNet (Hendrycks & Dietterich, 2019, section 4.1), in percent.

    CE_c = sum_s E_{s,c} / sum_s A_{s,c} over the five severities, mCE its mean over the 15 main corruptions;
    with the clean errors E_clean and A_clean taken off in numerator and denominator the relative mCE.

    errors: corruption -> five top-1 errors in percent, severities 1 to 5; corruptions beyond the 15 are
    ignored.
    clean_error: the model's clean top-1 error in percent; without it the result has no ``relative_mCE``.
    Returns ``{"mCE": ..., "relative_mCE": ...}``. The relative one rests on AlexNet's clean error of 43.5 %,
    which is recalled from the literature and unverified: do not compare it with published values to less than
    a few points. AlexNet's errors were taken on the published archive: on the regenerated ``imagenet_c``,
    whose elastic_transform differs from it (see `constants`), mCE compares models with each other, not with
    papers. ValueError for any protocol but ImageNet-C (AlexNet's errors mean nothing on other constants or
    images; the mean corruption error there is the plain mean), for missing corruptions and for anything but
    five errors within 0..100.
    """
    if protocol not in MCE_PROTOCOLS:
        raise ValueError(f"mCE: defined on ImageNet-C only, not on {protocol!r}; use mean_corruption_accuracy there")
    missing = [c for c in MAIN if c not in errors]
    if missing:
        raise ValueError(f"mCE: needs all 15 main corruptions, missing: {', '.join(missing)}")
    checked = [
        *((c, errors[c], 5) for c in MAIN),
        *([] if clean_error is None else [("clean_error", [clean_error], 1)]),
    ]
    for name, values, count in checked:
        if len(values) != count or not all(0 <= float(v) <= 100 for v in values):
            raise ValueError(f"mCE: {name}: {list(values)} given, {count} error(s) in percent (0..100) needed")

    def mean(values):
        return math.fsum(values) / len(values)

    ours = {c: mean([float(v) for v in errors[c]]) for c in MAIN}
    result = {"mCE": 100 * mean([ours[c] / ALEXNET_ERROR[c] for c in MAIN])}
    if clean_error is not None:
        gaps = [(ours[c] - clean_error) / (ALEXNET_ERROR[c] - ALEXNET_CLEAN_ERROR) for c in MAIN]
        result["relative_mCE"] = 100 * mean(gaps)
    return result
