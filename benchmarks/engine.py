"""Which thread count, memory format and precision train fastest on this processor: recipe settings, because they change bits.

    python benchmarks/engine.py [--model resnet20_16] [--batch 256] [--quick]

Every setting trains the same network on the digits at 32x32; all of them take turns in one process, in random order, and the
table shows medians of images/s with the range. The plain loop that everybody writes is `convx bench`.
"""

import argparse
import itertools
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from convx import config
from convx.data import prepare
from convx.manifest import processor, processor_features
from convx.report.tables import markdown
from convx.training import Trainer


def recipe(model: str, batch: int, **training) -> dict:
    """Return a recipe on the digits with some training settings."""
    study = {
        "study": "bench",
        "data": {"name": "digits", "image_size": 32},
        "host": {"name": model},
        "baseline": "cnn",
        "recipes": {
            "train": {
                "batch_size": batch,
                "crop_padding": 4,
                "flip": True,
                "drop_last": True,
                "epochs": 1000,
                **training,
            }
        },
        "variants": {"cnn": {}},
    }
    return config.resolve(config.load_study(study), "cnn", 0)


def turn(trainer: Trainer, steps: int) -> float:
    """Return images/s over some steps; threads are global and set anew at each turn."""
    torch.set_num_threads(trainer.training["threads"])
    batches = itertools.islice(
        itertools.chain.from_iterable(trainer.batches.epoch(e) for e in itertools.count()), steps
    )
    start, images = time.perf_counter(), 0
    for _, x, y, rng in batches:
        trainer.train_step(x, y, rng)
        images += len(y)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20_16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--precisions", nargs="*", default=["fp32"], choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--quick", action="store_true", help="two turns of two steps")
    a = parser.parse_args()
    turns, steps = (2, 2) if a.quick else (7, 4)
    with tempfile.TemporaryDirectory() as folder:
        prepare({"name": "digits", "image_size": 32}, Path(folder) / "digits", progress=False)
        settings = list(itertools.product(a.threads, (True, False), a.precisions))
        trainers = {}
        for threads, channels_last, precision in settings:
            chosen = {"threads": threads, "channels_last": channels_last, "precision": precision}
            trainers[threads, channels_last, precision] = Trainer(
                recipe(a.model, a.batch, **chosen), Path(folder) / "digits"
            )
            turn(trainers[threads, channels_last, precision], steps)
        rates = {key: [] for key in settings}
        order = random.Random(0)
        for _ in range(turns):
            for key in order.sample(settings, len(settings)):
                rates[key].append(turn(trainers[key], steps))
    best = max(np.median(r) for r in rates.values())
    rows = [
        [
            t,
            "channels_last" if c else "contiguous",
            p,
            f"{np.median(r):.0f}",
            f"{min(r):.0f} to {max(r):.0f}",
            f"{np.median(r) / best:.2f}",
        ]
        for (t, c, p), r in rates.items()
    ]
    print(
        f"{processor()} ({', '.join(processor_features()) or 'no AVX'}), torch {torch.__version__}, {a.model}, batch {a.batch}\n"
    )
    print(markdown(["threads", "memory format", "precision", "images/s", "range", "of the best"], rows), end="")


if __name__ == "__main__":
    main()
