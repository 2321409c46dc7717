"""Speed of convx's engine against the loop that everybody writes: the same model, fed by a torchvision-style DataLoader.

Both sides run in one process and take turns, a few steps each, in random order; the ratio of their medians has an interval
from resampled turns. The plain side is a ``Dataset`` that opens each image with Pillow, torchvision transforms, a shuffling
``DataLoader`` with worker processes, plain fp32 in torch's default memory format, and ``loss.item()`` at every step.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from convx import config
from convx.data import open_set, prepare
from convx.manifest import processor, processor_features
from convx.report.tables import markdown
from convx.runs import build_model
from convx.seeds import generator
from convx.statistics import ratio_of_medians_interval
from convx.training import Trainer

HEADER = [
    "variant",
    "what",
    "batch",
    "convx images/s",
    "plain loop images/s",
    "ratio",
    "95 % interval",
    "device",
    "threads",
    "precision",
]


class PillowImages(Dataset):
    """Images one by one through Pillow and torchvision, as torchvision's own data sets give them."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, meta: dict, training: dict, train: bool):
        self.images, self.labels = images, labels
        steps = []
        if train and training["crop_padding"]:
            steps.append(transforms.RandomCrop(meta["image_size"], padding=training["crop_padding"]))
        if train and training["flip"]:
            steps.append(transforms.RandomHorizontalFlip())
        steps += [transforms.ToTensor(), transforms.Normalize(meta["mean"], meta["std"])]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = self.images[index]
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        return self.transform(picture), int(self.labels[index])


def _forever(loader: DataLoader):
    while True:
        yield from loader


@dataclass
class Side:
    """One contender: a function that does one step and returns the number of images it took."""

    step: object
    device: torch.device

    def turn(self, steps: int) -> float:
        """Return images per second over a turn, the device waited for at its end."""
        start, images = time.perf_counter(), 0
        for _ in range(steps):
            images += self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return images / (time.perf_counter() - start)


def _plain_training(recipe: dict, data_folder: Path, device: torch.device, workers: int) -> Side:
    training, data = recipe["training"], open_set(data_folder)
    model = build_model(recipe, data.meta).to(device)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=training["lr"],
        momentum=training["momentum"],
        nesterov=True,
        weight_decay=training["weight_decay"],
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=training["label_smoothing"])
    images, labels = data.split("train")
    dataset = PillowImages(images, labels, data.meta, training, train=True)
    loader = DataLoader(
        dataset,
        training["batch_size"],
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
    )
    batches = _forever(loader)
    model.train()

    def step() -> int:
        x, y = next(batches)
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        loss.item()
        return len(y)

    return Side(step, device)


def _our_training(recipe: dict, data_folder: Path) -> Side:
    trainer = Trainer(recipe, data_folder)
    trainer.objective.train()

    def batches():
        epoch = 0
        while True:
            for _, images, labels, rng in trainer.batches.epoch(epoch):
                if len(labels) == recipe["training"]["batch_size"]:
                    yield images, labels, rng
            epoch += 1

    stream = batches()

    def step() -> int:
        images, labels, rng = next(stream)
        trainer.train_step(images, labels, rng)
        return len(labels)

    return Side(step, trainer.device)


def _plain_inference(recipe: dict, data_folder: Path, device: torch.device, workers: int, batch: int) -> Side:
    data = open_set(data_folder)
    model = build_model(recipe, data.meta).to(device).eval()
    images, labels = data.split("test")
    dataset = PillowImages(images, labels, data.meta, recipe["training"], train=False)
    loader = DataLoader(dataset, batch, num_workers=workers, persistent_workers=workers > 0)
    batches = _forever(loader)

    @torch.no_grad()
    def step() -> int:
        x, y = next(batches)
        (model(x.to(device)).argmax(1) == y.to(device)).sum().item()
        return len(y)

    return Side(step, device)


def _our_inference(recipe: dict, data_folder: Path, device: torch.device, batch: int) -> Side:
    from convx.evaluate import EvaluationData
    from convx.surgery import fold

    data = open_set(data_folder)
    channels_last = recipe["training"]["channels_last"]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = fold(build_model(recipe, data.meta)).to(device, memory_format=memory_format).eval()
    images, labels = data.split("test")
    meta = data.meta
    evaluation = EvaluationData.from_arrays(images, labels, meta["mean"], meta["std"], device, batch, channels_last)

    def batches():
        while True:
            yield from evaluation.batches()

    stream = batches()

    @torch.inference_mode()
    def step() -> int:
        x, y = next(stream)
        (model(x).argmax(1) == y).sum()
        return len(y)

    return Side(step, device)


def interleave(ours: Side, plain: Side, turns: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images per second of each turn for both sides, which take turns in random order after one warm-up turn each."""
    ours.turn(steps)
    plain.turn(steps)
    rates = {"ours": [], "plain": []}
    rng = generator(0, "bench order")
    for _ in range(turns):
        sides = [("ours", ours), ("plain", plain)]
        if torch.rand((), generator=rng) < 0.5:
            sides.reverse()
        for name, side in sides:
            rates[name].append(side.turn(steps))
    return np.array(rates["ours"]), np.array(rates["plain"])


def run(
    study_file: str,
    variants: list[str],
    turns: int,
    steps: int,
    workers: int,
    threads: int | None,
    data_root: str,
) -> list[dict]:
    """Measure training and inference of variants of a study; returns one row each.

    ``threads`` overrides the recipe's thread count on both sides alike (None keeps it).
    """
    study = config.load_study(study_file)
    folder = Path(data_root) / config.data_key(study["data"])
    if not (folder / "meta.json").exists():
        prepare(study["data"], folder, mirrors=study["mirror"])
    rows = []
    for name in variants or list(study["variants"]):
        if name not in study["variants"]:
            raise config.ConfigError(
                f"{study_file}: variant {name!r} is not in the study{config.nearest(name, study['variants'])}"
            )
        recipe = config.resolve(study, name, config.seeds(study, name)[0])
        if (objective := recipe["objective"]["name"]) != "supervised":
            if variants:
                raise config.ConfigError(
                    f"{study_file}: {name} is trained by {objective}; the plain loop is supervised"
                )
            continue
        recipe["training"] |= {"threads": threads or recipe["training"]["threads"], "epochs": 10_000}
        ours = _our_training(recipe, folder)
        device, batch = ours.device, recipe["training"]["batch_size"]
        pairs = {"training": (ours, _plain_training(recipe, folder, device, workers), batch)}
        wide = study["evaluate"]["batch_size"]
        pairs["inference"] = (
            _our_inference(recipe, folder, device, wide),
            _plain_inference(recipe, folder, device, workers, wide),
            wide,
        )
        for what, (our_side, plain_side, size) in pairs.items():
            fast, slow = interleave(our_side, plain_side, turns, steps)
            ratio = ratio_of_medians_interval(fast, slow)
            rows.append(
                {
                    "variant": name,
                    "what": what,
                    "batch": size,
                    "convx images/s": float(np.median(fast)),
                    "plain loop images/s": float(np.median(slow)),
                    "ratio": ratio.estimate,
                    "low": ratio.low,
                    "high": ratio.high,
                    "device": str(device),
                    "threads": recipe["training"]["threads"],
                    "precision": recipe["training"]["precision"],
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table with the machine above it."""
    text = [
        [
            r["variant"],
            r["what"],
            r["batch"],
            f"{r['convx images/s']:.0f}",
            f"{r['plain loop images/s']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['low']:.2f} to {r['high']:.2f}",
            r["device"],
            r["threads"],
            r["precision"],
        ]
        for r in rows
    ]
    machine = f"{processor()} ({', '.join(processor_features()) or 'no AVX'}), torch {torch.__version__}\n\n"
    return machine + markdown(HEADER, text)
