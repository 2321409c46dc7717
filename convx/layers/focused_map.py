"""A feature map of which only a region is computed, on its way through an unmodified network.

Focused convolutions, arXiv 2310.07782. Convolutions and channel mixing compute the region and set everything else to the
fill; pooling and residual sums stay in the layout of the convolutions; what acts on single values acts on the kept ones and
on the constant around them. An operation that none of this covers gets the whole map, and the rest of the network is dense.
"""

import operator

import torch
import torch.nn.functional as F

from .focused_carrier import Carrier, plain
from .focused_layouts import layout_of, moved, of_images
from .focused_windows import Windows, masked

_POINTWISE = """
    relu relu_ relu6 silu silu_ gelu hardswish hardswish_ hardtanh hardtanh_ hardsigmoid sigmoid sigmoid_ tanh tanh_
    leaky_relu elu elu_ selu mish softplus clamp clamp_ exp batch_norm layer_norm dropout dropout_ alpha_dropout
    feature_dropout contiguous clone float half bfloat16 double to type neg abs square sqrt pow __pow__
"""
_KEEPS_ZERO = "relu relu_ relu6 silu silu_ gelu hardswish dropout dropout_ contiguous clone"
POINTWISE, KEEPS_ZERO = frozenset(_POINTWISE.split()), frozenset(_KEEPS_ZERO.split())
_PAIRS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "multiply": operator.mul,
    "div": operator.truediv,
}
PAIRS = {
    "__truediv__": operator.truediv,
    "__itruediv__": operator.truediv,
    "__rsub__": lambda a, b: b - a,
    **{name.format(word): f for word, f in _PAIRS.items() for name in ("{}", "{}_", "__{}__", "__i{}__")},
    **{f"__r{word}__": _PAIRS[word] for word in ("add", "mul")},
}
AVERAGES = {"mean", "adaptive_avg_pool2d"}
MAXIMA = {"amax", "adaptive_max_pool2d"}


class FocusedMap(Windows, Carrier):
    """``values`` in ``layout``, and ``background`` [1 or B, C, 1, 1] (None: 0) everywhere else in the grid.

    ``fill`` and ``pooling`` are those of :class:`convx.layers.focused.Focus`. ``true`` marks the map that the region was
    made from, whose values outside are the network's own. ``last``: [B, H, W, C] order, as ConvNeXt mixes channels.
    ``pads``: ((left, right, top, bottom), value) around the grid, for the operation that follows.
    """

    KEYS = ("region", "layout", "values", "fill", "pooling", "background", "true", "last", "pads")

    def __init__(
        self, region, layout, values, fill="zero", pooling="masked", background=None, true=False, last=False, pads=None
    ):
        self.region, self.layout, self.values, self.background = region, layout, values, background
        self.fill, self.pooling, self.true, self.last, self.pads = fill, pooling, true, last, pads

    dtype = property(lambda self: self.values[0].dtype)
    device = property(lambda self: self.values[0].device)
    requires_grad = property(lambda self: self.values[0].requires_grad)
    is_cuda = property(lambda self: self.values[0].is_cuda)

    def _but(self, **changes) -> "FocusedMap":
        return FocusedMap(**({key: getattr(self, key) for key in self.KEYS} | changes))

    @property
    def channels(self) -> int:
        return self.values[0].shape[3 if self.last else 1]

    @property
    def shape(self) -> torch.Size:
        batch, (height, width) = len(self.region.boxes), self.region.size
        if self.pads:
            left, right, top, bottom = self.pads[0]
            height, width = height + top + bottom, width + left + right
        sides = (height, width, self.channels) if self.last else (self.channels, height, width)
        return torch.Size((batch, *sides))

    def tensor(self) -> torch.Tensor:
        """Return the whole map; of the map that the region was made from, the network's own values."""
        if self.last:
            return self._turned().tensor().permute(0, 2, 3, 1)
        full = plain(self.layout.paste(self.values, self.background))
        return F.pad(full, self.pads[0], value=self.pads[1]) if self.pads else full

    def around(self) -> torch.Tensor:
        """Return the background as a tensor of its own that broadcasts over the values."""
        zero = self.background
        zero = self.values[0].new_zeros(1, self.channels, 1, 1) if zero is None else zero.clone()
        return zero.permute(0, 2, 3, 1) if self.last else zero

    def _with(self, values, around: torch.Tensor) -> "FocusedMap":
        around = around.permute(0, 3, 1, 2) if self.last else around
        return self._but(values=values, background=around if bool(around.any()) else None)

    def _turned(self) -> "FocusedMap":
        order = (0, 3, 1, 2) if self.last else (0, 2, 3, 1)
        return self._but(values=[v.permute(order) for v in self.values], last=not self.last)

    def moved(self, layout) -> list[torch.Tensor]:
        """Return the values in another layout of the same grid."""
        return self.values if layout is self.layout else moved(self.layout, self.values, layout, self.background)

    def settled(self) -> "FocusedMap":
        """Return the map with what is outside the region set to the fill, in the layout of its region."""
        if self.last:
            return self._turned().settled()._turned()
        layout = layout_of(self.region) if self.true else self.layout
        values = masked(layout, self.moved(layout), self.background, fresh=False) if self.true else self.values
        return self._but(layout=layout, values=values, true=False)

    @classmethod
    def handle(cls, function, args, kwargs):
        name = getattr(function, "__name__", "")
        first, found = args[0] if args else None, NotImplemented
        if isinstance(first, cls) and (method := getattr(cls, f"on_{name}", None)):
            found = method(first, *args[1:], **kwargs)
        elif isinstance(first, cls) and name in POINTWISE and not first.pads:
            values = [function(value, *args[1:], **kwargs) for value in first.values]
            if first.background is None and name in KEEPS_ZERO:
                return first._but(values=values)
            return first._with(values, function(first.around(), *args[1:], **kwargs))
        elif isinstance(first, cls) and name in AVERAGES | MAXIMA:
            found = first.pooled(name, *args[1:], **kwargs)
        elif name in PAIRS and len(args) == 2 and not kwargs:
            found = _both(PAIRS[name], *args)
        elif name in ("cat", "concat") and (args[1:] or [kwargs.get("dim", 0)])[0] == 1:
            found = _concatenated(first)
        if found is not NotImplemented:
            return found
        return function(*plain(args), **{key: plain(value) for key, value in kwargs.items()})

    def on_permute(self, *dims):
        dims = tuple(dims[0]) if len(dims) == 1 else dims
        wanted = {(0, 2, 3, 1): not self.last, (0, 3, 1, 2): self.last}
        return self._turned() if wanted.get(dims) and not self.pads else NotImplemented

    def on_pad(self, pad, mode="constant", value=None):
        if mode != "constant" or len(pad) != 4 or self.pads or self.last or min(pad) < 0:
            return NotImplemented
        return self._but(pads=(tuple(pad), value or 0.0)) if any(pad) else self

    def on_linear(self, weight, bias=None):
        if not self.last:
            return NotImplemented
        here = self.settled()
        background = self.filled(bias)
        values = [F.linear(value, weight, bias).permute(0, 3, 1, 2) for value in here.values]
        values = [value.permute(0, 2, 3, 1) for value in masked(here.layout, values, background)]
        return here._but(values=values, background=background)


def _both(operation, a, b):
    """Apply an operation to two maps of one grid, or to a map and what is given per channel or per image."""
    maps = [m for m in (a, b) if isinstance(m, FocusedMap)]
    lead = next((m for m in maps if not m.true), maps[0])
    if any(m.pads or m.last != lead.last or m.region.size != lead.region.size for m in maps):
        return NotImplemented
    if any(m.layout is not lead.layout and (lead.last or m.region.boxes != lead.region.boxes) for m in maps):
        return NotImplemented
    for other in (a, b):
        if isinstance(other, torch.Tensor) and other.numel() > 1:
            spatial = other.shape[-3:-1] if lead.last else other.shape[-2:]
            if tuple(spatial) not in ((1, 1), (1,), ()) or (other.dim() < 3 and not lead.last):
                return NotImplemented

    placed = {id(m): m.moved(lead.layout) for m in maps}
    batch, values = len(lead.region.boxes), []
    for g, images in enumerate(lead.layout.images):
        pair = [
            placed[id(v)][g]
            if isinstance(v, FocusedMap)
            else of_images(v, images, batch)
            if isinstance(v, torch.Tensor)
            else v
            for v in (a, b)
        ]
        values.append(operation(*pair))
    if len({m.true for m in maps}) == 2:  # the true values beside the region are not kept: the sum is masked
        return lead._but(values=masked(lead.layout, values, lead.background))
    zero = all(m.background is None for m in maps) and operation is not operator.truediv
    if zero and (len(maps) == 2 or operation is operator.mul):
        return lead._but(values=values)
    return lead._with(values, operation(*(v.around() if isinstance(v, FocusedMap) else v for v in (a, b))))


def _concatenated(parts):
    if not all(isinstance(p, FocusedMap) for p in parts) or any(p.pads or p.last for p in parts):
        return NotImplemented
    parts = [p.settled() for p in parts]
    lead = parts[0]
    if any(p.region.size != lead.region.size or p.region.boxes != lead.region.boxes for p in parts):
        return NotImplemented
    values = [torch.cat(group, 1) for group in zip(*(p.moved(lead.layout) for p in parts))]
    zeros = [p.around() for p in parts]
    batch = max(map(len, zeros))
    return lead._with(values, torch.cat([z.expand(batch, -1, -1, -1) for z in zeros], 1))
