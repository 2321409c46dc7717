"""Calibration of a focused network: threshold and insertion depth that change few enough of its predictions.

No weight is trained. The threshold of ``convx.focus`` is the largest of a fixed ascending sequence for which a one-sided
Clopper-Pearson bound on the share of changed predictions stays below ``max_flips``; testing stops at the first that fails
(fixed-sequence testing, so that the sequence costs no confidence), and several depths share the error rate (Bonferroni).
The images are the validation split's, never the test images.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convx.manifest import Failure
from convx.objectives import Objective

BATCH = 25
COUNTED = 16  # images that the multiply-accumulates of a depth are counted on
NEVER = -torch.inf  # a threshold that keeps every pixel: the network stays dense


def flip_bound(flips: int, images: int, confidence: float = 0.95) -> float:
    """Return the one-sided upper Clopper-Pearson bound on a share of which ``flips`` of ``images`` were seen."""
    from scipy import special

    if not 0 <= flips <= images or images < 1:
        raise ValueError(f"flips: {flips} of {images} images")
    return 1.0 if flips == images else float(special.betaincinv(flips + 1, images - flips, confidence))


def candidates(brightness_NHW: torch.Tensor, steps: int) -> list[float]:
    """Return ascending thresholds: quantiles of the brightness, closer together where little is left."""
    values = brightness_NHW.flatten()
    values = values[:: max(1, len(values) // 1_000_000)].double()
    levels = 1 - torch.logspace(0, -2.5, steps + 1, dtype=torch.float64)[:-1] * 0.95
    return sorted(set(torch.quantile(values, levels).float().tolist()))


@torch.inference_mode()
def calibrate(model: nn.Module, batches: list[torch.Tensor], max_flips=0.05, confidence=0.95, steps=8) -> list[dict]:
    """Set threshold and depth of a focused network in place; return one row for each pair that was tested.

    ``batches``: model inputs [B, C, H, W]. Of the depths, the one whose chosen threshold costs the fewest
    multiply-accumulates is taken. A row: depth, after, threshold, kept (mean share of the map), dense (share of images
    computed densely), flips, images, bound, passed, macs (of the chosen threshold of a depth, else None), chosen.
    """
    expected = torch.cat([model.dense(x).argmax(1) for x in batches])
    level, rows = 1 - (1 - confidence) / len(model.focus), []
    for depth, focus in enumerate(model.focus):
        model.depth.fill_(depth)
        shine = torch.cat([model.brightness(x) for x in batches])
        last = None
        for threshold in candidates(shine, steps):
            focus.threshold.fill_(threshold)
            row = _tested(model, batches, expected, level, max_flips)
            rows.append({"depth": depth, "after": model.after[depth], "threshold": threshold} | row)
            if not row["passed"]:
                break
            last = rows[-1]
        focus.threshold.fill_(last["threshold"] if last else NEVER)
        if last is None:
            rows.append(rows[-1] | {"threshold": NEVER, "kept": 1.0, "dense": 1.0, "flips": 0, "passed": True})
            rows[-1]["bound"] = flip_bound(0, len(expected), level)
        place = rows.index(last) if last else len(rows) - 1
        rows[place]["macs"] = _macs(model, torch.cat(batches)[:: max(1, len(expected) // COUNTED)][:COUNTED])
    best = min((row for row in rows if row["macs"] is not None), key=lambda row: row["macs"])
    best["chosen"] = True
    model.depth.fill_(best["depth"])
    return rows


def _tested(model, batches, expected, level: float, max_flips: float) -> dict:
    kept, dense, found = [], [], []
    for x in batches:
        out, region, _ = model.with_region(x)
        area = region.size[0] * region.size[1]
        kept += [pixels / area for pixels in region.kept]
        dense += [pixels == area for pixels in region.kept]
        found.append(out.argmax(1))
    flips = int((torch.cat(found) != expected).sum())
    bound = flip_bound(flips, len(expected), level)
    shares = {"kept": sum(kept) / len(kept), "dense": sum(dense) / len(dense)}
    numbers = {"flips": flips, "images": len(expected), "bound": bound, "passed": bound <= max_flips}
    return shares | numbers | {"macs": None, "chosen": False}


def _macs(model, images: torch.Tensor) -> float:
    with torch.inference_mode(False), torch.no_grad():
        total = 0
        for x in images.clone().split(1):
            with FlopCounterMode(display=False) as counter:
                model(x)
            total += counter.get_total_flops() // 2
    return total / len(images)


class Calibrated(Objective):
    """Calibrates when it is made; there is nothing to train, so ``epochs`` is 0."""

    def __init__(self, model: nn.Module, settings: dict, data):
        super().__init__()
        from convx.layers.focused_network import Focused

        if not isinstance(model, Focused):
            raise ValueError("objective.name: calibrated is for focused networks (surgery verb focus)")
        images, _ = data.split("validation")
        if not len(images):
            raise Failure("calibration needs images that are not test images: set data.validation above 0")
        count = settings.pop("images", None) or len(images)
        model = model.to(data.device).eval()
        batches = [data.normalise(images[k : k + BATCH]) for k in range(0, min(count, len(images)), BATCH)]
        self.model = model
        self.rows = calibrate(model, [x[: count - BATCH * k] for k, x in enumerate(batches)], **settings)
        self.chosen = next(row for row in self.rows if row["chosen"])

    def exported(self) -> nn.Module:
        return self.model

    def validation(self, model, data, images, labels) -> dict:
        """Return the chosen point as columns of the history."""
        return {
            f"calibration_{key}": self.chosen[key] for key in ("after", "threshold", "kept", "flips", "images", "bound")
        }

    def forward(self, images, labels, rng, progress):
        raise Failure("a calibrated network is not trained: set training.epochs to 0")


def create(model: nn.Module, settings: dict, training: dict, data) -> Calibrated:
    """Build the objective. ``settings``: ``max_flips`` (0.05), ``confidence`` (0.95), ``steps`` (8), ``images`` (all)."""
    for name in settings:
        if name not in ("max_flips", "confidence", "steps", "images"):
            raise ValueError(f"objective.{name}: calibrated has max_flips, confidence, steps and images")
    if training["epochs"]:
        raise ValueError("training.epochs: calibrated trains nothing; set it to 0")
    return Calibrated(model, settings, data)
