"""What each convolution of a focused network costs on this machine: dense, cropped and in tiles."""

import copy
import time

import torch
import torch.nn.functional as F
from torch import nn

from .focused_layouts import Crops, Tiles
from .focused_map import FocusedMap
from .focused_regions import Region

REPEATS = 5
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def _milliseconds(call, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


@torch.inference_mode()
def layer_costs(model: nn.Module, x_1CHW: torch.Tensor, repeats: int = REPEATS) -> list[dict]:
    """Return one row for each convolution after the insertion point of a focused network, in the order in which they run.

    A row: layer, grid (H, W of its output), macs and the medians in ms of one image: dense, crop (half of each side, a quarter
    of the area, bookkeeping included) and tiles (the same quarter). Layers whose map has fewer than 4 pixels a side are left out.
    """
    seen: list[tuple] = []
    inserted = model.model.get_submodule(model.after[int(model.depth)])
    mark = inserted.register_forward_hook(lambda *_: seen.clear())
    hooks = [
        module.register_forward_hook(lambda m, a, out, n=name: seen.append((n, m, a[0].shape, out.shape)))
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        model.dense(x_1CHW)
    finally:
        for hook in [mark, *hooks]:
            hook.remove()
    rows = []
    for name, conv, before, after in seen:
        if min(after[2:]) >= 4 and min(before[2:]) >= 4:
            rows.append({"layer": name, "grid": tuple(after[2:])} | _of_layer(conv, before, after, repeats, x_1CHW))
    return rows


def _of_layer(conv: nn.Conv2d, before, after, repeats: int, like: torch.Tensor) -> dict:
    """Return macs, dense, crop and tiles of one convolution with the input of its place in the network."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(before, device=like.device, dtype=conv.weight.dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    height, width = before[2:]
    box = (height // 4, height // 4 + (height + 1) // 2, width // 4, width // 4 + (width + 1) // 2)
    region = Region((box,), (height, width), force="crop", device=x.device)
    crop = Crops(region, region.groups())
    cropped = FocusedMap(region, crop, [w for w, _ in Crops.whole(region).windows([x], crop, ((1, 1), (0, 0), (1, 1)))])
    side = 8 if min(height, width) >= 16 else 4
    tiled_region = Region((box,), (height, width), tile=side, device=x.device)
    tiles = Tiles(tiled_region)
    tiled = FocusedMap(tiled_region, tiles, [tiles.from_whole(x, ((1, 1), (0, 0), (1, 1)))])
    tiled_region._down["layout"], region._down["layout"] = tiles, crop
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    found = {"macs": conv.weight[0].numel() * after[1] * after[2] * after[3], "tile_pixels": len(tiles.at[0]) * side**2}
    for what, value in (("dense", x), ("crop", cropped), ("tiles", tiled)):
        found[what] = _milliseconds(lambda v=value: F.conv2d(v, conv.weight, conv.bias, *settings), repeats)
    return found


def cost_table(rows: list[dict]) -> dict:
    """Return {grid: {"overhead", "tiles"}} of the rows of :func:`layer_costs`, what ``Focus.costs`` holds.

    ``overhead``: what a crop costs besides its pixels, in pixels, from the line through the quarter and the whole map.
    ``tiles``: cost of a pixel in tiles over that of one in a crop.
    """
    table = {}
    for grid in {row["grid"] for row in rows}:
        mine = [row for row in rows if row["grid"] == grid]
        dense, crop, tiles = (sum(row[key] for row in mine) for key in ("dense", "crop", "tiles"))
        area = grid[0] * grid[1]
        pixel = max((dense - crop) / (0.75 * area), dense / area / 4)
        overhead = max(0.0, crop - pixel * area / 4)
        shares = sum(row["tile_pixels"] for row in mine) / len(mine)
        table[grid] = {"overhead": overhead / pixel, "tiles": max(1.0, (tiles - overhead) / (pixel * shares))}
    return table


@torch.inference_mode()
def break_even(model: nn.Module, x_1CHW: torch.Tensor, repeats: int = REPEATS) -> float:
    """Return the largest share of the map up to which a focused network is faster than the dense one here, 0 for never.

    The whole network is timed with boxes of ``SHARES`` of the area in the middle of one image, by turns with the dense one;
    between two shares the ratio is taken to be linear.
    """
    boxed = copy.deepcopy(model)
    for focus in boxed.focus:
        focus.settings |= {"place": "given", "dense_above": 1.0}
    height, width = x_1CHW.shape[2:]
    last = (0.0, None)
    for share in SHARES:
        part = (1 - share**0.5) / 2
        box = [(part * width, part * height, (1 - part) * width, (1 - part) * height)]
        pairs = [
            (_milliseconds(lambda b=box: boxed(x_1CHW, boxes=b), 1), _milliseconds(lambda: boxed.dense(x_1CHW), 1))
            for _ in range(repeats)
        ]
        ratio = sorted(ours / dense for ours, dense in pairs)[repeats // 2]
        if ratio >= 1:
            if last[1] is None:
                return 0.0
            return last[0] + (share - last[0]) * (1 - last[1]) / (ratio - last[1])
        last = (share, ratio)
    return last[0]
