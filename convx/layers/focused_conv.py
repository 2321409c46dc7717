"""One focused convolution, and the four ways to compute it: what a region costs and what it must equal.

Contract (arXiv 2310.07782, 2207.10741): y = conv2d(x) where the mask is set, the fill everywhere else. A whole network keeps
the layout from layer to layer instead (``focused_map``); this operator takes and returns plain tensors.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .focused_layouts import Crops, Tiles
from .focused_regions import Region, bounding_boxes, down_mask, tile_mask
from .focused_windows import masked

BACKENDS = ("dense", "crop", "tiles", "gather")


class FocusedConv2d(nn.Module):
    """``conv`` at the kept outputs: x [B, C, H, W] and a bool mask of the outputs [B, 1, H', W'] in, [B, C', H', W'] out.

    ``backend``: "dense" computes everything and masks it; "crop" the bounding box of each image; "tiles" the tiles of ``tile``
    pixels that hold a kept output; "gather" the kept outputs alone, one matrix product. ``fill``: "zero" or "bias". Any
    stride, padding, dilation and groups of a convolution padded with zeros; ``ValueError`` for another padding mode.
    """

    def __init__(self, conv: nn.Conv2d, fill: str = "zero", backend: str = "crop", tile: int = 8):
        super().__init__()
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode={conv.padding_mode!r}: only zeros are supported")
        if backend not in BACKENDS or fill not in ("zero", "bias"):
            raise ValueError(f"{backend=} and {fill=}: choose of {', '.join(BACKENDS)} and zero, bias")
        self.conv, self.fill, self.backend, self.tile = conv, fill, backend, tile

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **settings) -> "FocusedConv2d":
        return cls(conv, **settings)

    def before(self) -> list[tuple[int, int]]:
        """Return the padding (before, after) of each axis."""
        conv = self.conv
        if conv.padding == "valid":
            return [(0, 0), (0, 0)]
        if conv.padding == "same":
            reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
            return [(r // 2, r - r // 2) for r in reach]
        return [(p, p) for p in conv.padding]

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        return tuple(
            (n + sum(p) - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                (height, width), self.before(), self.conv.dilation, self.conv.kernel_size, self.conv.stride
            )
        )

    def out_mask(self, mask_B1HW: torch.Tensor, grow: bool = False) -> torch.Tensor:
        """Return the mask of the outputs for one of the inputs: any kept pixel in the stride cell, or, with ``grow``, under
        the kernel (the rule of the 2022 paper)."""
        height, width = mask_B1HW.shape[2:]
        if not grow:
            return down_mask(mask_B1HW, self.conv.stride, self.out_size(height, width))
        (top, bottom), (left, right) = self.before()
        ones = torch.ones(1, 1, *self.conv.kernel_size, device=mask_B1HW.device)
        padded = F.pad(mask_B1HW.float(), (left, right, top, bottom))
        return F.conv2d(padded, ones, None, self.conv.stride, 0, self.conv.dilation) > 0

    def forward(self, x_BCHW: torch.Tensor, mask_B1HW: torch.Tensor) -> torch.Tensor:
        conv, size = self.conv, self.out_size(*x_BCHW.shape[2:])
        if tuple(mask_B1HW.shape) != (len(x_BCHW), 1, *size):
            raise ValueError(
                f"mask: {tuple(mask_B1HW.shape)} given, {(len(x_BCHW), 1, *size)} needed, one a kept output"
            )
        bias = conv.bias if self.fill == "bias" else None
        background = None if bias is None else bias.view(1, -1, 1, 1)
        out = x_BCHW.new_zeros(len(x_BCHW), conv.out_channels, *size) + (0 if background is None else background)
        rows = mask_B1HW.flatten(1).any(1).nonzero()[:, 0]
        if not len(rows):
            return out
        x_BCHW, mask_B1HW = x_BCHW[rows], mask_B1HW[rows]
        if self.backend == "gather":
            found = self._gathered(x_BCHW, mask_B1HW)
            out[rows] = torch.where(mask_B1HW, found, out[rows])
            return out
        (top, _), (left, _) = self.before()
        extent = tuple(d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size))
        geometry = (conv.stride, (top, left), extent)
        source = Region(((0, x_BCHW.shape[2], 0, x_BCHW.shape[3]),) * len(rows), tuple(x_BCHW.shape[2:]))
        force = {"crop": "crop", "dense": "dense"}.get(self.backend, "auto")
        boxes = tuple(bounding_boxes(mask_B1HW[:, 0]))
        region = Region(boxes, size, mask_B1HW, self.tile, force=force, device=x_BCHW.device)
        target = Tiles(region) if self.backend == "tiles" else Crops(region, region.groups())
        windows = Crops.whole(source).windows([x_BCHW], target, geometry)
        settings = (conv.stride, conv.dilation, conv.groups)
        values = [F.conv2d(w, conv.weight, conv.bias, settings[0], pad, *settings[1:]) for w, pad in windows]
        out[rows] = target.paste(masked(target, values, background), background)
        return out

    def _gathered(self, x_BCHW: torch.Tensor, mask_B1HW: torch.Tensor) -> torch.Tensor:
        """Return the kept outputs on the grid, zeros beside them: patches [C k^2, n] times the weights, group by group."""
        conv, size = self.conv, tuple(mask_B1HW.shape[2:])
        (top, bottom), (left, right) = self.before()
        x_BCHW = F.pad(x_BCHW, (left, right, top, bottom))
        b, y, x = mask_B1HW[:, 0].nonzero(as_tuple=True)
        rows = y[:, None] * conv.stride[0] + torch.arange(conv.kernel_size[0], device=y.device) * conv.dilation[0]
        columns = x[:, None] * conv.stride[1] + torch.arange(conv.kernel_size[1], device=x.device) * conv.dilation[1]
        patches = x_BCHW.permute(0, 2, 3, 1)[b[:, None, None], rows[:, :, None], columns[:, None, :]]  # [n, k, k, C]
        parts = patches.permute(0, 3, 1, 2).unflatten(1, (conv.groups, -1)).flatten(2).transpose(0, 1)  # [g, n, C k^2]
        weights = conv.weight.unflatten(0, (conv.groups, -1)).flatten(2).transpose(1, 2)
        found = torch.bmm(parts, weights).transpose(0, 1).flatten(1)
        found = found if conv.bias is None else found + conv.bias
        out = found.new_zeros(len(mask_B1HW), *size, conv.out_channels)
        out[b, y, x] = found
        return out.permute(0, 3, 1, 2)

    def macs(self, mask_B1HW: torch.Tensor) -> int:
        """Return the multiply-accumulates that the backend spends on a mask of the outputs."""
        conv = self.conv
        one = conv.out_channels * conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
        if self.backend == "gather":
            return one * int(mask_B1HW.sum())
        if self.backend == "dense":
            return one * int(mask_B1HW.flatten(1).any(1).sum()) * mask_B1HW[0].numel()
        if self.backend == "tiles":
            height, width = mask_B1HW.shape[2:]
            whole = F.pad(mask_B1HW, (0, -width % self.tile, 0, -height % self.tile))
            return one * int(tile_mask(whole[:, 0], self.tile).sum())
        found = [box for box in bounding_boxes(mask_B1HW[:, 0]) if box]
        groups = Region(tuple(found), tuple(mask_B1HW.shape[2:]), force="crop").groups() if found else []
        return one * sum(len(g.images) * g.size[0] * g.size[1] for g in groups)
