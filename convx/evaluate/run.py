"""Everything that is measured on one run: all evaluators in one process, so that imports and weights are loaded once."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from convx.data import open_set
from convx.evaluate import EvaluationData, Result, accuracy, attacks, corruption, cost, energy, latency
from convx.evaluate.payload import encode


def open_corrupted_set(folder: str | Path):
    """Open a corrupted test set: one that was built here, or a pointer to unpacked official archives."""
    from convx.data.corruptions import open_corrupted, open_official
    from convx.manifest import read_json

    meta = read_json(Path(folder) / "meta.json")
    return open_official(meta["official"]) if "official" in meta else open_corrupted(folder)


def evaluate_run(
    model: nn.Module, recipe: dict, data_folder: Path, corrupted_folder: Path | None, settings: dict, device
) -> Result:
    """Return every row of a run on the test images: accuracy, corruption, attacks, and what the model weighs.

    ``settings``: ``batch_size``, ``corruption`` and ``attacks`` of the study (None leaves one out). ``per_image`` is encoded.
    """
    data_set = open_set(data_folder)
    images, labels = data_set.split("test")
    channels_last = recipe["training"]["channels_last"]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(device, memory_format=memory_format).eval()
    data = EvaluationData.from_arrays(
        images,
        labels,
        data_set.meta["mean"],
        data_set.meta["std"],
        device,
        settings.get("batch_size", 500),
        channels_last,
    )
    result = accuracy.run(model, data, {"split": "test", "class_names": data_set.meta["class_names"]})
    if corrupted_folder is not None:
        wanted = settings.get("corruption") or {}
        names = {"corruptions": wanted["corruptions"]} if wanted.get("corruptions") else {}
        clean = next(row["value"] for row in result.rows if row["metric"] == "top1")
        imagenet = {"imagenet": data_set.meta["num_classes"] == 1000, "clean_top1": clean}
        corrupted = open_corrupted_set(corrupted_folder)
        result += corruption.run(model, data, {"split": "test", **names, **imagenet}, corrupted)
    if settings.get("attacks"):
        attacked = data.first(settings["attacks"].get("images"))
        result += attacks.run(model, attacked, settings["attacks"] | {"seed": recipe["seed"]})
    result += cost.run(model, data)
    return Result(result.rows, {name: encode(np.asarray(array)) for name, array in result.per_image.items()})


def measure_run(networks: dict[str, nn.Module], recipe: dict, meta: dict, settings: dict, device) -> Result:
    """Return latency (the first network beside the second) and inference energy of the first, on a device that is ours."""
    shape = (meta["channels"], meta["image_size"], meta["image_size"])
    common = {"channels_last": recipe["training"]["channels_last"]}
    result = Result([])
    if settings.get("latency"):
        result += latency.run(networks, shape, settings["latency"] | common, device)
    if settings.get("energy"):
        first = next(iter(networks.values()))
        carbon = {"carbon": settings.get("carbon") or {}}
        result += energy.run(first, shape, settings["energy"] | carbon | common, device)
    return result
