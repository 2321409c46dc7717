"""What slides over a focused map: convolutions, pooling in windows and over the whole grid."""

import torch
import torch.nn.functional as F

from .focused_carrier import Pooled, plain
from .focused_layouts import Crops, layout_of, of_images


def pair(value) -> tuple[int, int]:
    """Return an int or a sequence of one or two as (y, x)."""
    return (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)


def masked(layout, values, background=None, fresh: bool = True, finite: bool = True) -> list[torch.Tensor]:
    """Return values whose part beside the region is the background; ``fresh`` ones may be changed in place."""
    out = []
    for value, mask, images in zip(values, layout.masks, layout.images):
        if mask is None:
            out.append(value)
        elif background is None and finite:
            shut = mask.to(value.dtype)
            out.append(value.mul_(shut) if fresh and not value.requires_grad else value * shut)
        else:
            beside = 0.0 if background is None else of_images(background, images, len(layout.region.boxes))
            out.append(torch.where(mask, value, beside))
    return out


class Windows:
    """The sliding operations of :class:`convx.layers.focused_map.FocusedMap`; NotImplemented leaves one to the whole map."""

    def filled(self, bias):
        """Return the background after a layer with this bias."""
        return bias.view(1, -1, 1, 1) if self.fill == "bias" and bias is not None else None

    def _reach(self, kernel, stride, padding, dilation):
        """Return (geometry, output size); pads that wait are part of both."""
        if padding == "same":
            sides = [(d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation)]
        else:
            sides = [(p, p) for p in ((0, 0) if padding == "valid" else pair(padding))]
        if self.pads:
            left, right, top, bottom = self.pads[0]
            sides = [(a + c, b + d) for (a, b), (c, d) in zip(sides, ((top, bottom), (left, right)))]
        extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation))
        size = tuple((n + a + b - e) // s + 1 for n, (a, b), e, s in zip(self.region.size, sides, extent, stride))
        return (stride, (sides[0][0], sides[1][0]), extent), size

    def _slide(self, geometry, size, operate, background, outside: float = 0.0):
        """Return the map of ``operate(window, padding)`` on what each output of the region sees."""
        region = self.region.down(geometry[0], size)
        target = self.layout if region is self.region and not self.true else layout_of(region)
        windows = self.layout.windows(self.values, target, geometry, self.background, outside)
        values = masked(target, [operate(x, pad) for x, pad in windows], background, finite=outside == 0)
        return self._but(region=region, layout=target, values=values, background=background, true=False, pads=None)

    def _whole(self, geometry, size, kernel, pool):
        """Return a pooled map as one that is still true everywhere, so that the first convolution has its halo."""
        (stride, before, extent), source = geometry, plain(self.values[0])
        region = self.region.down(stride, size)
        whole = all((n - 1) * s + e <= m for n, s, e, m in zip(size, stride, extent, self.region.size))
        cells = whole and before == (0, 0) and extent == kernel
        values = Pooled(source, size, kernel, stride, pool) if cells else pool(source)
        return self._but(region=region, layout=Crops.whole(region), values=[values])

    def on_conv2d(self, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if self.last or (self.pads and self.pads[1]):
            return NotImplemented
        stride, dilation = pair(stride), pair(dilation)
        geometry, size = self._reach(tuple(weight.shape[2:]), stride, padding, dilation)

        def convolve(x, pad):
            return F.conv2d(x, weight, bias, stride, pad, dilation, groups)

        return self._slide(geometry, size, convolve, self.filled(bias))

    def on_max_pool2d(self, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        kernel, dilation = pair(kernel_size), pair(dilation)
        stride = pair(stride) if stride else kernel
        edge = self.pads[1] if self.pads else -torch.inf
        if self.last or ceil_mode or return_indices or (self.pads and edge != -torch.inf and any(pair(padding))):
            return NotImplemented
        geometry, size = self._reach(kernel, stride, padding, dilation)
        if self.true and not self.pads:
            return self._whole(geometry, size, kernel, lambda x: F.max_pool2d(x, kernel, stride, padding, dilation))
        (_, before, extent), sides = geometry, self.region.size
        inner = all(p == 0 and (m - 1) * s + e <= n for p, m, s, e, n in zip(before, size, stride, extent, sides))

        def pool(x, pad):  # where a crop ends inside the grid, the background is 0
            x = F.pad(x, (pad[1], pad[1], pad[0], pad[0])) if any(pad) else x
            return F.max_pool2d(x, kernel, stride, 0, dilation)

        return self._slide(geometry, size, pool, self.background, 0.0 if inner else edge)

    def on_avg_pool2d(
        self, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ):
        kernel = pair(kernel_size)
        stride = pair(stride) if stride else kernel
        even = all(n % s == 0 and k == s for n, s, k in zip(self.region.size, stride, kernel))
        padded = any(pair(padding)) or self.pads
        if self.last or (ceil_mode and not even) or (padded and not count_include_pad) or (self.pads and self.pads[1]):
            return NotImplemented
        if padded and self.background is not None:
            return NotImplemented  # the border would have another background
        geometry, size = self._reach(kernel, stride, padding, (1, 1))
        if self.true and not self.pads:
            settings = (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
            return self._whole(geometry, size, kernel, lambda x: F.avg_pool2d(x, *settings))

        def pool(x, pad):
            x = F.pad(x, (pad[1], pad[1], pad[0], pad[0])) if any(pad) else x
            return F.avg_pool2d(x, kernel, stride, 0, False, True, divisor_override)

        return self._slide(geometry, size, pool, self.background)

    def pooled(self, name, dim=None, keepdim=False, dtype=None, output_size=None, return_indices=False):
        """Pool each image over its region ("masked") or over the whole grid ("plain"): [B, C, 1, 1] or [B, C]."""
        if name.startswith("adaptive"):
            output_size = dim if output_size is None else output_size
            if pair(output_size) != (1, 1):
                return NotImplemented
            keepdim = True
        else:
            over = {d % 4 for d in ([dim] if isinstance(dim, int) else dim or [])}
            if dtype is not None or over != ({1, 2} if self.last else {2, 3}):
                return NotImplemented
        if self.pads or return_indices:
            return NotImplemented
        here = self.settled()
        here = here._turned() if here.last else here
        out = here._largest() if name in ("amax", "adaptive_max_pool2d") else here._average()
        out = out.permute(0, 2, 3, 1) if self.last else out
        return out if keepdim else out.flatten(1)

    def _parts(self, beside: float):
        for value, mask, images in zip(self.values, self.layout.masks, self.layout.images):
            index = images if isinstance(images, torch.Tensor) else torch.tensor(images, device=value.device)
            yield (value if mask is None else torch.where(mask, value, beside)), index

    def _counts(self) -> torch.Tensor:
        return torch.tensor(self.region.kept, device=self.device, dtype=self.dtype).view(-1, 1, 1, 1)

    def _average(self) -> torch.Tensor:
        count, area = self._counts(), self.region.size[0] * self.region.size[1]
        total = self.values[0].new_zeros(len(count), self.channels, 1, 1)
        for value, index in self._parts(0.0):
            total = total.index_add(0, index, value.sum((2, 3), keepdim=True))
        if self.pooling == "plain":
            return total / area if self.background is None else (total + self.background * (area - count)) / area
        return total / count

    def _largest(self) -> torch.Tensor:
        count, area = self._counts(), self.region.size[0] * self.region.size[1]
        total = self.values[0].new_full((len(count), self.channels, 1, 1), -torch.inf)
        for value, index in self._parts(-torch.inf):
            part = value.amax((2, 3), keepdim=True)
            total = total.scatter_reduce(0, index.view(-1, 1, 1, 1).expand_as(part), part, "amax")
        if self.pooling == "plain":
            return torch.where(count < area, torch.maximum(total, self.around()), total)
        return total
