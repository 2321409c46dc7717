"""CIFAR-10 objects at random places of larger canvases: where the object is, and how much does not matter, is known.

Every picture of CIFAR-10 is resized to a share of the canvas's area and put on a background of its own. Place and
background of a picture are drawn from its split and number alone, so they are the same for each run, seed and choice.
"""

import math

import numpy as np

from convx.data.pixels import resize_block
from convx.data.readers import RawSet, read_cifar
from convx.data.sets import SETS, SetFacts
from convx.data.sources import Finder

BACKGROUNDS = ("clutter", "noise", "flat")
PATCH = 8  # pixels of the pieces of other pictures that clutter is made of
BLOCK = 500
DEFAULTS = {"share": 0.52, "background": "clutter"}


def canvas_settings(value: dict | None) -> dict:
    """Return the complete settings of a canvas; ValueError names a wrong key or value."""
    settings = DEFAULTS | (value or {})
    if unknown := sorted(set(settings) - set(DEFAULTS)):
        raise ValueError(f"data.canvas.{unknown[0]}: unknown key; valid: {', '.join(DEFAULTS)}")
    if not 0 < settings["share"] <= 1:
        raise ValueError(f"data.canvas.share: {settings['share']} is not a share of the canvas, above 0 and at most 1")
    if settings["background"] not in BACKGROUNDS:
        raise ValueError(
            f"data.canvas.background: {settings['background']!r} is unknown; valid: {', '.join(BACKGROUNDS)}"
        )
    return settings


def read_canvas(facts: SetFacts, finder: Finder, settings: dict) -> RawSet:
    """CIFAR-10 on canvases of ``image_size`` pixels; the test boxes are those of the objects."""
    canvas, side = canvas_settings(settings["canvas"]), settings["image_size"] or facts.image_size
    raw = read_cifar(SETS["cifar10"], finder, settings)
    height = min(side, max(1, round(math.sqrt(canvas["share"]) * side)))
    objects = {}

    def pixels(split: str) -> np.ndarray:
        if split not in objects:  # all of them once: clutter takes pieces of any
            rows = np.arange(len(raw.labels[split]))
            objects[split] = np.concatenate([block for _, block in raw.blocks(split, rows)])
        return objects[split]

    def blocks(split: str, rows: np.ndarray):
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            yield (
                slice(start, start + len(part)),
                np.stack([_picture(pixels(split), split, row, side, height, canvas) for row in part]),
            )

    boxes = np.array([_place("test", row, side, height) for row in range(len(raw.labels["test"]))], float)
    boxes = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 1] + height, boxes[:, 0] + height], 1)
    share, ground = 100 * (height / side) ** 2, canvas["background"]
    return RawSet(
        labels=raw.labels,
        blocks=blocks,
        native_size=side,
        class_names=raw.class_names,
        source=raw.source,
        provenance=f"CIFAR-10 at {height}x{height} ({share:.0f} % of the area) on canvases of {side}x{side}, {ground}",
        test_boxes=boxes,
        extra={"canvas": canvas},
    )


def _draws(split: str, row: int) -> np.random.Generator:
    return np.random.default_rng([20722, {"train": 0, "test": 1}[split], int(row)])


def _place(split: str, row: int, side: int, height: int) -> tuple[int, int]:
    """Return (top, left) of an object."""
    y, x = _draws(split, row).integers(0, side - height + 1, 2)
    return int(y), int(x)


def _picture(pixels_NHWC: np.ndarray, split: str, row: int, side: int, height: int, canvas: dict) -> np.ndarray:
    """Return one canvas, uint8 [side, side, 3]."""
    draws = _draws(split, row)
    y, x = draws.integers(0, side - height + 1, 2)
    if canvas["background"] == "noise":
        picture = draws.integers(0, 256, (side, side, 3), dtype=np.uint8)
    elif canvas["background"] == "flat":
        picture = np.broadcast_to(draws.integers(0, 256, 3, dtype=np.uint8), (side, side, 3)).copy()
    else:
        cells = -(-side // PATCH)
        which = draws.integers(0, len(pixels_NHWC), (cells, cells))
        top, left = draws.integers(0, 32 - PATCH + 1, (2, cells, cells))
        at = np.arange(PATCH)
        pieces = pixels_NHWC[
            which[..., None, None], (top[..., None] + at)[..., None], (left[..., None] + at)[..., None, :]
        ]
        picture = pieces.transpose(0, 2, 1, 3, 4).reshape(cells * PATCH, cells * PATCH, 3)[:side, :side].copy()
    picture[y : y + height, x : x + height] = resize_block(pixels_NHWC[row][None], height)[0]
    return picture
