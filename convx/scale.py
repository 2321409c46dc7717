"""The ``scale`` of a study: every schedule shortened by one factor, and the mark of it on everything that comes out. No torch.

Nothing of a shortened study mixes with the full one: its name, and so its results folder, carries the scale, every recipe
holds it (so that digests differ even where rounding leaves the epochs alone), and its ``reduced`` says it in all tables.
"""

import math

from convx.checks import recipe_defaults

LENGTHS = ("warmup_epochs", "decay_epochs")  # of a recipe, in epochs that need not be whole


def scaled_epoch(epoch: int, scale: float) -> int:
    """Return an epoch on the shortened schedule: rounded, a half up, and 0 only for 0."""
    return epoch and max(1, math.floor(epoch * scale + 0.5))


def shorten(numbers: dict, scale: float) -> dict:
    """Return the training numbers of a recipe with every length in epochs times ``scale``."""
    if scale == 1:
        return numbers
    return (
        numbers
        | {"epochs": scaled_epoch(numbers["epochs"], scale)}
        | {key: round(numbers[key] * scale, 6) for key in LENGTHS}
        | {"decay_milestones": [round(epoch * scale, 6) for epoch in numbers["decay_milestones"]]}
        | {"checkpoints": sorted({scaled_epoch(epoch, scale) for epoch in numbers["checkpoints"]})}
    )


def mark(study: dict) -> dict:
    """Return a checked study with its scale in its name and in ``reduced``; a study that has the marks is left as it is."""
    scale = study["scale"]
    if scale == 1:
        return study
    suffix = f"_scale{100 * scale:g}".replace(".", "p").replace("-", "m").replace("+", "")
    written = {name: (recipe_defaults() | recipe)["epochs"] for name, recipe in study["recipes"].items()}
    epochs = ", ".join(f"{name} {scaled_epoch(number, scale)} of {number} epochs" for name, number in written.items())
    text = f"every schedule times {scale:g} ({epochs})"
    name, reduced = study["study"], study["reduced"]
    return study | {
        "study": name if name.endswith(suffix) else name + suffix,
        "reduced": reduced if text in reduced else "; ".join(filter(None, [reduced, text])),
    }
