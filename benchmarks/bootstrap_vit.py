"""What joint training costs on a CPU: one step of ViT and agent together against the sum of a step of each alone.

    python benchmarks/bootstrap_vit.py [--quick] [--threads 1] [--rounds 9] [--batch 32] [--precision fp32] [--clock wall]

All trainings are convx's own (`Trainer.train_step`: augmentation, forward, backward, AdamW) on made-up images of the set's
shape. Paired: the steps run in turn in one process, in an order drawn anew each round; a row shows the median of the per-round
ratios joint / (vit + agent) with its range and the medians in ms. `--clock cpu` counts the processor time of the process, which
other processes disturb less than the wall clock.
"""

import argparse
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from convx import config
from convx.data import prepare
from convx.training import Trainer

HOSTS = {"vit_s_p4": {}, "vit72_4_h9_p4": {"agent_stem_width": 16}}
MODES = {
    "vit": {"mode": "vit"},
    "agent": {"mode": "agent"},
    "joint": {"mode": "joint"},
    "shared": {"mode": "shared"},
    "shared, aligned": {"mode": "shared", "align": "pcgrad_global"},
    "no features": {"mode": "joint", "feature_weight": 0.0},
}


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def trainers(host: str, agent: dict, settings, folder: Path) -> dict[str, Trainer]:
    """Return a trainer for each mode, all on the same images."""
    found = {}
    for name, objective in MODES.items():
        own = {"verb": "agent_of", "weights": "own"} | {k.removeprefix("agent_"): v for k, v in agent.items()}
        chosen = objective | (agent if objective["mode"] in ("joint", "shared") else {})
        training = {"optimizer": "adamw", "lr": 0.001, "weight_decay": 0.05, "batch_size": settings.batch}
        training |= {"threads": settings.threads, "precision": settings.precision}
        study = {
            "study": "bench",
            "data": DATA,
            "host": {"name": host},
            "baseline": "vit",
            "device": "cpu",
            "recipes": {"train": training},
            "variants": {
                "vit": {
                    "objective": {"name": "bootstrap"} | chosen,
                    "surgery": [own] if objective["mode"] == "agent" else [],
                    "training": {"clip_grad": None},
                }
            },
        }
        found[name] = Trainer(config.resolve(config.load_study(study), "vit", 0), folder)
        found[name].objective.train()
    return found


DATA = {"name": "digits", "image_size": 32, "train_images": 640, "test_images": 10}


def measure(host: str, agent: dict, settings, folder: Path) -> None:
    """Print one host: each joint mode against the sum of its parts."""
    runs = trainers(host, agent, settings, folder)
    batches = {name: next(iter(trainer.batches.epoch(0)))[1:] for name, trainer in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, rng = list(runs), random.Random(0)
    clock = time.process_time if settings.clock == "cpu" else time.perf_counter
    for i in range(settings.rounds + 1):
        rng.shuffle(order)
        for name in order:
            start = clock()
            runs[name].train_step(*batches[name])
            if i:  # the first round warms up
                samples[name].append((clock() - start) * 1e3)
    parts = [a + b for a, b in zip(samples["vit"], samples["agent"])]
    alone = f"vit {statistics.median(samples['vit']):.0f}, agent {statistics.median(samples['agent']):.0f}"
    for name in [name for name in runs if name not in ("vit", "agent")]:
        ratios = sorted(both / sum_ for both, sum_ in zip(samples[name], parts))
        low, high, best = ratios[0], ratios[-1], min(samples[name]) / min(parts)
        print(
            f"{host:16} {name:18} {statistics.median(ratios):7.3f} {f'[{low:.2f}, {high:.2f}]':>16} {best:7.3f}"
            f" {statistics.median(samples[name]):9.0f}  {alone}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of the small host")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    settings = parser.parse_args()
    if settings.quick:
        settings.rounds = 3
    print(
        f"{cpu_name()}, {settings.threads} thread(s), torch {torch.__version__}, batch {settings.batch}, {settings.precision}"
    )
    print(f"{'host':16} {'mode':18} {'ratio':>7} {'range':>16} {'best':>7} {'ms':>9}  ms of the parts alone")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "digits"
        host = {"host": {"name": "vit_s_p4"}, "baseline": "vit", "variants": {"vit": None}, "recipes": {"train": {}}}
        prepare(config.load_study({"study": "bench", "data": DATA} | host)["data"], folder, mirrors=[], progress=False)
        for host, agent in list(HOSTS.items())[1 if settings.quick else 0 :]:
            measure(host, agent, settings, folder)


if __name__ == "__main__":
    main()
