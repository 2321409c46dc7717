"""What a run costs on this machine: a few timed steps of its own training and evaluation, kept for the next question.

A step is timed in processor seconds, so that whatever else the machine does counts little; on a GPU by the clock. The times
of a recipe are kept in one small file, whose name is a digest of what decides them: the network, what a batch goes through,
the machine and the versions. Seeds, learning rates and epochs do not, so variants that differ in these share a file.
"""

import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from convx.checks import digest
from convx.manifest import processor, read_json, write_json
from convx.source import source_digest

STEPS, WARM_UP, SECONDS = 30, 2, 30.0  # timed steps, steps before them, ceiling in seconds for one recipe
FORWARD_STEPS = 5
# Keys of a recipe that have no effect on its pace.
NUMERIC = """\
lr momentum weight_decay decay_norm_and_bias label_smoothing epochs checkpoints schedule min_lr warmup_lr warmup_epochs
decay_epochs decay_milestones decay_rate
""".split()  # noqa: SIM905


def _torch() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def key(recipe: dict) -> str:
    """Return the digest of what decides the time of a step of a recipe on this machine."""

    def network(r: dict) -> dict:
        return {"model": r["model"], "surgery": r["surgery"], "start": r["start"] and network(r["start"]["recipe"])}

    training = {k: v for k, v in recipe["training"].items() if k not in NUMERIC}
    what = network(recipe) | {"objective": recipe["objective"], "training": training, "device": recipe["device"]}
    what |= {"data": {k: recipe["data"][k] for k in ("name", "image_size", "path")}}
    return digest(what | {"machine": processor(), "torch": _torch(), "source": source_digest("train", recipe)})


def kept(recipe: dict, folder: str | Path) -> dict | None:
    """Return what was measured for a recipe on this machine before, or None."""
    file = Path(folder) / f"{key(recipe)}.json"
    return read_json(file) if file.exists() else None


def measure(recipe: dict, data_folder: str | Path, batch: int, steps: int = STEPS, seconds: float = SECONDS) -> dict:
    """Return the seconds of processor time (of the clock, on a GPU) that an image costs this machine.

    ``train_seconds_per_image`` is the median of ``steps`` updates, fewer where they do not fit into ``seconds``;
    ``forward_seconds_per_image`` that of a few batches of ``batch`` test images without gradients. A network that does not
    fit, or anything else that fails, is a ``reason`` instead.
    """
    import torch

    from convx.data import open_set
    from convx.data.batches import to_device
    from convx.data.loader import FolderImages
    from convx.manifest import failure_reason
    from convx.training import Trainer

    long = recipe | {"training": recipe["training"] | {"epochs": max(1, recipe["training"]["epochs"])}}
    try:
        trainer = Trainer(long, data_folder)
    except Exception as error:
        if (reason := failure_reason(error)) is None:
            raise
        return {"reason": reason}
    device = trainer.device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    trainer.objective.train()
    times, started = [], time.perf_counter()

    def lap(work) -> float:
        begin = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - begin

    try:
        stream = _batches(trainer)
        sizes = []
        while len(times) < WARM_UP + steps:
            images, labels, rng = next(stream)
            times.append(lap(lambda x=images, y=labels, r=rng: trainer.train_step(x, y, r)) / len(labels))
            sizes.append(len(labels))
            if time.perf_counter() - started > seconds and len(times) > 1:
                break
        model = trainer.exported().eval()
        test = open_set(data_folder).split("test")[0][:batch]
        test = FolderImages(test, device)[:] if trainer.data.meta["kind"] == "folder" else to_device(test, device)
        x = trainer.data.normalise(test)

        @torch.inference_mode()
        def forward() -> None:
            model(x)

        lap(forward)
        started, forwards = time.perf_counter(), []
        while len(forwards) < FORWARD_STEPS and (not forwards or time.perf_counter() - started < seconds / 3):
            forwards.append(lap(forward) / len(x))
    except Exception as error:
        if (reason := failure_reason(error)) is None:
            raise
        return {"reason": reason}
    timed = times[min(WARM_UP, len(times) - 1) :]
    return {
        "train_seconds_per_image": statistics.median(timed),
        "forward_seconds_per_image": statistics.median(forwards),
        "steps": len(timed),
        "batch_size": max(sizes),
        "threads": recipe["training"]["threads"],
        "precision": recipe["training"]["precision"],
        "device": str(device),
        "clock": "wall" if device.type == "cuda" else "processor",
        "machine": processor(),
    }


def _batches(trainer):
    epoch = 0
    while True:
        for _, images, labels, rng in trainer.batches.epoch(epoch):
            yield images, labels, rng
        epoch += 1


def pace(recipe: dict, data_folder: str | Path, batch: int, folder: str | Path, steps: int = STEPS) -> dict:
    """Return what is kept for a recipe, or measure and keep it."""
    if (found := kept(recipe, folder)) is not None and (found.get("steps", 0) >= min(steps, 5) or "reason" in found):
        return found
    found = measure(recipe, data_folder, batch, steps)
    write_json(Path(folder) / f"{key(recipe)}.json", found)
    return found
