"""Gated positional self-attention that starts as a convolution: T-CNN (d'Ascoli et al., arXiv 2106.05795).

One head per kernel tap. Head h looks at its tap with positional attention A_pos (``gpsa_positions.py``) and
may open a gate to content attention (ConViT, d'Ascoli et al. 2021a):

    A_h = (1 - g_h) A_pos,h + g_h softmax(q_h k_h / sqrt(key_dim)),    Y = b + sum_h A_h (X W_val) W_out,h

with ``W_val = 1``, ``W_out,h`` the filter's tap h and the share g_h of content either the parameter itself
(``gate="linear"``, 0 at first: the layer is the convolution) or ``1 - sigmoid(lambda_h)``
(``gate="sigmoid"``). Zero padding is a halo of zero-valued keys, seen by positional attention only. Imports
torch and its siblings ``gpsa_*.py`` only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gpsa_attend import attend
from .gpsa_fold import ActsAsConv, is_same_conv
from .gpsa_positions import (
    centres_and_spans,
    key_positions,
    local_positions,
    onto_pixels,
    profile,
    query_positions,
    tap_offsets,
)

__all__ = ["GatedPositionalAttention", "is_same_conv"]


def _pair(value) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


class GatedPositionalAttention(ActsAsConv, nn.Module):
    """Attention in place of a convolution: [B, C_in, H, W] -> [B, C_out, H_out, W_out], any B, H, W.

    ``locality`` is alpha in 1/pixel^2 (relative error against the convolution about 4 exp(-alpha));
    ``key_dim`` the width of q and k per head (None: max(8, C_in // heads)); ``border`` "zero_halo" keeps the
    convolution's padding, "replicate" has no halo: the border then acts like replicated pixels.
    ``random_positions`` starts from no locality at all. With groups, W_val mixes within a group.
    ``generator`` (CPU) draws the parameters. Raises ``ValueError`` for settings out of range.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
        padding_mode="zeros", locality=15.0, gate="linear", gate_init=None, border="zero_halo", key_dim=None,
        random_positions=False, gate_lr_factor=1.0, position_lr_factor=1.0, generator=None,
    ):  # fmt: skip
        super().__init__()
        if gate not in ("linear", "sigmoid") or border not in ("zero_halo", "replicate"):
            raise ValueError(f"gate={gate!r}, border={border!r}: linear or sigmoid, zero_halo or replicate")
        if not locality > 0 or (key_dim is not None and (int(key_dim) != key_dim or key_dim < 1)):
            raise ValueError(f"locality={locality!r}, key_dim={key_dim!r}: both positive, key_dim whole")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        self.padding = padding if padding == "same" else _pair(0 if padding == "valid" else padding)
        self.padding_mode, self.gate_mode, self.border = padding_mode, gate, border
        self.gate_lr_factor, self.position_lr_factor = gate_lr_factor, position_lr_factor
        self.heads = heads = self.kernel_size[0] * self.kernel_size[1]
        self.key_dim = int(key_dim or max(8, in_channels // heads))
        self.tolerance: float | None = None  # None: TOLERANCE of the dtype; 0: always attend, never shorten

        width = in_channels // groups
        self.out_weight = nn.Parameter(torch.empty(out_channels, heads, width))
        nn.init.uniform_(self.out_weight, -((heads * width) ** -0.5), (heads * width) ** -0.5, generator=generator)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.value = nn.Parameter(torch.eye(width).repeat(groups, 1))  # [C_in, C_in / groups]
        self.query = nn.Parameter(torch.empty(heads * self.key_dim, in_channels))
        self.key = nn.Parameter(torch.empty(heads * self.key_dim, in_channels))
        for weight in (self.query, self.key):  # both zero would be a saddle without a gradient
            nn.init.trunc_normal_(weight, std=0.02, generator=generator)
        paddings = (self.padding, self.padding) if self.padding == "same" else self.padding
        axes = zip(self.kernel_size, self.stride, paddings, self.dilation, strict=True)
        self.axes = tuple(axes)  # (kernel, stride, padding, dilation) of y and of x
        start = local_positions(*(tap_offsets(*a) for a in self.axes), locality).to(self.value.dtype)
        if random_positions:
            nn.init.trunc_normal_(start, std=0.02, generator=generator)
        self.positions = nn.Parameter(start)  # [heads, 3], columns as in ConViT
        gate_init = {"linear": 0.0, "sigmoid": 5.0}[gate] if gate_init is None else gate_init
        self.gate = nn.Parameter(torch.full((heads,), float(gate_init)))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, random_filters: bool = False, **settings) -> "GatedPositionalAttention":
        """Return the layer that computes what ``conv`` does, with a copy of its weights.

        ``conv`` may be timm's ``Conv2dSame``; ``random_filters`` draws new ones; ``settings``: the class's.
        """
        padding = "same" if is_same_conv(conv) else conv.padding
        new = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding,
            conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode, **settings,
        )  # fmt: skip
        with torch.no_grad():
            if not random_filters:
                new.out_weight.copy_(conv.weight.flatten(2).transpose(1, 2))
            if conv.bias is not None:
                new.bias.copy_(conv.bias)
        return new.to(conv.weight.device, conv.weight.dtype).train(conv.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, gate={self.gate_mode}, border={self.border}, key_dim={self.key_dim}"
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.dim() == 3:
            return self.forward(x_BCHW[None])[0]
        learns = torch.is_grad_enabled()
        v_BCHW = self._values(x_BCHW)
        content = (learns and self.gate.requires_grad) or not self.gates_closed
        shortens = not content and not (learns and self.positions.requires_grad)
        if shortens and (taps_HK := self.tap_map()) is not None:
            return self._plus_bias(self.convolve(v_BCHW, taps_HK))
        dtype = v_BCHW.dtype  # autocast's, where it is on: positions and shares stay in float32
        q_BHDYX, k_BHDN = (t.to(dtype) for t in self.queries_and_keys(x_BCHW)) if content else (None, None)
        maps = (*self.pixel_profiles(*v_BCHW.shape[-2:]), self.content_share())
        with torch.autocast(v_BCHW.device.type, enabled=False):
            y_BCHW = attend(q_BHDYX, k_BHDN, v_BCHW, *maps, self.out_weight.to(dtype), self.groups)
        return self._plus_bias(y_BCHW)

    def _values(self, x_BCHW: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(x_BCHW.device.type):
            one = torch.eye(self.value.shape[1]).to(self.value).repeat(self.groups, 1)
            if torch.equal(self.value, one):  # at the start, where the product would take time and change nothing
                return x_BCHW
        return F.conv2d(x_BCHW, self.value[:, :, None, None], groups=self.groups)

    def _plus_bias(self, y_BCHW: Tensor) -> Tensor:
        return y_BCHW if self.bias is None else y_BCHW + self.bias.to(y_BCHW.dtype)[:, None, None]

    def content_share(self) -> Tensor:
        """Return g_h, the share of content attention in each head: [heads]."""
        return self.gate if self.gate_mode == "linear" else torch.sigmoid(-self.gate)

    def pixel_profiles(self, height: int, width: int) -> list[Tensor]:
        """Return the factors of A_pos over the pixels: [heads, H_out, H] and [heads, W_out, W]."""
        profiles = []
        for axis, size in enumerate((height, width)):
            key = key_positions(size, *self.axes[axis], halo=self.border == "zero_halo")
            rows = profile(self.positions, axis, query_positions(size, *self.axes[axis]), key)
            profiles.append(onto_pixels(rows, size, key, self.padding_mode))
        return profiles

    def queries_and_keys(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return q [B, heads, key_dim, H_out, W_out], times key_dim^-1/2, and k [B, heads, key_dim, H * W].

        The pixel under a query is its token; a query that stands in the padding takes the nearest pixel's.
        """
        tokens_BCHW = x_BCHW
        for axis in (0, 1):
            size = x_BCHW.shape[2 + axis]
            at = query_positions(size, *self.axes[axis]).clamp(0, size - 1)
            if not torch.equal(at, torch.arange(size)):
                tokens_BCHW = tokens_BCHW.index_select(2 + axis, at.to(x_BCHW.device))
        q = F.conv2d(tokens_BCHW, self.query[:, :, None, None] * self.key_dim**-0.5)
        k = F.conv2d(x_BCHW, self.key[:, :, None, None])
        return q.unflatten(1, (self.heads, -1)), k.flatten(2).unflatten(1, (self.heads, -1))

    def param_groups(self) -> list[dict]:
        """Keep gates and positions out of weight decay: it would widen the heads and open the gates."""
        return [
            {"params": [self.gate], "lr_factor": self.gate_lr_factor, "weight_decay": 0.0},
            {"params": [self.positions], "lr_factor": self.position_lr_factor, "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep linear gates in [0, 1]: every row of the mixed map stays a distribution over the keys."""
        if self.gate_mode == "linear":
            self.gate.clamp_(0.0, 1.0)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Return content shares, mean locality and how far a centre has moved from its tap (pixels)."""
        share_H = self.content_share()
        centres_H2, span_H = centres_and_spans(self.positions.double())
        taps_H2 = torch.cartesian_prod(*(tap_offsets(*a) for a in self.axes)).to(centres_H2)
        return {
            "content_share_mean": float(share_H.mean()),
            **{f"content_share_{h}": float(share) for h, share in enumerate(share_H)},
            "locality_mean": float((1 / span_H).mean()),
            "centre_drift": float((centres_H2 - taps_H2).norm(dim=1).max()),
        }


def _format(x_BCHW: Tensor) -> torch.memory_format:
    contiguous = x_BCHW.is_contiguous()
    return torch.contiguous_format if contiguous else torch.channels_last
