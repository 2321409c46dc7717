"""What self-relation costs on top of the DINO step, and what relations of sampled features save.

    python benchmarks/sere.py [--quick] [--threads 1] [--batch 32] [--clock processor]

One update each (views, student, teacher, losses, backward pass, AdamW, moving average) of DINO and SERE on the same images and
crops, timed in turn in one process, in a new random order each round; ratios are medians over the rounds with the quartiles.
With ``--clock processor`` (one thread) the time that other processes take does not count. Targets at d = 192, 9 layers, 32 px,
patches of 4, batch 32, two global and four local crops: at most 1.15 times DINO's time, and 1.15 times its peak memory, which is
counted from the allocator's events.
"""

import argparse
import time
from types import SimpleNamespace

import numpy as np
import torch

from convx import config
from convx.data.batches import Normalise
from convx.evaluate.latency import paired
from convx.models import create_model
from convx.objectives.self_relation import create
from convx.seeds import generator

META = {"num_classes": 10, "channels": 3, "image_size": 32}


def objective_of(variant: str, **changes):
    """Return the declared objective of a variant around its declared encoder, in training mode."""
    torch.manual_seed(0)
    declared = config.declared_variants()[variant]
    model = create_model(
        declared["model"]["name"],
        0,
        3,
        32,
        **{k: v for k, v in declared["model"]["settings"].items() if k != "num_classes"},
    )
    settings = {k: v for k, v in declared["objective"].items() if k != "name"} | changes
    normalise = Normalise([0.5] * 3, [0.25] * 3, torch.device("cpu"))
    return create(model, settings, {"epochs": 100}, SimpleNamespace(meta=META, normalise=normalise)).train()


def update_of(objective, images):
    """Return a call that makes one update."""
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def update() -> None:
        loss, _ = objective(images, None, generator(0, "augment"), 0.5)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        objective.clip_gradients(0.3)
        objective.before_step(optimizer, 0.5)
        optimizer.step()
        objective.after_step(0.5)

    return update


def peak_mib(call) -> float:
    """Return the most that is allocated during a call beyond what was there, in MiB."""
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        call()
    now = most = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def processor_ms(call) -> float:
    begin = time.process_time()
    call()
    return 1e3 * (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = torch.randint(0, 256, (options.batch, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "images"))
    arms = {
        "dino": objective_of("dino"),
        "sere": objective_of("sere"),
        "relations sampled": objective_of("sere", sampling="relation"),
    }
    updates = {name: update_of(objective, images) for name, objective in arms.items()}
    limits = {"rounds": 6, "seconds": 60.0} if options.quick else {"rounds": 15, "seconds": 150.0}
    if options.clock == "processor":
        limits["clock"] = processor_ms
    samples = paired(updates, **limits)
    memory = {name: peak_mib(update) for name, update in updates.items()}
    print(f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {options.threads} threads")
    print(f"batch {options.batch}, {len(samples['dino'])} rounds, {options.clock} time")
    for name in arms:
        low, middle, high = np.percentile(samples[name] / samples["dino"], [25, 50, 75])
        print(f"{name:>18}: {np.median(samples[name]):7.0f} ms, {middle:.3f} [{low:.3f}, {high:.3f}] of DINO's time; "
              f"peak {memory[name]:5.0f} MiB, {memory[name] / memory['dino']:.3f} of DINO's")  # fmt: skip


if __name__ == "__main__":
    main()
