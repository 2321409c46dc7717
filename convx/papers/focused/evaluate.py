"""What a focused network says beyond its accuracy: how much of each image it computes, and what that changes.

Called with every variant of this paper. The network without focus is inside it, so predictions are compared image by image.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from convx.evaluate import EvaluationData, Result, evaluation_mode, row
from convx.layers.focused_network import Focused
from convx.objectives.calibrated import flip_bound

MOST_KEPT = 90.0  # percent of the map, the mean over images: a network that skips less says nothing about focus
PICTURES = 6  # of which the region is kept, for the figure
PICTURE_SIDE = 96  # pixels of a kept picture at most


def run(model: nn.Module, recipe: dict, data: EvaluationData) -> Result:
    """Return rows and arrays of a focused network on the test images.

    Rows: ``aoi`` (percent of the map at the insertion point that is kept, by ``statistic``: mean, median, p10, p90),
    ``irrelevant_pixels`` (100 - the mean), ``disagreement`` (percent of predictions that differ from those without focus,
    and the one-sided 95 % bound on it), ``fallback_rate`` (percent of images computed densely; of the official behaviour
    percent of its convolutions, by ``cause``), ``threshold``, ``precondition`` (name skips, 1 or 0, the method says why),
    and, where objects have boxes, ``region_iou`` (mean overlap of the region's box with the object's). Arrays: ``aoi`` [N]
    in percent, ``changed`` [N], ``right`` [N], ``pictures`` [P, H, W, C] in 0..1 with ``regions`` [P, H, W], the kept share.
    """
    if not isinstance(model, Focused) or model.whole:  # the network without focus
        return Result([])
    aoi, changed, right, overlap, report = [], [], [], [], []
    official = model.focus[0].settings["halo"] == "official"
    with evaluation_mode(model), torch.inference_mode():
        done = 0
        for x, labels in data.batches():
            boxes = None if data.boxes is None else data.boxes[done : done + len(x)]
            out, region, notes = model.with_region(x, boxes if model.takes_boxes else None)
            report += notes
            area = region.size[0] * region.size[1]
            aoi += [100 * kept / area for kept in region.kept]
            found = out.argmax(1)
            changed += (found != model.dense(x).argmax(1)).tolist()
            right += (found == labels).tolist()
            if boxes is not None:
                overlap += [
                    _iou(box, known, region.size, x.shape[2:]) for box, known in zip(region.boxes, boxes.tolist())
                ]
            done += len(x)
        arrays = _pictures(model, data)
    n, flips = len(aoi), sum(changed)
    where = {"after": model.after[int(model.depth)]}
    said = f"kept share of the map after {where['after']}"
    statistics = {
        "mean": np.mean(aoi),
        "median": np.median(aoi),
        "p10": np.quantile(aoi, 0.1),
        "p90": np.quantile(aoi, 0.9),
    }
    rows = [row("aoi", v, "%", n=n, split="test", method=said, statistic=k) for k, v in statistics.items()]
    rows.append(row("irrelevant_pixels", 100 - np.mean(aoi), "%", n=n, split="test", method=f"100 - mean {said}"))
    plain = "predictions that differ from those of the same network without focus"
    rows.append(row("disagreement", 100 * flips / n, "%", n=n, split="test", method=plain, statistic="estimate"))
    bound = "one-sided 95 % Clopper-Pearson bound on it"
    rows.append(
        row("disagreement", 100 * flip_bound(flips, n), "%", n=n, split="test", method=bound, statistic="upper95")
    )
    rows += _fallbacks(aoi, report, official, n)
    said = f"focus keeps {np.mean(aoi):.1f} % of the map on average (at most {MOST_KEPT:g} % wanted)"
    rows.append(row("precondition", float(np.mean(aoi) <= MOST_KEPT), "1", n=n, method=said, name="skips"))
    threshold = float(model.focus[int(model.depth)].threshold)
    shown = threshold if np.isfinite(threshold) else None
    method = "calibrated on images that are no test images" if shown is not None else "none: nothing is cut off"
    rows.append(row("threshold", shown, "1", method=f"sum over channels after {where['after']}, {method}"))
    if overlap:
        rows.append(
            row(
                "region_iou", np.mean(overlap), "1", n=n, split="test", method="box of the region and box of the object"
            )
        )
    arrays |= {"aoi": np.array(aoi), "changed": np.array(changed, float), "right": np.array(right, float)}
    return Result(rows, arrays=arrays)


def _fallbacks(aoi: list[float], report: list, official: bool, n: int) -> list[dict]:
    if not official:
        dense = 100 * sum(share >= 100 for share in aoi) / n
        said = "images computed densely: no bright pixel, or a region that is too large to gain by"
        return [row("fallback_rate", dense, "%", n=n, split="test", method=said, cause="image")]
    total, said = max(1, len(report)), "convolutions of single images that the public code would compute densely"
    shares = {cause: 100 * sum(what == cause for _, what in report) / total for cause in ("shape", "empty")}
    return [row("fallback_rate", v, "%", n=n, split="test", method=said, cause=k) for k, v in shares.items()]


def _iou(box, known, grid, size) -> float:
    """Return the intersection over union of a box on the grid and a known one in pixels of the image."""
    y1, y2, x1, x2 = (
        value * side / cells
        for value, side, cells in zip(box, (size[0],) * 2 + (size[1],) * 2, (grid[0],) * 2 + (grid[1],) * 2)
    )
    left, top, right, bottom = known
    inside = max(0.0, min(x2, right) - max(x1, left)) * max(0.0, min(y2, bottom) - max(y1, top))
    return inside / ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - inside)


def _pictures(model: Focused, data: EvaluationData) -> dict[str, np.ndarray]:
    sample = data.spread(PICTURES)
    pixels = torch.cat([images for images, _ in sample.raw_batches()]).float() / 255
    scale = max(1, -(-pixels.shape[-1] // PICTURE_SIDE))
    pixels = F.avg_pool2d(pixels, scale)
    x = torch.cat([x for x, _ in sample.batches()])
    region = model.region(x, **({"boxes": sample.boxes} if model.takes_boxes else {}))
    kept = F.interpolate(region.full_mask().float(), pixels.shape[2:], mode="nearest")[:, 0]
    return {"pictures": pixels.permute(0, 2, 3, 1).cpu().numpy(), "regions": kept.cpu().numpy()}
