"""DCLS speed on a CPU: kernel construction against the authors' package, application against ``F.conv2d``,
folding.

    python benchmarks/dcls.py [--quick] [--threads 1] [--rounds 7]

Everything is paired: both sides run in turn in one process, in an order drawn anew each round. A row shows
the median of the per-round ratios (reference / convx; above 1, convx is faster) with its range over the
rounds, the ratio of the fastest rounds, which a busy machine disturbs least, and the medians in ms. The first
part needs the package ``dcls``.
"""

import argparse
import logging
import platform
import random
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from convx.layers.dcls import DCLSConv2d
from convx.layers.dcls_kernels import build_kernel
from convx.layers.depthwise import depthwise_conv2d, method_for

CONSTRUCTIONS = [
    ("bilinear", "v0", 384, 34, 17),
    ("gauss", "gauss", 384, 26, 23),
    ("triangle", "max", 384, 26, 23),
]
APPLICATIONS = [
    (64, 256, 8, 17),
    (64, 128, 16, 17),
    (32, 64, 32, 17),
    (64, 256, 8, 7),
    (64, 128, 16, 7),
    (32, 64, 32, 7),
]


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def paired(reference, ours, rounds: int, inner: int = 1) -> dict[str, float]:
    """Time two functions in turn; ``inner`` calls of ``ours`` count as one sample, divided by their
    number."""
    sides = {"reference": (reference, 1), "ours": (ours, inner)}
    samples = {side: [] for side in sides}
    order, rng = list(sides), random.Random(0)
    for i in range(rounds + 1):
        rng.shuffle(order)
        for side in order:
            run, calls = sides[side]
            start = time.perf_counter()
            for _ in range(calls):
                run()
            if i:  # the first round warms up
                samples[side].append((time.perf_counter() - start) / calls * 1e3)
    ratios = sorted(a / b for a, b in zip(samples["reference"], samples["ours"]))
    return {
        "ratio": statistics.median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
        "best": min(samples["reference"]) / min(samples["ours"]),
        "reference": statistics.median(samples["reference"]),
        "ours": statistics.median(samples["ours"]),
    }


def show(what: str, found: dict[str, float], note: str = "") -> None:
    """Print one row."""
    spread = f"[{found['low']:.2f}, {found['high']:.2f}]"
    times = f"{found['reference']:10.2f} {found['ours']:9.2f}"
    print(
        f"{what:46} {found['ratio']:8.2f} {spread:>18} {found['best']:8.2f} {times}  {note}",
        flush=True,
    )


def peak_bytes(run) -> int:
    """Return the peak of what one call allocates above what was there, from the allocator's events."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def construction(rounds: int) -> None:
    """Forward and backward of the kernel construction: time and peak memory against the package."""
    try:
        logging.disable(logging.CRITICAL)
        from DCLS.construct.modules import ConstructKernel2d
    except ImportError:
        print("the package dcls is not installed: construction is not compared")
        return
    for interpolation, version, channels, count, size in CONSTRUCTIONS:
        layer = DCLSConv2d(channels, channels, count, size, groups=channels, interpolation=interpolation)
        layer.place("uniform")
        leaves = layer.weight, layer.positions, layer.sigma
        theirs = ConstructKernel2d(channels, channels, channels, count, (size, size), version)
        grad = torch.randn(channels, 1, size, size)

        def ours_run(leaves=leaves, size=size, interpolation=interpolation, grad=grad):
            build_kernel(*leaves, (size, size), interpolation).backward(grad)

        def their_run(theirs=theirs, leaves=leaves, grad=grad):
            theirs(*leaves).backward(grad)

        found = paired(their_run, ours_run, 3 * rounds, inner=20)
        memory = peak_bytes(their_run) / peak_bytes(ours_run)
        show(f"construct {interpolation} C={channels} K={count} s={size}", found, f"peak memory 1/{memory:.1f}")


def application(rounds: int, shapes) -> None:
    """Forward and backward of a depthwise convolution against ``F.conv2d``, in both memory formats."""
    for batch, channels, side, size in shapes:
        for layout, name in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "NHWC")):
            x = torch.randn(batch, channels, side, side).contiguous(memory_format=layout).requires_grad_()
            kernel = torch.randn(channels, 1, size, size, requires_grad=True)
            grad = torch.randn(batch, channels, side, side).contiguous(memory_format=layout)
            padding = (size // 2, size // 2)

            def native(x=x, kernel=kernel, grad=grad, padding=padding, channels=channels):
                F.conv2d(x, kernel, padding=padding, groups=channels).backward(grad)

            def ours(x=x, kernel=kernel, grad=grad, padding=padding):
                depthwise_conv2d(x, kernel, padding=padding).backward(grad)

            found = paired(native, ours, rounds)
            show(
                f"apply {size}x{size} N={batch} C={channels} {side}x{side} {name}",
                found,
                method_for(x, kernel),
            )


def folding(rounds: int) -> None:
    """Inference of a folded layer against a plain convolution of the same size."""
    layer = DCLSConv2d(128, 128, 34, 17, padding=8, groups=128).eval()
    plain = torch.nn.Conv2d(128, 128, 17, padding=8, groups=128).eval()
    folded, x = layer.fold(), torch.randn(4, 128, 16, 16)
    with torch.inference_mode():
        show("inference folded / nn.Conv2d, 17x17", paired(lambda: plain(x), lambda: folded(x), rounds))
        show("inference unfolded / nn.Conv2d, 17x17", paired(lambda: plain(x), lambda: layer(x), rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds, the small maps only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    rounds = 3 if settings.quick else settings.rounds
    print(f"{cpu_name()}, {settings.threads} thread(s), torch {torch.__version__}, {rounds} rounds")
    print(f"{'':46} {'ratio':>8} {'range':>18} {'best':>8} {'ref. ms':>10} {'convx ms':>9}")
    construction(rounds)
    application(rounds, [s for s in APPLICATIONS if not settings.quick or s[2] == 8])
    folding(rounds)


if __name__ == "__main__":
    main()
