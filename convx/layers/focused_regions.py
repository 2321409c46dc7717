"""Regions of interest of a batch: found once from activations, then handed from resolution to resolution.

Focused convolutions (Tung et al. 2024, arXiv 2310.07782; 2022, arXiv 2207.10741). A box is (y1, y2, x1, x2), half open, in
pixels of its grid. An output pixel o of an operation with stride s belongs to the region when its stride cell
[s o, s (o + 1)) holds a pixel that does, so that no kept pixel is ever lost; the last cell reaches to the border.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

Box = tuple[int, int, int, int]


def brightness(z_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the sum over channels of the positive activations, [B, H, W]."""
    return z_BCHW.clamp(min=0).sum(1)


def bounding_boxes(mask_BHW: torch.Tensor, coverage: float = 1.0) -> list[Box | None]:
    """Return the bounding box of each mask, None for an empty one.

    ``coverage`` below 1 leaves (1 - coverage) / 2 of the kept pixels outside at each of the four sides, so that single
    bright pixels do not blow the box up.
    """
    sides = []
    for axis in (2, 1):
        kept_BN = mask_BHW.sum(axis).cumsum(1).double()
        total_B1 = kept_BN[:, -1:]
        low, high = total_B1 * ((1 - coverage) / 2), total_B1 * ((1 + coverage) / 2)
        sides += [(kept_BN <= low).sum(1), (kept_BN < high).sum(1) + 1]
    table = torch.stack([*sides, mask_BHW.flatten(1).any(1).long()], 1).tolist()  # the one wait for the device
    return [tuple(row[:4]) if row[4] else None for row in table]


def moved(box: Box, size: tuple[int, int], place: str, seed: int) -> Box:
    """Return a box of equal sides at the centre or at a random place of the grid, drawn from ``seed``: the controls."""
    height, width = box[1] - box[0], box[3] - box[2]
    free = size[0] - height, size[1] - width
    if place == "centre":
        y, x = free[0] // 2, free[1] // 2
    else:
        draw = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        y, x = (min(int(part * (room + 1)), room) for part, room in zip(draw, free))
    return y, y + height, x, x + width


def scaled(box, source: tuple[int, int], target: tuple[int, int]) -> Box:
    """Return a box in pixels of a ``source`` grid, whole or not, as the smallest box of ``target`` that covers it."""
    out = []
    for axis, (low, high) in enumerate((box[:2], box[2:])):
        ratio, end = target[axis] / source[axis], target[axis]
        first = min(max(0, math.floor(low * ratio + 1e-6)), end - 1)
        out += [first, min(max(first + 1, math.ceil(high * ratio - 1e-6)), end)]
    return tuple(out)


def _down_axis(low: int, high: int, stride: int, before: int, after: int) -> tuple[int, int]:
    first = min(low // stride, after - 1)
    return first, after if high == before else min(max(-(-high // stride), first + 1), after)


@dataclass(frozen=True)
class Group:
    """Images of a batch whose crops have one size: their places, the upper left corners, and what of them is kept."""

    images: tuple[int, ...]
    origins: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    mask: torch.Tensor | None  # bool [n, 1, h, w]; None where everything is kept


@dataclass(eq=False)
class Region:
    """What is kept of every image of a batch at one resolution.

    ``boxes`` bound the region of each image, ``mask`` [B, 1, H, W] is the region itself, None where it is the boxes; a box
    that covers the grid is an image that is computed densely. ``tile``: side of the tiles that its convolutions run on, None
    for crops. ``overhead`` is what one more crop costs, in pixels of a layer at this resolution.
    """

    boxes: tuple[Box, ...]
    size: tuple[int, int]
    mask: torch.Tensor | None = None
    tile: int | None = None
    costs: dict = field(default_factory=dict)
    force: str = "auto"
    device: torch.device | str = "cpu"
    _down: dict = field(default_factory=dict)

    @property
    def kept(self) -> list[int]:
        """Return the kept pixels of each image."""
        if self.mask is not None:
            return self.mask.flatten(1).sum(1).tolist()
        return [(y2 - y1) * (x2 - x1) for y1, y2, x1, x2 in self.boxes]

    @property
    def overhead(self) -> float:
        return self.costs.get(self.size, {}).get("overhead", 128.0)

    def full_mask(self) -> torch.Tensor:
        """Return the region as a bool mask [B, 1, H, W]."""
        if self.mask is not None:
            return self.mask
        mask = torch.zeros(len(self.boxes), 1, *self.size, dtype=torch.bool, device=self.device)
        for row, (y1, y2, x1, x2) in zip(mask, self.boxes):
            row[:, y1:y2, x1:x2] = True
        return mask

    def down(self, stride: tuple[int, int], size: tuple[int, int]) -> "Region":
        """Return the region on the output grid of an operation; made once, the same object for all who ask."""
        if stride == (1, 1) and size == self.size:
            return self
        key = (stride, size)
        if key not in self._down:
            boxes = tuple(
                _down_axis(y1, y2, stride[0], self.size[0], size[0])
                + _down_axis(x1, x2, stride[1], self.size[1], size[1])
                for y1, y2, x1, x2 in self.boxes
            )
            mask = None if self.mask is None else down_mask(self.mask, stride, size)
            even = self.tile and stride[0] == stride[1] and self.tile % stride[0] == 0
            tile = self.tile // stride[0] if even else None
            tile = tile if tile and tile >= 4 else None  # smaller ones are all halo
            self._down[key] = Region(boxes, size, mask, tile, self.costs, self.force, self.device)
        return self._down[key]

    def groups(self) -> list[Group]:
        """Return the crops: images of similar boxes together, or all of them on the whole grid where that costs less."""
        if "groups" not in self._down:
            batch, (height, width) = len(self.boxes), self.size
            parts, cost = partition([(y2 - y1, x2 - x1) for y1, y2, x1, x2 in self.boxes], self.overhead)
            whole = self.overhead + batch * height * width
            if self.force == "dense" or (self.force == "auto" and whole <= cost):
                parts = [(list(range(batch)), self.size)]
            self._down["groups"] = [self._group(images, canvas) for images, canvas in parts]
        return self._down["groups"]

    def _group(self, images: list[int], canvas: tuple[int, int]) -> Group:
        origins = []
        for image in images:
            y1, _, x1, _ = self.boxes[image]
            origins.append((min(y1, self.size[0] - canvas[0]), min(x1, self.size[1] - canvas[1])))
        boxes = [self.boxes[image] for image in images]
        exact = all((y2 - y1, x2 - x1) == canvas for y1, y2, x1, x2 in boxes)
        mask = None
        if self.mask is not None or not exact:
            mask = torch.zeros(len(images), 1, *canvas, dtype=torch.bool, device=self.device)
            for row, image, (y, x), (y1, y2, x1, x2) in zip(mask, images, origins, boxes):
                if self.mask is None:
                    row[:, y1 - y : y2 - y, x1 - x : x2 - x] = True
                else:
                    row.copy_(self.mask[image, :, y : y + canvas[0], x : x + canvas[1]])
            if bool(mask.all()):
                mask = None
        return Group(tuple(images), tuple(origins), canvas, mask)


def down_mask(mask_B1HW: torch.Tensor, stride: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Return the mask on an output grid: any kept pixel in the stride cell keeps the output."""
    for axis in (2, 3):
        before, after, step = mask_B1HW.shape[axis], size[axis - 2], stride[axis - 2]
        low = torch.arange(after).mul(step).clamp(max=before - 1)
        high = (low + step).clamp(max=before)
        high[-1] = before
        count = F.pad(mask_B1HW.long().cumsum(axis), (1, 0) if axis == 3 else (0, 0, 1, 0))
        low, high = low.to(mask_B1HW.device), high.to(mask_B1HW.device)
        mask_B1HW = count.index_select(axis, high) > count.index_select(axis, low)
    return mask_B1HW


def partition(sizes: list[tuple[int, int]], overhead: float) -> tuple[list, float]:
    """Return ([(images, canvas)], cost) of the cheapest grouping of crops; a group computes its largest height and width.

    Cost: pixels computed, and ``overhead`` a group. Exact among groups that are contiguous in height.
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    best, cut, canvas = [0.0], [0], [(0, 0)]
    for end in range(1, len(order) + 1):
        height, width, found = sizes[order[end - 1]][0], 0, (math.inf, 0, (0, 0))
        for start in range(end - 1, max(-1, end - 129), -1):
            width = max(width, sizes[order[start]][1])
            cost = best[start] + overhead + (end - start) * height * width
            if cost < found[0]:
                found = (cost, start, (height, width))
        best.append(found[0])
        cut.append(found[1])
        canvas.append(found[2])
    parts, end = [], len(order)
    while end:
        parts.append((sorted(order[cut[end] : end]), canvas[end]))
        end = cut[end]
    return parts[::-1], best[-1]


def tile_mask(mask_BHW: torch.Tensor, tile: int) -> torch.Tensor:
    """Return the mask [B, 1, H, W] of all tiles that hold a kept pixel."""
    height, width = mask_BHW.shape[1:]
    padded = F.pad(mask_BHW[:, None].float(), (0, -width % tile, 0, -height % tile))
    active = F.max_pool2d(padded, tile)
    return active.repeat_interleave(tile, 2).repeat_interleave(tile, 3)[:, :, :height, :width] > 0
