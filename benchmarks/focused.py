"""Latency of a focused VGG-16 against the dense network and against the public package, paired in one process.

A network of the shape of VGG-16 (random weights, no batch normalisation, 224 px), focused after its first four layers. Images
are noise in a box and black beside it, and the first two layers have no bias, so that the bright region, which both sides
find themselves by their threshold, is a box of known area. Early part, mask and classifier are counted; all sides share
weights, inputs and memory format. `python benchmarks/focused.py` prints one Markdown table; `focusedconv` is left out
where it is not installed.
"""

import argparse
import copy
import random
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

import convx
from convx.evaluate.latency import paired
from convx.statistics import ratio_of_medians_interval

WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
SIDE = 224
THRESHOLD = 1e-6
SPREAD = 2  # pixels that the two first layers see beyond the noise


def vgg16() -> nn.Module:
    """Return the network: features, 7x7 map, three fully connected layers."""
    torch.manual_seed(0)
    layers, channels = [], 3
    for width in WIDTHS:
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    head = [
        nn.Linear(512 * 49, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, 1000),
    ]
    for conv in (layers[0], layers[2]):
        nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Sequential(*head)).eval().requires_grad_(False)


class Public(nn.Module):
    """The public package on the same layers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        import focusedconv

        model = copy.deepcopy(model)
        self.head = model[1:]
        self.network, _ = focusedconv.build_focused_model(_Features(model[0]), model[0][:4], THRESHOLD, model[0][4:])

    def forward(self, x):
        return self.head(self.network.features(x))


class _Features(nn.Module):
    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features


def boxes(share: float, batch: int) -> list[tuple[int, int, int, int]]:
    """Return a box (left, top, right, bottom) of this share of the area for each image; a square for a single one."""
    draws, found = random.Random(0), []
    for _ in range(batch):
        side = share**0.5 * SIDE
        height = round(side if batch == 1 else min(SIDE, side * draws.uniform(0.75, 1.35)))
        width = min(SIDE, round(share * SIDE * SIDE / height))
        y, x = draws.randint(0, SIDE - height), draws.randint(0, SIDE - width)
        if batch == 1:
            y = x = (SIDE - height) // 2
        found.append((x, y, x + width, y + height))
    return found


def measure(share: float, batch: int, seconds: float, channels_last: bool) -> dict[str, np.ndarray]:
    """Return {side: milliseconds [rounds]} of one condition."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = vgg16().to(memory_format=memory_format)
    focused = convx.focus(model, "0.3", threshold=THRESHOLD)
    x = torch.zeros(batch, 3, SIDE, SIDE)
    for image, (left, top, right, bottom) in zip(x, boxes(share, batch)):
        inner = slice(top + SPREAD, bottom - SPREAD), slice(left + SPREAD, right - SPREAD)
        image[:, inner[0], inner[1]] = torch.randn_like(image[:, inner[0], inner[1]])
    x = torch.randn_like(x) if share == 1 else x
    x = x.contiguous(memory_format=memory_format)
    kept = sum(focused.region(x).kept) / (batch * SIDE * SIDE)
    assert abs(kept - share) < 0.01, f"the region covers {kept:.3f}"
    calls = {"dense": lambda: model(x), "convx": lambda: focused(x)}
    if batch == 1 and find_spec("focusedconv"):  # the package takes single images
        public = Public(model)
        calls["focusedconv"] = lambda: public(x)
    with torch.inference_mode():
        return paired(calls, rounds=200, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each condition")
    parser.add_argument("--channels-last", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(
        "| batch | region | dense ms | convx / dense [95 %] | focusedconv / dense [95 %] | convx / focusedconv [95 %] |"
    )
    print("|" + " --- |" * 6)
    for batch, share in ((1, 0.5), (1, 0.25), (16, 0.25), (1, 1.0)):
        ms = measure(share, batch, a.seconds * (2 if batch > 1 else 1), a.channels_last)
        pairs = [("convx", "dense"), ("focusedconv", "dense"), ("convx", "focusedconv")]
        cells = []
        for ours, other in pairs:
            if ours not in ms or other not in ms:
                cells.append("-")
                continue
            found = ratio_of_medians_interval(ms[ours], ms[other])
            cells.append(f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]")
        print(
            f"| {batch} | {100 * share:.0f} % | {np.median(ms['dense']):.1f} | " + " | ".join(cells) + " |", flush=True
        )


if __name__ == "__main__":
    main()
