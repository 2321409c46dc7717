"""A made-up but well-formed results folder: metrics files, histories, study.json, as the workflow leaves
them. No training.

Accuracies come from drawn results per image, so that rows and payloads agree as they do in real runs.
"""

import csv
from pathlib import Path

import numpy as np

from convx import config
from convx.evaluate.payload import encode
from convx.manifest import METRICS_SCHEMA_VERSION, Failure, MetricsFile, write_json

STUDY = {
    "study": "made_up",
    "description": "Numbers out of a hat, to test the report.",
    "reduced": "nothing was trained; a few made-up images, for tests",
    "data": {"name": "digits", "image_size": 32, "validation": 0.1},
    "host": {"name": "resnet8_8"},
    "baseline": "cnn",
    "seeds": [0, 1, 2],
    "recipes": {
        "train": {"epochs": 3, "batch_size": 32, "lr": 0.05, "weight_decay": 0.0005},
        "finetune": {"epochs": 2, "batch_size": 32, "lr": 0.0005, "weight_decay": 0.05},
    },
    "variants": {
        "cnn": None,
        "cnn_finetuned": None,
        "cnn_frozen": None,
        "lc_frozen_x8": None,
        "lc_learned_x8": None,
        "tcnn": None,
    },
    "evaluate": {
        "corruption": {"protocol": "imagenet_c", "severities": [1, 5]},
        "latency": {"batches": [1, 32], "rounds": 10, "seconds": 1},
        "energy": {"seconds": 0.5},
    },
    "device": "cpu",
}
ACCURACY = {
    "cnn": 0.96,
    "cnn_finetuned": 0.962,
    "cnn_frozen": 0.70,
    "lc_frozen_x8": 0.94,
    "lc_learned_x8": 0.95,
}
CORRUPTIONS = ("gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")
SEVERITIES = (1, 5)
ENVIRONMENT = {"processor": "Made-up CPU", "device": "cpu", "packages": {"torch": "0.0"}}


def build(root: Path, images: int = 400, failed=(), missing=(), payloads: bool = True, **changes) -> Path:
    """Write ``root/<study>`` and return it.

    ``failed`` and ``missing`` hold (variant, seed) pairs; ``changes`` are keys of the study, as in a study
    file.
    """
    study = config.load_study(STUDY | changes, "made-up study")
    folder = Path(root) / study["study"]
    write_json(folder / "study.json", study)
    for place, name in enumerate(study["variants"]):
        for seed in config.seeds(study, name):
            if (name, seed) not in missing:
                _run(folder, study, name, seed, place, images, (name, seed) in failed, payloads)
    return folder


def head(study: dict, name: str, seed: int) -> dict:
    """Return what every metrics record of a run begins with, for tests that write records of their own."""
    return {
        "schema_version": METRICS_SCHEMA_VERSION,
        "run": {"study": study["study"], "variant": name, "seed": seed},
        "status": "ok",
        "reason": "",
        "rows": [],
        "per_image": {},
        "arrays": {},
        "recipe_digest": config.resolve(study, name, seed)["digest"],
        "environment": {},
        "command": "",
        "started": "",
        "wall_seconds": 1.0,
    }


def _run(folder: Path, study: dict, name: str, seed: int, place: int, images: int, fails: bool, payloads: bool) -> None:
    recipe = config.resolve(study, name, seed)
    rng = np.random.default_rng([place, seed])
    where = folder / "metrics" / name / f"seed{seed}"

    def record(what: str) -> MetricsFile:
        file = MetricsFile(where / f"{what}.json", what, recipe, source_digest="s", data_digest="d")
        file.environment = ENVIRONMENT
        return file

    seconds = 4.0 + 0.7 * place + 0.1 * seed
    with record("training") as file:
        if fails:
            raise Failure("the loss is not finite in epoch 2")
        energy = f"estimate (CPU load x TDP 8 W; shared: process-level estimate; {seconds:.1f} s; CodeCarbon)"
        file.add("train_seconds", seconds, "s", method="wall clock")
        file.add("training_energy", seconds * 1e-6, "kWh", method=energy, scope="process", source="estimate")
        file.add("training_carbon", seconds * 4.75e-7, "kgCO2e", method=energy, scope="process", source="estimate")
    with record("evaluation") as file:
        if fails:
            raise Failure("the training it needs failed: the loss is not finite in epoch 2")
        _evaluation(file, rng, ACCURACY.get(name, 0.9 + 0.003 * place), images, payloads)
    if seed == config.seeds(study, name)[0] and not fails:
        with record("cost") as file:
            _cost(file, 1.0 + 0.37 * place, name, study["baseline"])
    if not fails:
        _history(folder / "histories" / name / f"seed{seed}.csv", rng, recipe["training"]["epochs"])


def _evaluation(file: MetricsFile, rng: np.random.Generator, accuracy: float, images: int, payloads: bool) -> None:
    ease_N = np.random.default_rng(7).normal(size=images)  # the images are the same for every run
    chance_N = np.clip(accuracy + 0.04 * ease_N + 0.004 * rng.normal(), 0, 1)
    correct_N = rng.random(images) < chance_N
    file.add("top1", 100 * float(correct_N.mean()), "%", n=images, split="test", method="argmax")
    cells_N = np.zeros(images, np.uint8)
    for harm, corruption in enumerate(CORRUPTIONS):
        for severity in SEVERITIES:
            right_N = rng.random(images) < np.clip(chance_N - 0.05 * (harm + 1) - 0.04 * severity, 0, 1)
            cells_N += right_N
            condition = {"protocol": "imagenet_c", "corruption": corruption, "severity": severity}
            value = 100 * float(right_N.mean())
            file.add("corruption_accuracy", value, "%", n=images, split="test", method="argmax", **condition)
    count = len(CORRUPTIONS) * len(SEVERITIES)
    facts = {"n": images, "split": "test", "method": "made up", "protocol": "imagenet_c"}
    file.add("mean_corruption_accuracy", 100 * float(cells_N.mean()) / count, "%", **facts)
    file.add("corruption_cells", count, "cells", **facts)
    file.add("parameters", 19_000 + round(accuracy * 1000), "1", method="count")
    file.add("macs", 3.1e6 * (1 + accuracy), "MAC per image", method="count", folded="no")
    if payloads:
        file.per_image = {"correct": encode(correct_N), "corruption_correct_cells": encode(cells_N)}


def _cost(file: MetricsFile, milliseconds: float, name: str, baseline: str) -> None:
    for batch in (1, 32):
        where = {"batch": batch, "threads": 1, "dtype": "float32", "folded": "no", "device": "cpu"}
        factor = milliseconds * batch**0.7
        for statistic, part in (
            ("median", 1.0),
            ("median_low", 0.97),
            ("median_high", 1.04),
            ("p10", 0.9),
            ("p90", 1.2),
        ):
            file.add("latency", factor * part, "ms", n=10, method="made up", **where, statistic=statistic)
        if name != baseline:
            for statistic, part in (("median", 1.0), ("low", 0.96), ("high", 1.05)):
                condition = where | {"reference": baseline, "statistic": statistic}
                file.add("latency_ratio", milliseconds * part, "ratio", n=10, method="made up", **condition)
    method = f"estimate (CPU load x TDP 8 W; whole machine; {0.5 + milliseconds / 50:.1f} s; CodeCarbon)"
    for metric, unit, scale in (("inference_energy", "kWh", 1e-6), ("inference_carbon", "kgCO2e", 4.75e-7)):
        condition = {"scope": "machine", "source": "estimate"}
        file.add(metric, milliseconds * scale, f"{unit} per 1000 images", n=1000, method=method, **condition)


def _history(path: Path, rng: np.random.Generator, epochs: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["epoch", "validation_top1", "train_loss", "train_top1"])
        writer.writerow([0, 10.0, "", ""])
        for epoch in range(1, epochs + 1):
            top1 = 100 - 90 / (1 + epoch) + rng.normal()
            writer.writerow([epoch, f"{top1:.3f}", f"{2.3 / epoch + 0.05 * rng.random():.4f}", f"{top1 + 1:.3f}"])
