"""When gated positional attention (T-CNN, arXiv 2106.05795) is a convolution, and which.

With closed gates and heads that look at single taps the attention maps select pixels, so the layer is the
convolution with the kernel ``K[:, :, t] = sum_h P[h, t] W_out,h W_val``, P the attention of head h on tap t.
Attention below ``TOLERANCE`` is dropped: the output moves by at most twice that share times ``sum |W| max
|X|``, less than the rounding of the convolution itself. Imports torch only; ``gpsa.py`` beside it uses it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gpsa_positions import axis_geometry, tap_shares

# Attention below this share of one is lost in the rounding of the sums that it enters.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


class Conv2dSame(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding at any stride: what such a layer folds to."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        axes = zip(self.kernel_size, self.stride, ("same", "same"), self.dilation, strict=True)
        padded_BCHW = pad(x_BCHW, tuple(axes), self.padding_mode)
        return F.conv2d(padded_BCHW, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def is_same_conv(module: nn.Module) -> bool:
    """True for a convolution with TensorFlow's padding: timm's ``Conv2dSame`` and the one above."""
    return isinstance(module, nn.Conv2d) and any(base.__name__ == "Conv2dSame" for base in type(module).__mro__)


def pad(x_BCHW: Tensor, axes: tuple, mode: str) -> Tensor:
    """Return the input padded as by a convolution; ``axes``: (kernel, stride, padding, dilation) of y, x."""
    (_, _, y0, y1), (_, _, x0, x1) = (
        axis_geometry(size, *axis) for size, axis in zip(x_BCHW.shape[-2:], axes, strict=True)
    )
    return F.pad(x_BCHW, (x0, x1, y0, y1), mode="constant" if mode == "zeros" else mode)


class ActsAsConv:
    """The part of ``GatedPositionalAttention`` that knows when it is a convolution."""

    @property
    def gates_closed(self) -> bool:
        """True when no head gives content more than a rounding error."""
        return float(self.content_share().detach().abs().max()) <= self.negligible()

    def negligible(self) -> float:
        """Return the share of attention that may be dropped."""
        return TOLERANCE.get(self.positions.dtype, 1e-3) if self.tolerance is None else self.tolerance

    def tap_map(self) -> Tensor | None:
        """Return each head's attention on the taps [heads, taps], or None when it is not on the taps alone.

        Without a halo attention beyond the border returns to the nearest pixel, as replicated pixels would,
        only if the head looks at one tap.
        """
        (py_HK, off_y), (px_HK, off_x) = (tap_shares(self.positions, i, *a) for i, a in enumerate(self.axes))
        taps_HK = (py_HK[:, :, None] * px_HK[:, None, :]).flatten(1)
        stray_H = off_y + off_x
        if self.border == "replicate":
            stray_H = stray_H + (1 - taps_HK.max(dim=1).values)
        alone = float(stray_H.detach().max()) < self.negligible()
        return taps_HK.to(self.out_weight.dtype) if alone else None

    def convolve(self, v_BCHW: Tensor, taps_HK: Tensor) -> Tensor:
        """Closed gates and heads on the taps: attention is the convolution, within the tolerance."""
        v_BCHW = pad(v_BCHW, self.axes, self._fold_mode())
        kernel = (taps_HK.T @ self.out_weight).transpose(1, 2).unflatten(2, self.kernel_size).contiguous()
        return F.conv2d(v_BCHW, kernel, None, self.stride, 0, self.dilation, self.groups)

    def _fold_mode(self) -> str:
        return "replicate" if self.border == "replicate" else self.padding_mode

    @property
    def foldable(self) -> bool:
        """True while the layer is a convolution: gates closed, every head on the taps."""
        return self.gates_closed and self.tap_map() is not None

    def effective_kernel(self) -> Tensor:
        """Return the kernel [C_out, C_in / groups, K_y, K_x] of the layer; ``ValueError`` if it has none."""
        taps_HK = self.tap_map()
        if taps_HK is None or not self.gates_closed:
            raise ValueError("the layer is not a convolution: a gate is open or a head looks beside the taps")
        w = (taps_HK.T @ self.out_weight).unflatten(0, (self.groups, -1))
        w = w @ self.value.unflatten(0, (self.groups, -1))[:, None]
        return w.flatten(0, 1).transpose(1, 2).unflatten(2, self.kernel_size)

    def fold(self) -> nn.Conv2d:
        """Return the convolution that the layer stands for; ``ValueError`` if it is none."""
        kernel = self.effective_kernel().detach()
        tensorflow_same = self.padding == "same" and self.stride != (1, 1)
        conv = torch.nn.utils.skip_init(
            Conv2dSame if tensorflow_same else nn.Conv2d, self.in_channels, self.out_channels,
            self.kernel_size, self.stride, 0 if tensorflow_same else self.padding, self.dilation, self.groups,
            self.bias is not None, self._fold_mode(), device=kernel.device, dtype=kernel.dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(kernel)
            if self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)
