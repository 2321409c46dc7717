"""What a training step with random filters costs, against the plain network's (ResNet-20, CPU).

    python benchmarks/randconv.py                  batch 256, width 16, a few minutes
    python benchmarks/randconv.py --quick          batch 32, fewer rounds
    python benchmarks/randconv.py --threads 2 --clock processor

Every round times one step (forward, backward, SGD update with the paper's recipe) of every network in random
order in one process; the ratio is that of the medians, its interval resamples rounds. ``processor`` time
counts what this process computed, whatever else the machine does.

Targets: LC-frozen x128 folded at most 1.2x the plain network, frozen spatial filters below 0.7x.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import convx
from convx.evaluate.latency import paired
from convx.models import create_model
from convx.statistics import ratio_of_medians_interval

TARGETS = {"lc_frozen_x128": 1.2, "cnn_frozen": 0.7}


def networks(width: int) -> dict[str, torch.nn.Module]:
    """Return the plain network first, then its variants; two layers at x8 only, for a short run."""
    torch.manual_seed(0)
    plain = create_model(f"resnet20_{width}", num_classes=10)
    return {
        "cnn": plain,
        "cnn_frozen": convx.freeze_spatial(plain),
        "lc_frozen_x8": convx.linear_combinations(plain, expansion=8),
        "lc_frozen_x128": convx.linear_combinations(plain, expansion=128),
        "lc_learned_x128": convx.linear_combinations(plain, expansion=128, frozen=False),
        "lc_frozen_x8 two_layer": convx.linear_combinations(plain, expansion=8, mode="two_layer"),
    }


def step_of(model: torch.nn.Module, batch: int, channels_last: bool):
    """Return a function that trains the model for one step on a fixed random batch."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout).train()
    rng = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(batch, 3, 32, 32, generator=rng).to(memory_format=layout)
    labels_B = torch.randint(10, (batch,), generator=rng)
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.SGD(parameters, **settings)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x_BCHW), labels_B, label_smoothing=0.1).backward()
        optimizer.step()

    return step


def processor_milliseconds(call) -> float:
    start = time.process_time()
    call()
    return 1000 * (time.process_time() - start)


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=300.0, help="ceiling, warm-up included")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--contiguous", action="store_true", help="NCHW in memory instead of channels_last")
    parser.add_argument("--only", nargs="*", help="names of networks to time beside cnn")
    parser.add_argument("--quick", action="store_true", help="batch 32, 8 rounds")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.rounds = 32, 8
    torch.set_num_threads(args.threads)
    chosen = {n: m for n, m in networks(args.width).items() if n == "cnn" or not args.only or n in args.only}
    steps = {name: step_of(model, args.batch, not args.contiguous) for name, model in chosen.items()}
    clock = processor_milliseconds if args.clock == "processor" else None
    samples = paired(steps, args.rounds, args.seconds, clock=clock)

    print(f"ResNet-20-{args.width}, a step of {args.batch}, {args.threads} thread(s), {args.clock} time")
    print(f"{cpu_name()}, torch {torch.__version__}, {len(samples['cnn'])} rounds\n")
    print(f"{'network':24} {'median ms':>10} {'ratio':>7} {'95 % interval':>16}  target")
    for name, ms in samples.items():
        ratio = ratio_of_medians_interval(ms, samples["cnn"])
        target = TARGETS.get(name)
        said = "" if target is None else f"< {target}: {'met' if ratio.estimate <= target else 'MISSED'}"
        interval = f"{ratio.low:.2f} to {ratio.high:.2f}"
        print(f"{name:24} {np.median(ms):10.1f} {ratio.estimate:7.2f} {interval:>16}  {said}")


if __name__ == "__main__":
    main()
