"""Everything that is measured on one run: all evaluators in one process, so that imports and weights are loaded once."""

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import nn

from convx import objectives
from convx.data import open_set
from convx.data.folder import ImageFiles
from convx.data.splits import training_rows
from convx.evaluate import EvaluationData, Result, accuracy, attacks, corruption, cost, energy, kernels, latency, row
from convx.evaluate.payload import encode, pack

TRAINING_SAMPLE = 10_000  # training images, without augmentation, that the gap to the test images is measured on


def open_corrupted_set(folder: str | Path, class_ids: list[str] | None = None):
    """Open a corrupted test set: one that was built here, or a pointer to unpacked official archives.

    ``class_ids``: for archives of folders, the class folders in the order of the model's outputs.
    """
    from convx.data.corruptions import open_corrupted, open_official
    from convx.manifest import read_json

    meta = read_json(Path(folder) / "meta.json")
    return open_official(meta["official"], wnids=class_ids) if "official" in meta else open_corrupted(folder)


def evaluate_run(
    model: nn.Module, recipe: dict, data_folder: Path, corrupted_folder: Path | None, settings: dict, device
) -> Result:
    """Return every row of a run on the test images: accuracy, corruption, attacks, what the model weighs and its filters look like.

    Also the gap to training images, and what the evaluator of the variant's paper adds: ``run(model, recipe, data) ->
    Result`` in ``convx/papers/<recipe["paper"]>/evaluate.py``, where there is one. ``settings``: ``batch_size``,
    ``corruption`` and ``attacks`` of the study (None leaves one out), and ``checkpoints``, the folder beside the weights,
    for a paper's evaluator that takes it. ``per_image`` and ``arrays`` are encoded.
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
        boxes=data_set.test_boxes,
    )
    train_images, train_labels = data_set.split("train") if len(data_set.train_labels) else ([], [])
    share = recipe["training"].get("train_share", 1)
    if len(train_labels):
        train_labels = np.asarray(train_labels)
        if (seen := training_rows(train_labels, share)) is not None:  # what the run did not see stays unseen
            train_labels = train_labels[seen]
            train_images = train_images.take(seen) if isinstance(train_images, ImageFiles) else train_images[seen]
        labels = torch.as_tensor(train_labels, dtype=torch.long).to(data.device)
        data = replace(data, train=data.replaced(train_images, labels))
    # An encoder gives features: its objective says what classifies them; what the network costs is the encoder's own.
    features = objectives.classifier(model, recipe, data.train)
    network, model = model, model if features is None else features.eval()
    result = accuracy.run(model, data, {"split": "test", "class_names": data_set.meta["class_names"]})
    if corrupted_folder is not None:
        wanted = settings.get("corruption") or {}
        names = {"corruptions": wanted["corruptions"]} if wanted.get("corruptions") else {}
        clean = next(row["value"] for row in result.rows if row["metric"] == "top1")
        imagenet = {"imagenet": data_set.meta["num_classes"] == 1000, "clean_top1": clean}
        corrupted = open_corrupted_set(corrupted_folder, data_set.meta.get("class_ids"))
        result += corruption.run(model, data, {"split": "test", **names, **imagenet}, corrupted)
    if settings.get("attacks"):
        attacked = data.first(settings["attacks"].get("images"))
        result += attacks.run(model, attacked, settings["attacks"] | {"seed": recipe["seed"]})
    result += cost.run(network, data) + kernels.run(network)
    if features is None:  # neighbours: every training image is its own
        result += training_gap(model, data, data_set, result, share)
    if evaluator := paper_evaluator(recipe.get("paper")):
        beside = (
            {"checkpoints": settings.get("checkpoints")} if "checkpoints" in signature(evaluator).parameters else {}
        )
        result += evaluator(network, recipe, data, **beside)
    return packed(result)


def packed(result: Result) -> Result:
    """Return the result with its arrays as text, as a metrics file holds them."""
    return Result(
        result.rows,
        per_image={name: encode(np.asarray(array)) for name, array in result.per_image.items()},
        arrays={name: pack(array) for name, array in result.arrays.items()},
    )


def paper_evaluator(paper: str | None):
    """Return the ``run`` of a paper folder's own evaluator, or None where it has none."""
    name = f"convx.papers.{paper}.evaluate"
    return import_module(name).run if paper and find_spec(name) else None


def training_gap(model: nn.Module, data: EvaluationData, data_set, result: Result, share: float = 1) -> Result:
    """Return ``train_top1`` of training images without augmentation, and ``generalisation_gap``, that minus the test top-1.

    The sample is the same for every run of a data set: evenly spaced over the training images that no run sets aside, of
    which a run with a ``share`` below 1 saw a part.
    """
    if getattr(model, "takes_boxes", False) or not len(data_set.train_labels):
        return Result([])
    images, labels = data_set.split("train")
    if not len(labels):
        return Result([])
    seen = training_rows(np.asarray(labels), share)
    seen = np.arange(len(labels)) if seen is None else seen
    places = seen[np.unique(np.linspace(0, len(seen) - 1, min(TRAINING_SAMPLE, len(seen))).round().astype(int))]
    sample = data.replaced(
        images[places], torch.as_tensor(np.asarray(labels)[places], dtype=torch.long).to(data.device)
    )
    top1 = {"test": next(entry["value"] for entry in result.rows if entry["metric"] == "top1")}
    found = accuracy.run(model, sample, {"split": "train"}).rows
    top1["train"] = next(entry["value"] for entry in found if entry["metric"] == "top1")
    which = f"{len(places)} training images, evenly spaced, without augmentation"
    gap = top1["train"] - top1["test"]
    return Result(
        [
            row(
                "train_top1",
                top1["train"],
                "%",
                n=len(places),
                split="train",
                method=f"argmax of the logits on {which}",
            ),
            row(
                "generalisation_gap",
                gap,
                "pp",
                n=len(places),
                method=f"top-1 on {which}, minus top-1 on the test images",
            ),
        ]
    )


def measure_run(
    networks: dict[str, nn.Module],
    recipe: dict,
    meta: dict,
    settings: dict,
    device,
    data_folder: Path | None = None,
) -> Result:
    """Return latency (the first network beside the second) and inference energy of the first, on a device that is ours.

    A network that says ``input_dependent`` is measured on test images. Also what the paper of the variant measures:
    ``run(networks, recipe, data, settings, device)`` in ``convx/papers/<paper>/measure.py``, where there is one.
    """
    shape = (meta["channels"], meta["image_size"], meta["image_size"])
    common = {"channels_last": recipe["training"]["channels_last"]}
    result = Result([])
    measurer = f"convx.papers.{recipe.get('paper')}.measure"
    images = None
    if data_folder is not None and any(getattr(n, "input_dependent", False) for n in networks.values()):
        data_set = open_set(data_folder)
        statistics = (data_set.meta["mean"], data_set.meta["std"], device)
        images = EvaluationData.from_arrays(*data_set.split("test"), *statistics, **common, boxes=data_set.test_boxes)
        common["images"] = images
        if recipe.get("paper") and find_spec(measurer):
            result += import_module(measurer).run(networks, recipe, images, settings, device)
    if settings.get("latency"):
        result += latency.run(networks, shape, settings["latency"] | common, device)
    if settings.get("energy"):
        first = next(iter(networks.values()))
        carbon = {"carbon": settings.get("carbon") or {}}
        result += energy.run(first, shape, settings["energy"] | carbon | common, device)
    return packed(result)
