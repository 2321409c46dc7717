"""How fast corrupted sets are built, against a plain loop over ``imagecorruptions.corrupt`` on one core.

    python benchmarks/corruptions.py                        both protocols, about two minutes
    python benchmarks/corruptions.py --protocol cifar_c --repeats 5

Pairs: each repeat times the loop and then the build, in turn, on the same images, so that a busy machine
slows both; medians over the repeats. Times are per image, summed over the 15 corruptions and averaged over
the severities. The loop is timed on fewer images than the build (it has no start-up to spread). Two clocks:
wall time, which counts what a user waits, the start of the worker processes included; and processor time,
which other processes hardly disturb and which says what one core alone gains. The package always uses
ImageNet-C's constants: it has no others. Against ``cifar_c`` the loop is what one would run without convx.

Targets on two cores: imagenet_c at 224 px at least 1.8x, cifar_c at 32 px at least 5x (wall time).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
import warnings

import cv2
import imagecorruptions
import numpy as np
from PIL import Image

from convx.data.corruptions import MAIN, SEVERITIES, build, corrupt_batch

# protocol: (side in px, images for the build, images for the loop, images for the one-core table, target)
SETTINGS = {"imagenet_c": (224, 48, 3, 8, 1.8), "cifar_c": (32, 4000, 30, 256, 5.0)}


def make_images(count: int, side: int) -> np.ndarray:
    """Smooth random scenes with a little grain: all transforms have something to do, JPEG included."""
    rng = np.random.default_rng(0)
    out = np.empty((count, side, side, 3), np.uint8)
    for image in out:
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        scene = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        image[:] = np.clip(scene + rng.integers(-8, 9, scene.shape), 0, 255)
    return out


def processor_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def timed(function) -> tuple[float, float]:
    """(wall, processor) seconds; the processor time of child processes counts once they have ended."""
    wall, processor = time.perf_counter(), processor_seconds()
    function()
    return time.perf_counter() - wall, processor_seconds() - processor


def package_loop(images: np.ndarray, corruption: str) -> None:
    for severity in SEVERITIES:
        for image in images:
            imagecorruptions.corrupt(image, severity=severity, corruption_name=corruption)


def ours_on_one_core(images: np.ndarray, corruption: str, protocol: str) -> None:
    for severity in SEVERITIES:
        corrupt_batch(images, corruption, severity, protocol, range(len(images)), 0)


def build_set(images: np.ndarray, protocol: str, workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        build(images, protocol, MAIN, SEVERITIES, folder, seed=0, workers=workers, progress=False)


def compare(protocol: str, repeats: int, workers: int) -> float:
    side, build_count, loop_count, table_count, target = SETTINGS[protocol]
    images = make_images(build_count, side)
    for corruption in MAIN:  # compile and load what either side compiles and loads at first use
        package_loop(images[:1], corruption)
        ours_on_one_core(images[:1], corruption, protocol)

    def per_image(seconds: float, count: int) -> float:
        return 1000 * seconds / count / len(SEVERITIES)

    loop_ms = {c: [] for c in MAIN}
    ours_ms = {c: [] for c in MAIN}
    loop_walls, build_walls, build_processors = [], [], []
    for _ in range(repeats):
        wall_sum = 0.0
        for corruption in MAIN:
            wall, processor = timed(lambda c=corruption: package_loop(images[:loop_count], c))
            loop_ms[corruption].append(per_image(processor, loop_count))
            wall_sum += per_image(wall, loop_count)
            _, processor = timed(lambda c=corruption: ours_on_one_core(images[:table_count], c, protocol))
            ours_ms[corruption].append(per_image(processor, table_count))
        loop_walls.append(wall_sum)
        wall, processor = timed(lambda: build_set(images, protocol, workers))
        build_walls.append(per_image(wall, build_count))
        build_processors.append(per_image(processor, build_count))

    print(f"\n{protocol}, {side} x {side} px, medians of {repeats}; one core, processor time, ms an image")
    print(f"{'corruption':<20}{'package':>10}{'convx':>10}{'ratio':>8}")
    for corruption in MAIN:
        a, b = statistics.median(loop_ms[corruption]), statistics.median(ours_ms[corruption])
        print(f"{corruption:<20}{a:>10.3f}{b:>10.3f}{a / b:>8.1f}")
    loops = [sum(loop_ms[c][r] for c in MAIN) for r in range(repeats)]
    ours = [sum(ours_ms[c][r] for c in MAIN) for r in range(repeats)]
    ratio = statistics.median(a / b for a, b in zip(loops, ours, strict=True))
    print(f"{'sum of the 15':<20}{statistics.median(loops):>10.3f}{statistics.median(ours):>10.3f}{ratio:>8.1f}")

    whole = [a / b for a, b in zip(loop_walls, build_walls, strict=True)]
    print(
        f"set of {build_count} images built by {workers} workers, wall time: "
        f"{statistics.median(build_walls):.3f} ms an image and severity,"
    )
    print(
        f"  {statistics.median(whole):.1f}x the loop "
        f"(each repeat: {', '.join(f'{r:.1f}' for r in whole)}; target {target}x)"
    )
    processor_ratio = statistics.median(a / b for a, b in zip(loops, build_processors, strict=True))
    print(f"  {processor_ratio:.1f}x by processor time of all processes together")
    return statistics.median(whole) / target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--protocol", choices=list(SETTINGS), help="one of them only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the package's deprecations
    cv2.setNumThreads(1)
    margins = [
        compare(protocol, arguments.repeats, arguments.workers)
        for protocol in SETTINGS
        if arguments.protocol in (None, protocol)
    ]
    raise SystemExit(0 if min(margins) >= 1 else "a target was missed")


if __name__ == "__main__":
    main()
