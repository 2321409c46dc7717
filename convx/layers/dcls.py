"""DCLS, dilated convolution with learnable spacings (Khalfaoui-Hassani et al., arXiv 2112.03740, 2306.00817).

A kernel of size s x s is the sum of K taps, each with a weight and a position that are both learned. Imports
torch and, beside it, ``dcls_kernels`` (construction, the equations), ``dcls_spacings`` (tap count, repulsion)
and ``depthwise`` (fast large depthwise kernels); copy the four together.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .dcls_kernels import SIGMA_FLOOR, build_kernel
from .dcls_spacings import Repulsion, check, limits, same_geometry, spread, tap_grid
from .depthwise import depthwise_conv2d

SIGMA_START = {"triangle": 0.0, "gauss": 0.23}  # raw widths, as in the original


class DCLSConv2d(nn.Module):
    """Convolution [N, C_in, H, W] -> [N, C_out, H', W'] with ``kernel_count`` taps at learned real positions.

    Parameters: ``weight`` [C_out, C_in / groups, K]; ``positions`` [2, C_out, C_in / groups, K] in pixels,
    (y, x), 0 the centre s // 2, kept in [-(s // 2), s - 1 - s // 2]; ``sigma`` likewise, raw: the width is
    |sigma| + 1 ("triangle") or + 0.27 ("gauss"), None for "bilinear"; ``bias`` [C_out].
    ``dilated_kernel_size`` s is an int or (h, w), odd or even. The kernel is built in float32 (float64 for
    such weights) also under autocast, once a forward pass; without gradients in evaluation mode it is kept
    until a parameter changes. ``generator`` draws the start; None uses the global one. Raises ``ValueError``
    for an unknown interpolation or padding mode, sizes below 1 and indivisible channels.
    """

    foldable = macs_as_folded = True  # a convolution, whichever way device and shape make it run
    dilation = (1, 1)

    def __init__(
        self, in_channels: int, out_channels: int, kernel_count: int, dilated_kernel_size, stride=1,
        padding=0, groups=1, bias=True, interpolation="bilinear", padding_mode="zeros", generator=None,
    ):  # fmt: skip
        super().__init__()
        pairs = [(v, v) if isinstance(v, int) else tuple(v) for v in (dilated_kernel_size, stride, padding)]
        check("interpolation", interpolation, SIGMA_FLOOR)
        check("padding_mode", padding_mode, ("zeros", "reflect", "replicate", "circular"))
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{groups=} must divide {in_channels=} and {out_channels=}")
        if kernel_count < 1 or min(pairs[0]) < 1:
            raise ValueError(f"{kernel_count=} and {dilated_kernel_size=} must be at least 1")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_count, self.interpolation, self.padding_mode = kernel_count, interpolation, padding_mode
        self.kernel_size, self.stride, self.padding = pairs
        shape = (out_channels, in_channels // groups, kernel_count)
        self.weight = nn.Parameter(torch.empty(shape))
        self.positions = nn.Parameter(torch.empty(2, *shape))
        self.sigma = None if interpolation == "bilinear" else nn.Parameter(torch.empty(2, *shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.position_lr_factor = 5.0  # as in the official ConvNeXt code
        self.repulsion: Repulsion | None = None
        self.weight_std: float | None = None
        self._cache = None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw everything as the original does: weights and bias uniform, positions from N(0, 0.5^2)."""
        self.reset_weights(None, generator)
        self.place("normal", generator)
        if self.sigma is not None:
            nn.init.constant_(self.sigma, SIGMA_START[self.interpolation])

    @torch.no_grad()
    def reset_weights(self, std: float | None = None, generator: torch.Generator | None = None) -> None:
        """Draw weights from N(0, std^2), bias 0; with None both uniform within 1/sqrt(C_in / groups K)."""
        self.weight_std = std
        bound = 1 / math.sqrt(self.weight[0].numel())
        for parameter in filter(lambda p: p is not None, (self.weight, self.bias)):
            if std is None:
                parameter.uniform_(-bound, bound, generator=generator)
            elif parameter is self.weight:
                parameter.normal_(0, std, generator=generator)
            else:
                parameter.zero_()

    @torch.no_grad()
    def place(self, how: str, generator: torch.Generator | None = None, std: float = 0.5) -> None:
        """Place the taps: "normal" N(0, std^2) clamped, or "uniform" over the kernel, borders included."""
        for axis, size in zip(self.positions, self.kernel_size):
            low, high = limits(size)
            draw, settings = (axis.uniform_, (low, high)) if how == "uniform" else (axis.normal_, (0, std))
            draw(*settings, generator=generator)
        self.after_step()

    @classmethod
    @torch.no_grad()
    def from_conv(
        cls, conv: nn.Conv2d, kernel_count: int | None = None, dilated_kernel_size=None,
        interpolation="bilinear", generator=None,
    ) -> "DCLSConv2d":  # fmt: skip
        """Return a layer with the geometry of ``conv``: output size, groups, padding mode, device and dtype.

        With ``kernel_count`` None the taps stand on the grid of ``conv`` with its weights, so that the
        function is the same (not for "gauss", whose taps are never single cells: ``ValueError``). Otherwise
        weights are drawn with the standard deviation of those of ``conv`` and its bias is taken over.
        ``dilated_kernel_size`` None is the size of ``conv``, dilation included. Raises ``ValueError`` for a
        size that cannot keep the output size, or that a grid does not fit in.
        """
        size, padding = same_geometry(conv, dilated_kernel_size)
        on_grid = kernel_count is None
        if on_grid and interpolation == "gauss":
            raise ValueError("a convolution is no gauss DCLS: give a kernel_count, or bilinear or triangle")
        count = math.prod(conv.kernel_size) if on_grid else kernel_count
        settings = conv.groups, conv.bias is not None, interpolation, conv.padding_mode, generator
        layer = cls(conv.in_channels, conv.out_channels, count, size, conv.stride, padding, *settings)
        if on_grid:
            layer.weight.copy_(conv.weight.flatten(2))
            layer.positions.copy_(tap_grid(conv, size)[:, None, None].expand_as(layer.positions))
        else:
            layer.reset_weights(conv.weight.float().std().item(), generator)
        if conv.bias is not None:
            layer.bias.copy_(conv.bias)
        return layer.to(conv.weight.device, conv.weight.dtype).train(conv.training)

    def effective_kernel(self) -> torch.Tensor:
        """Return the dense kernel [C_out, C_in / groups, h, w], in float32 or better, differentiable."""
        tensors = [self.weight, self.positions, self.sigma]
        with torch.autocast(self.weight.device.type, enabled=False):
            tensors = [t.float() if t is not None and t.dtype != torch.float64 else t for t in tensors]
            return build_kernel(*tensors, self.kernel_size, self.interpolation)

    def _kernel(self) -> torch.Tensor:
        """Return the kernel; in evaluation without gradients the last one, while no parameter has changed."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._cache = None
            return self.effective_kernel()
        own = [t for t in (self.weight, self.positions, self.sigma) if t is not None]
        state = [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in own]
        if self._cache is None or self._cache[0] != state:
            self._cache = state, self.effective_kernel()
        return self._cache[1]

    def train(self, mode: bool = True):
        self._cache = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for parameter in filter(lambda p: p is not None, (self.positions, self.sigma)):
            parameter.data = parameter.data.contiguous()  # 4-D, but no images: no channels-last for them
        return self

    def __getstate__(self):
        return self.__dict__ | {"_cache": None}

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        kernel, padding = self._kernel().to(x_NCHW.dtype), self.padding
        if self.padding_mode != "zeros":
            x_NCHW = F.pad(x_NCHW, (padding[1], padding[1], padding[0], padding[0]), self.padding_mode)
            padding = (0, 0)
        if self.groups == self.in_channels == self.out_channels:
            return depthwise_conv2d(x_NCHW, kernel, self.bias, self.stride, padding)
        return F.conv2d(x_NCHW, kernel, self.bias, self.stride, padding, groups=self.groups)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """Return the plain convolution that computes the same, with h w weights a channel pair."""
        like = {"device": self.weight.device, "dtype": self.weight.dtype, "padding_mode": self.padding_mode}
        rest = {"groups": self.groups, "bias": self.bias is not None}
        shape = self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding
        conv = nn.utils.skip_init(nn.Conv2d, *shape, **rest, **like)
        conv.weight.copy_(self.effective_kernel())
        if self.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def param_groups(self) -> list[dict]:
        """Positions and widths by object, not by name: a higher learning rate, no weight decay."""
        own = [p for p in (self.positions, self.sigma) if p is not None]
        return [{"params": own, "lr_factor": self.position_lr_factor, "weight_decay": 0.0}]

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp the positions into the kernel."""
        for axis, size in zip(self.positions, self.kernel_size):
            axis.clamp_(*limits(size))

    def auxiliary_loss(self, progress: float) -> torch.Tensor | None:
        """Return the repulsive loss of the group of layers; None from all but its first, and while it is
        off."""
        return self.repulsion.at(progress, self) if self.repulsion is not None else None

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Return the tap radius in pixels and the overlap of the taps; shared positions report once."""
        if self.repulsion is not None and not self.repulsion.owns(self):
            return {}
        return {name: value.item() for name, value in spread(self.positions.float()).items()}

    def extra_repr(self) -> str:
        names = "kernel_count", "kernel_size", "stride", "padding", "groups", "interpolation"
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{self.in_channels}, {self.out_channels}, {shown}"
