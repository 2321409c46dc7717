"""The official behaviour of focused convolutions, defects included, as an arm to compare with.

What the rectangular mode of the public code does (purdueseris/focused-convolutions@894f504), described and written anew: the
bounding box of the mask is scaled to each layer by floor, the crop is padded with zeros although its neighbours exist, the
result is pasted into zeros, everything but convolutions is dense, and a crop that does not fit is computed densely
without a word. It is counted here, and the box is that of each image, where the public code takes single images only.
"""

import torch
import torch.nn.functional as F

from .focused_carrier import Carrier, plain
from .focused_windows import pair


class OfficialMap(Carrier):
    """A whole map [B, C, H, W] with the boxes of its images (None: an empty mask) on the grid of the mask.

    ``report``, where one is given, gets a line (layer's input size, what was done) for each convolution of each image:
    "crop", "shape" (dense: the crop did not fit) or "empty" (dense: no box).
    """

    def __init__(self, values: torch.Tensor, boxes, grid: tuple[int, int], report: list | None = None):
        self.values, self.boxes, self.grid, self.report = values, boxes, grid, report

    dtype = property(lambda self: self.values.dtype)
    device = property(lambda self: self.values.device)
    requires_grad = property(lambda self: self.values.requires_grad)
    shape = property(lambda self: self.values.shape)

    def tensor(self) -> torch.Tensor:
        return self.values

    @classmethod
    def handle(cls, function, args, kwargs):
        first = next(
            a for a in [*args, *(args[0] if args and isinstance(args[0], list | tuple) else [])] if isinstance(a, cls)
        )
        if getattr(function, "__name__", "") == "conv2d" and args[0] is first:
            out = first._convolved(*args[1:], **kwargs)
        else:
            out = function(*plain(args), **{key: plain(value) for key, value in kwargs.items()})
        if isinstance(out, torch.Tensor) and out.dim() == 4 and len(out) == len(first.boxes):
            return cls(out, first.boxes, first.grid, first.report)
        return out

    def _convolved(self, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> torch.Tensor:
        settings = (pair(stride), padding if isinstance(padding, str) else pair(padding), pair(dilation), groups)
        rows = [self._one(x[None], box, weight, bias, *settings) for x, box in zip(self.values, self.boxes)]
        return torch.cat(rows)

    def _one(self, x, box, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
        if box is None:
            self._note(x, "empty")
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        before = tuple(x.shape[2:])
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        around = reach if padding == "same" else [0, 0] if padding == "valid" else [2 * p for p in padding]
        after = tuple((n + a - r - 1) // s + 1 for n, a, r, s in zip(before, around, reach, stride))
        (a, b, c, d), (e, f, g, h) = self._floor(box, before), self._floor(box, after)
        out = x.new_zeros(1, weight.shape[0], *after)
        try:
            out[:, :, e:f, g:h] = F.conv2d(x[:, :, a:b, c:d], weight, bias, stride, padding, dilation, groups)
        except RuntimeError:
            self._note(x, "shape")
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        self._note(x, "crop")
        return out

    def _floor(self, box, size) -> tuple[int, ...]:
        return tuple(at * size[axis] // self.grid[axis] for at, axis in zip(box, (0, 0, 1, 1)))

    def _note(self, x, what: str) -> None:
        if self.report is not None:
            self.report.append((tuple(x.shape[2:]), what))
