"""Where the values of a focused feature map lie: crops of equal size in stacks, or tiles. Only the window of an operation
moves data: what its outputs see of a map, taken from the layout that the map is in.

A geometry is ((s_y, s_x), (p_y, p_x), (e_y, e_x)): stride, padding before, and extent d (k - 1) + 1 of the kernel.
"""

import torch
import torch.nn.functional as F

from .focused_regions import Group, Region

SAME = ((1, 1), (0, 0), (1, 1))


def _new(like: torch.Tensor, shape, value: float = 0.0) -> torch.Tensor:
    """Return a constant tensor of another shape in the memory format, type and device of ``like``."""
    last = like.dim() == 4 and like.stride(1) == 1 and like.shape[1] > 1
    out = torch.empty(
        shape, dtype=like.dtype, device=like.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip
    return out.fill_(value)


def of_images(value: torch.Tensor, images, batch: int) -> torch.Tensor:
    """Return the rows of some images of what is given per image, anything else as it is."""
    if value.dim() == 4 and value.shape[0] == batch > 1:
        index = images if isinstance(images, torch.Tensor) else torch.tensor(images, device=value.device)
        return value.index_select(0, index)
    return value


class Crops:
    """Stacks of crops of one size each: ``values[g]`` is [n, C, h, w] for the images of group g."""

    def __init__(self, region: Region, groups: list[Group]):
        self.region, self.groups = region, groups
        self.place = {image: (g, row) for g, group in enumerate(groups) for row, image in enumerate(group.images)}
        self.masks = [group.mask for group in groups]
        self.images = [group.images for group in groups]

    @classmethod
    def whole(cls, region: Region) -> "Crops":
        """Return the layout of a plain tensor: one crop that is the whole grid."""
        batch = len(region.boxes)
        return cls(region, [Group(tuple(range(batch)), ((0, 0),) * batch, region.size, None)])

    def windows(self, values, target, geometry, background=None, outside: float = 0.0):
        """Return [(window, padding)] for each stack of ``target``; the padding is zeros and left to the operation.

        What is not in a crop is ``background`` [1 or B, C, 1, 1] (None: 0) inside the grid and ``outside`` beyond it.
        """
        if isinstance(target, Tiles):
            full = values[0] if self._is_whole() else self.paste(values, background)
            return [(target.from_whole(full, geometry, outside), (0, 0))]
        (sy, sx), (py, px), (ey, ex) = geometry
        out = []
        for group in target.groups:
            need = (group.size[0] - 1) * sy + ey, (group.size[1] - 1) * sx + ex
            starts = [(y * sy - py, x * sx - px) for y, x in group.origins]
            out.append(self._window(values, group.images, starts, need, background, outside))
        return out

    def _is_whole(self) -> bool:
        return len(self.groups) == 1 and self.groups[0].size == self.region.size

    def _window(self, values, images, starts, need, background, outside):
        at = self.place[images[0]][0]
        source = self.groups[at]
        if source.images == images:
            moves = {(y - v, x - u) for (y, x), (v, u) in zip(starts, source.origins)}
            if len(moves) == 1:
                (y, x), (h, w) = moves.pop(), source.size
                over = max(0, -y), max(0, y + need[0] - h), max(0, -x), max(0, x + need[1] - w)
                if not any(over) or (background is None and outside == 0):
                    part = values[at][:, :, max(0, y) : y + need[0], max(0, x) : x + need[1]]
                    if over[0] == over[1] and over[2] == over[3]:
                        return part, (over[0], over[2])
                    return F.pad(part, (over[2], over[3], over[0], over[1])), (0, 0)
        height, width = self.region.size
        buffer = _new(values[at], (len(images), values[at].shape[1], *need), outside)
        for row, (image, (y, x)) in enumerate(zip(images, starts)):
            g, place = self.place[image]
            (v, u), (h, w) = self.groups[g].origins[place], self.groups[g].size
            inside = slice(max(0, -y), height - y), slice(max(0, -x), width - x)
            if background is not None:
                buffer[row, :, inside[0], inside[1]] = background[image if len(background) > 1 else 0]
            elif outside != 0:
                buffer[row, :, inside[0], inside[1]] = 0
            top, left, bottom, right = max(y, v), max(x, u), min(y + need[0], v + h), min(x + need[1], u + w)
            if bottom > top and right > left:
                part = values[g][place, :, top - v : bottom - v, left - u : right - u]
                buffer[row, :, top - y : bottom - y, left - x : right - x] = part
        return buffer, (0, 0)

    def paste(self, values, background=None) -> torch.Tensor:
        """Return the whole map [B, C, H, W]."""
        whole = Crops.whole(self.region)
        return values[0] if self._is_whole() else moved(self, values, whole, background)[0]


class Tiles:
    """All tiles of all images that hold a kept pixel, in one stack: ``values[0]`` is [n, C, T, T]."""

    def __init__(self, region: Region):
        self.region, self.side = region, region.tile
        side, (height, width) = region.tile, region.size
        mask = F.pad(region.full_mask(), (0, -width % side, 0, -height % side))
        self.grid = mask.shape[2] // side, mask.shape[3] // side
        cells = mask.unflatten(3, (-1, side)).unflatten(2, (-1, side)).transpose(3, 4)[:, 0]  # [B, ty, tx, T, T]
        active = cells.flatten(3).any(3)
        self.at = active.nonzero(as_tuple=True)
        self.images = [self.at[0]]
        kept = cells[self.at][:, None]
        self.masks = [None if bool(kept.all()) else kept]
        number = active.flatten().cumsum(0).reshape(active.shape) - 1
        number = F.pad(torch.where(active, number, active.sum()), (1, 1, 1, 1), value=int(active.sum()))
        b, y, x = self.at
        self.around = [[number[b, y + dy, x + dx] for dx in range(3)] for dy in range(3)]

    def windows(self, values, target, geometry, background=None, outside: float = 0.0):
        """Return [(window, padding)] as :meth:`Crops.windows` does; tiles of tiles are put together from their neighbours."""
        (s, _), (p, q), (e, f) = geometry
        side, tiles = self.side, isinstance(target, Tiles)
        after = (e - s - p, f - s - q)
        if tiles and (p, q) == (0, 0) and max(after) <= 0:
            return [(values[0][:, :, : side + after[0], : side + after[1]], (0, 0))]
        small = max(p, q, *after) <= side and min(after) >= 0
        if not tiles or not small or background is not None or outside != 0:
            whole = Crops.whole(self.region)
            return whole.windows([self.paste(values, background)], target, geometry, background, outside)
        z_CTT = torch.cat([values[0], _new(values[0], (1, *values[0].shape[1:]))])
        n, channels = len(values[0]), values[0].shape[1]
        window = _new(values[0], (n, channels, side + p + after[0], side + q + after[1]))
        rows = (
            (slice(0, p), slice(side - p, side)),
            (slice(p, p + side), slice(0, side)),
            (slice(p + side, None), slice(0, after[0])),
        )
        columns = (
            (slice(0, q), slice(side - q, side)),
            (slice(q, q + side), slice(0, side)),
            (slice(q + side, None), slice(0, after[1])),
        )
        for dy, (to_y, from_y) in enumerate(rows):
            for dx, (to_x, from_x) in enumerate(columns):
                if (dy, dx) == (1, 1):
                    window[:, :, to_y, to_x] = values[0]
                elif from_y.stop > from_y.start and from_x.stop > from_x.start:
                    window[:, :, to_y, to_x] = z_CTT[:, :, from_y, from_x].index_select(0, self.around[dy][dx])
        return [(window, (0, 0))]

    def from_whole(self, full: torch.Tensor, geometry, outside: float = 0.0) -> torch.Tensor:
        """Return the windows [n, C, h, w] of this layout's tiles in the whole input map of an operation."""
        (sy, sx), (py, px), (ey, ex) = geometry
        need = (self.side - 1) * sy + ey, (self.side - 1) * sx + ex
        step = self.side * sy, self.side * sx
        room = [(grid - 1) * s + n for grid, s, n in zip(self.grid, step, need)]
        after = room[0] - py - full.shape[2], room[1] - px - full.shape[3]
        full = F.pad(full, (px, max(0, after[1]), py, max(0, after[0])), value=outside)
        view = full.unfold(2, need[0], step[0]).unfold(3, need[1], step[1])  # [B, C, ty, tx, h, w]
        b, y, x = self.at
        window = view[b, :, y, x]
        return window.contiguous(memory_format=torch.channels_last) if full.stride(1) == 1 else window

    def paste(self, values, background=None) -> torch.Tensor:
        """Return the whole map [B, C, H, W]."""
        batch, (height, width), side = len(self.region.boxes), self.region.size, self.side
        full = _new(values[0], (batch, values[0].shape[1], self.grid[0] * side, self.grid[1] * side))
        if background is not None:
            full += background
        cells = full.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, C, ty, T, tx, T], a view
        b, y, x = self.at
        cells.permute(0, 2, 4, 1, 3, 5)[b, y, x] = values[0]
        return full[:, :, :height, :width]


def moved(source, values, target, background=None) -> list[torch.Tensor]:
    """Return values of one layout in another one of the same grid."""
    windows = source.windows(values, target, SAME, background)
    return [F.pad(window, (x, x, y, y)) if y or x else window for window, (y, x) in windows]


def layout_of(region: Region):
    """Return the layout that a region is computed in: made once for each resolution of a batch."""
    if "layout" not in region._down:
        region._down["layout"] = Tiles(region) if region.tile else Crops(region, region.groups())
    return region._down["layout"]
