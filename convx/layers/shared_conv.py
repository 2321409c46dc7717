"""The convolution inside an attention layer: one spatial shift a head (Zhang et al. 2022, arXiv 2112.03552, eq. 1-5).

Attention is ``sum_h Psi_h X W_V^h W_O^h``, a convolution is ``sum_i Phi_i X W_i`` with one-hot shifts Phi. With a shift in
place of each head's attention matrix the layer is a convolution whose tap h is ``W_O[:, h] @ W_V[h]``, of rank d / H:
2 d^2 weights drive a kernel of H d^2. Only torch is needed here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kernel_size(heads: int) -> int:
    """Return the side of the kernel that holds one tap a head: ceil(sqrt(H)), one more where that is even."""
    side = 1
    while side * side < heads:
        side += 2
    return side


def head_cells(heads: int, offsets: str = "raster") -> list[int]:
    """Return the cell of each head in the kernel, row-major: 0 is its upper left corner.

    "raster": head h takes the h-th cell, as the official code does (for 6 heads the rows above and through the centre);
    "nearest": the H cells nearest to the centre, in row-major order (equal distances: the earlier cell first).
    """
    side = kernel_size(heads)
    cells = list(range(side * side))
    if offsets == "nearest":
        half = side // 2
        cells.sort(key=lambda c: ((c // side - half) ** 2 + (c % side - half) ** 2, c))
        cells = sorted(cells[:heads])
    return cells[:heads]


def assemble(value_weight: Tensor, out_weight: Tensor, heads: int) -> Tensor:
    """Return the taps [d_out, H, d_in] of a layer with W_V [d, d_in] (head-major rows) and W_O [d_out, d]."""
    value_HKI = value_weight.unflatten(0, (heads, -1))
    out_HOK = out_weight.unflatten(1, (heads, -1)).transpose(0, 1)
    return torch.bmm(out_HOK, value_HKI).transpose(0, 1)


class _TapConv(nn.Module):
    """A k x k convolution, stride 1, zero padding, of which only some cells have a tap. ``taps()`` gives [d_out, H, d_in]."""

    def __init__(self, heads: int, offsets: str):
        super().__init__()
        self.side = kernel_size(heads)
        self.cells = head_cells(heads, offsets)
        index = None if self.cells == list(range(self.side**2)) else torch.tensor(self.cells)
        self.register_buffer("index", index, persistent=False)

    def effective_kernel(self) -> Tensor:
        """Return the kernel [d_out, d_in, k, k]; it is built anew, so gradients reach the weights behind it."""
        taps_OHI = self.taps()
        if self.index is not None:
            empty = taps_OHI.new_zeros(taps_OHI.shape[0], self.side**2, taps_OHI.shape[2])
            taps_OHI = empty.index_copy(1, self.index, taps_OHI)
        return taps_OHI.contiguous().unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)  # channels_last, no copy

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.conv2d(x_BCHW, self.effective_kernel(), self.bias, padding=self.side // 2)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """Return the plain convolution with the present kernel."""
        kernel = self.effective_kernel()
        bias = self.bias is not None
        conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], self.side, padding=self.side // 2, bias=bias)
        conv = conv.to(kernel.device, kernel.dtype)
        conv.weight.copy_(kernel)
        if bias:
            conv.bias.copy_(self.bias)
        return conv

    def extra_repr(self) -> str:
        return f"{self.side}x{self.side}, cells={self.cells}"


class SharedConv2d(_TapConv):
    """The convolution made of an attention layer's own W_V, W_O and b_O; it owns no weight.

    ``attention`` has ``qkv`` (one linear layer, rows q, k, v, head-major), ``proj`` and ``num_heads``, like timm's. Its
    modules are kept outside the registry: they belong to the ViT, and neither the parameters nor the state dict of an agent
    hold them. The kernel is built in every forward pass, so an update of the attention is seen at once, also after
    ``load_state_dict(assign=True)``. b_V is not used: it would differ from attention at the zero-padded border.
    """

    def __init__(self, attention: nn.Module, offsets: str = "raster"):
        super().__init__(attention.num_heads, offsets)
        self.heads = attention.num_heads
        self._shared = (attention.qkv, attention.proj)

    @property
    def bias(self) -> Tensor | None:
        return self._shared[1].bias

    def taps(self) -> Tensor:
        """Return the taps [d_out, H, d_in], one a head."""
        qkv, proj = self._shared
        return assemble(qkv.weight[-proj.in_features :], proj.weight, self.heads)


class TapConv2d(_TapConv):
    """The same convolution with weights of its own: H free taps [d_out, H, d_in] and a bias, as in a stand-alone agent."""

    def __init__(self, channels: int, heads: int, offsets: str = "raster", bias: bool = True):
        super().__init__(heads, offsets)
        self.weight = nn.Parameter(torch.empty(channels, heads, channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the taps uniformly with Glorot's bound over all taps; the bias is zero."""
        bound = (6 / (2 * self.weight.shape[0] * self.weight.shape[1])) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def taps(self) -> Tensor:
        """Return the taps [d_out, H, d_in]."""
        return self.weight


class SharedPointwise(nn.Module):
    """A linear layer of the ViT as a 1x1 convolution, its weights referred to and not owned."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._shared = (linear,)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        linear = self._shared[0]
        return F.conv2d(x_BCHW, linear.weight[..., None, None], linear.bias)
