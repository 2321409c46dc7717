"""Which network of the paper's grid a variant is: frozen or learned, expansion, kernel size, width. No torch.

Read from what a variant declares, not from its name, so that a study's own variants take their places in the figures.
"""

import re
from dataclasses import dataclass

from convx import config
from convx.scale import shorten

RESNET = re.compile(r"^resnet(?P<depth>\d+)_(?P<width>\d+)(?:_k(?P<kernel>\d+))?$")
PLAIN_BLOCK = {"layers": "*", "bank": "iid_uniform", "middle": "none", "form": "dense", "start": "random"}


@dataclass(frozen=True)
class Network:
    """A variant in the grid; ``expansion`` is 0 for the network without linear combinations."""

    variant: str
    depth: int
    width: int
    kernel: int
    expansion: int
    frozen: bool
    lr: float

    @property
    def span(self) -> float:
        """Return c_out E / (c_in k^2) of the layers that keep their width, most of the network."""
        return self.expansion / self.kernel**2


def network(study: dict, variant: str) -> Network | None:
    """Return the place of a variant in the grid of the paper's figures, or None for anything beside it.

    Beside it are other hosts, banks, middle operations and forms, other starts, and recipes that differ from `train` in more
    than the learning rate.
    """
    settings = config.variant_settings(study, variant)
    host = RESNET.match(settings["model"]["name"])
    training, recipe = (
        config.training_settings(study, variant),
        shorten(config.recipe_defaults() | study["recipes"].get("train", {}), study.get("scale", 1)),
    )
    free = ("lr", "checkpoints", "threads")
    same = all(training[key] == value for key, value in recipe.items() if key not in free)
    if not host or settings["start_from"] or not same or settings["objective"]["name"] != "supervised":
        return None
    place = _surgery(settings["surgery"])
    if place is None:
        return None
    depth, width, kernel = (int(host[key] or 3) for key in ("depth", "width", "kernel"))
    return Network(variant, depth, width, kernel, *place, training["lr"])


def _surgery(steps: list[dict]) -> tuple[int, bool] | None:
    """Return (expansion, frozen) of a variant's surgery, or None where it is of another kind."""
    if not steps:
        return 0, False
    if len(steps) > 1:
        return None
    step = PLAIN_BLOCK | steps[0]
    if step["verb"] == "freeze_spatial" and step["layers"] == "*":
        return 0, True
    if step["verb"] == "linear_combinations" and all(step[key] == value for key, value in PLAIN_BLOCK.items()):
        return int(step.get("expansion", 1)), bool(step.get("frozen", True))
    return None


def networks(study: dict) -> list[Network]:
    """Return the networks of a study that have a place in the grid, in the study's order."""
    return [found for name in study["variants"] if (found := network(study, name))]


def beside_baseline(study: dict, grid: list[Network]) -> list[Network]:
    """Return the networks of the grid that differ from the study's baseline in surgery alone: none where that is elsewhere."""
    base = next((n for n in grid if n.variant == study["baseline"]), None)
    if base is None:
        return []
    wanted = (base.depth, base.width, base.kernel, base.lr)
    return [n for n in grid if (n.depth, n.width, n.kernel, n.lr) == wanted]


def rank_thresholds(kernel: int, image_channels: int, width: int) -> dict[str, int]:
    """Return the smallest expansion from which random filters span every kernel, for each kind of layer.

    c_out E >= c_in k^2: the stem (c_in image channels), layers that keep their width, layers that double it.
    """
    shares = {"stem": (image_channels, width), "doubling layers": (1, 2), "layers of equal width": (1, 1)}
    return {name: -(-c_in * kernel**2 // c_out) for name, (c_in, c_out) in shares.items()}
