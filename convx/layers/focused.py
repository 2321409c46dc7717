"""Focused convolutions: after one layer of a trained network, only what matters of each image is computed.

Tung et al., ASP-DAC 2024, arXiv 2310.07782, and AICAS 2022, arXiv 2207.10741. The brightness of the activations z of that
layer, B(y, x) = sum over c of max(0, z_c(y, x)), is compared with a threshold: M = [B >= threshold]. Every later convolution
computes its outputs in the region of M and has the fill everywhere else. The region of an image goes with its values from
layer to layer (``focused_map``), so that no module holds any of it.
"""

import math

import torch
from torch import nn

from .focused_carrier import Passing
from .focused_layouts import Crops
from .focused_map import FocusedMap
from .focused_official import OfficialMap
from .focused_regions import Region, bounding_boxes, brightness, moved, scaled, tile_mask

CHOICES = {
    "region": ("bbox", "tiles", "mask", "input", "whole"),
    "fill": ("zero", "bias"),
    "halo": ("exact", "zero", "official"),
    "pooling": ("masked", "plain"),
    "place": ("bright", "random", "centre", "given", "given_random", "given_centre"),
    "backend": ("auto", "crop", "tiles", "dense"),
}
DEFAULTS = {
    "region": "bbox",
    "fill": "zero",
    "halo": "exact",
    "pooling": "masked",
    "place": "bright",
    "keep": None,
    "coverage": 1.0,
    "tile": 16,
    "dense_above": 0.9,
    "backend": "auto",
    "seed": 0,
}


class Found(Exception):
    """Carries a region from the insertion point to the network: only the region is wanted, or the image is to be cropped."""

    def __init__(self, found):
        super().__init__()
        self.found = found


class Focus(nn.Module):
    """The threshold layer: activations [B, C, H, W] in, a map of the region of each image out.

    ``region``: "bbox", the bounding box of M; "tiles", the tiles of ``tile`` pixels that hold a pixel of M; "mask", M itself;
    "input" crops the image instead, at the box; "whole" skips nothing: the dense network that the others are measured by.
    ``place``: the box as found ("bright"), moved ("random", "centre") or "given" with the images, or given and moved
    ("given_random", "given_centre"). ``keep`` replaces the threshold by the share of brightest pixels of each image. ``coverage``:
    see ``bounding_boxes``. An image whose region covers more than ``dense_above`` of the grid is computed densely, as is one
    without a bright pixel. ``backend`` "crop", "tiles" or "dense" forces how a region is computed; "auto" takes what
    ``costs`` says is fastest. None of them changes the result. ``halo``: "exact", true neighbours around the region at the
    first layer; "zero", zeros; "official", what the public code does.
    """

    def __init__(self, threshold: float | None = None, place_in_order: int = 0, **settings):
        super().__init__()
        self.settings = DEFAULTS | settings
        self.place_in_order = place_in_order
        self.register_buffer("threshold", torch.tensor(math.nan if threshold is None else float(threshold)))
        self.costs: dict = {}

    def brightness(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        """Return what the threshold is compared with, [B, H, W]; the public code sums negative activations too."""
        return z_BCHW.sum(1) if self.settings["halo"] == "official" else brightness(z_BCHW)

    def bright(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        """Return M, bool [B, H, W]."""
        shine = self.brightness(z_BCHW)
        if (keep := self.settings["keep"]) is not None:
            count = max(1, round(keep * shine[0].numel()))
            return shine >= shine.flatten(1).topk(count).values[:, -1].view(-1, 1, 1)
        threshold = self.threshold.to(shine.dtype)
        if bool(threshold.isnan()):
            raise ValueError("threshold: this focused network has none yet; give one, give keep, or calibrate it")
        return shine >= threshold

    def boxes(self, z_BCHW: torch.Tensor, given=None, source=None) -> tuple[list, torch.Tensor | None]:
        """Return ([box or None for an empty mask], M or None where the boxes were given)."""
        size, (way, _, where) = tuple(z_BCHW.shape[2:]), self.settings["place"].partition("_")
        if way == "given":
            if given is None:
                raise ValueError(
                    "boxes: this network computes given regions; call it with boxes=[B, 4] (left, top, right, bottom)"
                )
            rows = given.tolist() if isinstance(given, torch.Tensor) else given
            boxes, mask = [scaled((y1, y2, x1, x2), source, size) for x1, y1, x2, y2 in rows], None
        else:
            mask = self.bright(z_BCHW)
            boxes, where = bounding_boxes(mask, self.settings["coverage"]), "" if way == "bright" else way
        if where:
            draws = (brightness(z_BCHW).flatten(1).argmax(1) + self.settings["seed"]).tolist()
            boxes, mask = [box and moved(box, size, where, draw) for box, draw in zip(boxes, draws)], None
        return boxes, mask

    def region(self, z_BCHW: torch.Tensor, given=None, source=None) -> Region:
        """Return the region of each image on the grid of z; of an image that is computed densely it is the whole grid."""
        size, kind = tuple(z_BCHW.shape[2:]), self.settings["region"]
        if kind == "whole":
            return Region(((0, size[0], 0, size[1]),) * len(z_BCHW), size, device=z_BCHW.device)
        found, mask = self.boxes(z_BCHW, given, source)
        everything = (0, size[0], 0, size[1])
        most = self.settings["dense_above"] * size[0] * size[1]
        if kind in ("tiles", "mask"):
            if mask is None:
                box_region = Region(tuple(box or everything for box in found), size, device=z_BCHW.device)
                mask = box_region.full_mask()[:, 0]
            mask = tile_mask(mask, self.settings["tile"]) if kind == "tiles" else mask[:, None]
            found = bounding_boxes(mask[:, 0])
            whole = [box is None or kept > most for box, kept in zip(found, mask.flatten(1).sum(1).tolist())]
            mask = mask | torch.tensor(whole, device=mask.device).view(-1, 1, 1, 1)
        else:
            whole = [box is None or (box[1] - box[0]) * (box[3] - box[2]) > most for box in found]
            mask = None
        boxes = tuple(everything if dense else box for dense, box in zip(whole, found))
        region = Region(boxes, size, mask, None, self.costs, self.settings["backend"], z_BCHW.device)
        region.tile = self._tile(region)
        return region

    def _tile(self, region: Region) -> int | None:
        backend, side = self.settings["backend"], self.settings["tile"]
        if backend == "tiles":
            return side
        if backend != "auto" or region.mask is None:
            return None
        grid = region.size[0] * region.size[1]
        canvases = sum(len(g.images) * g.size[0] * g.size[1] + region.overhead for g in region.groups())
        tiles = float(tile_mask(region.mask[:, 0], side).sum()) + region.overhead
        factor = self.costs.get(region.size, {}).get("tiles", 1.5)
        return side if factor * tiles < min(canvases, grid * len(region.boxes)) else None

    def forward(self, z, report: list | None = None):
        given = source = stop = None
        if isinstance(z, Passing):
            if z.dense:
                return z.values
            z, given, report, source, stop = z.values, z.boxes, z.report, z.source, z.stop
        if not isinstance(z, torch.Tensor) or z.dim() != 4:
            raise ValueError(
                f"after: its output is {getattr(z, 'shape', type(z).__name__)}, a map [B, C, H, W] is needed"
            )
        if stop in ("brightness", "activations"):
            raise Found(self.brightness(z) if stop == "brightness" else z)
        if self.settings["region"] == "whole" and not stop and report is None:
            return z
        if self.settings["halo"] == "official" and not stop:
            if report is not None:
                report.append(self.region(z, given, source))
            boxes, _ = self.boxes(z, given, source)
            return OfficialMap(z, boxes, tuple(z.shape[2:]), report)
        region = self.region(z, given, source)
        if report is not None:
            report.append(region)
        if stop or self.settings["region"] == "input":
            raise Found(region)
        if (all(box == (0, region.size[0], 0, region.size[1]) for box in region.boxes) and region.mask is None) or (
            region.mask is not None and bool(region.mask.all())
        ):
            return z  # everything is dense: the network as it is
        common = {key: self.settings[key] for key in ("fill", "pooling")}
        whole = FocusedMap(region, Crops.whole(region), [z], true=True, **common)
        return whole if self.settings["halo"] == "exact" else whole.settled()
