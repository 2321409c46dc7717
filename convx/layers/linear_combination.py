"""LC block: learned linear combinations of fixed random filters (Gavrikov and Keuper, "The Power of Linear
Combinations: Learning with Random Convolutions", arXiv 2301.11360, section 4).

A convolution with fixed filters F, then a learned 1x1 convolution A with nothing in between, is one
convolution (lemma 3.1): W[o] = sum_m A[o, m] F[m]. ``folded`` builds W in each step and convolves once, at
the cost of the plain layer for any number of filters. ``two_layer`` runs both convolutions, which is needed
where an operation stands between them (table 3).

The bank itself, and how a checkpoint holds it as a seed: ``frozen_bank.py``; the kinds of banks:
``filter_banks.py``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frozen_bank import FilterBank

MODES = ("folded", "two_layer")
MIDDLES = ("none", "relu", "bn", "bn_relu")
FORMS = ("dense", "depthwise")


class LinearCombinationConv2d(nn.Module):
    """Drop-in for a convolution, [N, c_in, H, W] -> [N, c_out, H', W']; shape arguments as in ``nn.Conv2d``.

    Form "dense": M = c_out E filters over the channels of their group, E for each output. Form "depthwise":
    M = c_in E filters of one channel, E for each input. On a depthwise convolution both are the same.
    ``combination`` [c_out, M / groups] is always learned, the filters with ``frozen=False`` only.
    ``seed`` draws the bank and should differ from layer to layer except for "shared"; ``combination_seed``
    draws the combinations and the bias, within the bounds of ``nn.Conv2d``. ``shared_shape`` and ``root``:
    see ``draw_bank``. Raises ``ValueError`` for unknown choices and for settings that exclude each other.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=False,
        padding_mode="zeros", *, expansion: int = 1, bank: str = "iid_uniform", frozen: bool = True,
        mode: str = "folded", middle: str = "none", form: str = "dense", seed: int = 0,
        combination_seed: int = 1, shared_shape: tuple[int, int] | None = None, root: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        for key, value, known in (("mode", mode, MODES), ("middle", middle, MIDDLES), ("form", form, FORMS)):
            if value not in known:
                raise ValueError(f"{key}={value!r} is unknown; it is one of {', '.join(known)}")
        if middle != "none" and mode == "folded":
            raise ValueError(f"middle={middle!r}: an operation inside cannot be folded, set mode='two_layer'")
        if bank == "edges_and_lines" and form != "depthwise":
            raise ValueError("bank='edges_and_lines' holds filters of one channel, set form='depthwise'")
        if int(expansion) != expansion or expansion < 1:
            raise ValueError(f"expansion={expansion!r}: the number of filters per channel is a whole number >= 1")
        conv = nn.Conv2d(  # checks the arguments and brings them to one form
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device="meta",
        )  # fmt: skip
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.padding_mode = conv.dilation, conv.padding_mode
        self.border = list(conv._reversed_padding_repeated_twice)
        self.expansion, self.mode, self.middle, self.form = int(expansion), mode, middle, form
        self.filters, filter_channels = self.bank_size(conv, self.expansion, form)
        self.bank = FilterBank(
            bank, (self.filters, filter_channels, *self.kernel_size), seed, frozen, shared_shape, root
        )
        self.between = nn.Sequential()
        if "bn" in middle:
            self.between.append(nn.BatchNorm2d(self.filters))
        if "relu" in middle:
            self.between.append(nn.ReLU())
        bound = 1 / math.sqrt(self.filters // groups)
        generator = torch.Generator(device="cpu").manual_seed(combination_seed)

        def uniform(*shape: int) -> nn.Parameter:
            drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            return nn.Parameter(drawn.mul_(2 * bound).sub_(bound))

        self.combination = uniform(out_channels, self.filters // groups)
        self.bias = uniform(out_channels) if bias else None

    @staticmethod
    def bank_size(conv: nn.Conv2d, expansion: int, form: str) -> tuple[int, int]:
        """Return (filters, channels of a filter) of the bank that stands in for a convolution."""
        if form == "depthwise":
            return int(expansion) * conv.in_channels, 1
        return int(expansion) * conv.out_channels, conv.in_channels // conv.groups

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, fit: bool = False, **settings) -> "LinearCombinationConv2d":
        """Return a block with a convolution's shape, bias, device and dtype; ``settings`` are the class's.

        ``fit`` sets A = W F^+: the kernel nearest to W that the bank can express (W itself, up to rounding,
        once c_out E >= c_in k^2 in the dense form), by the combinations of least norm.
        """
        if fit and settings.get("middle", "none") != "none":
            raise ValueError(f"middle={settings['middle']!r}: only a linear block can be fitted to a convolution")
        new = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, **settings,
        )  # fmt: skip
        new.to(conv.weight.device, conv.weight.dtype).train(conv.training)
        with torch.no_grad():
            if conv.bias is not None:
                new.bias.copy_(conv.bias)
            if fit:
                filters_bpm, weight_bpo = (t.double().cpu().mT for t in (new._filters(), new._split(conv.weight)))
                solution_bmo = torch.linalg.lstsq(filters_bpm, weight_bpo, driver="gelsd").solution
                new.combination.copy_(new._join(solution_bmo.mT, new.combination.shape))
        return new

    @property
    def foldable(self) -> bool:
        """True when nothing stands between the two convolutions."""
        return self.middle == "none"

    def _filters(self) -> Tensor:
        """Return the bank as [b, m, p]: b a group (dense) or an input channel, m a filter, p its weights."""
        blocks = self.groups if self.form == "dense" else self.in_channels
        return self.bank.filters.view(blocks, self.filters // blocks, -1)

    def _split(self, tensor: Tensor) -> Tensor:
        """Return combinations or kernels [c_out, ...] as matrices [b, o, ...] that go with the filters."""
        if self.form == "dense":
            return tensor.reshape(self.groups, self.out_channels // self.groups, -1)
        shape = (self.groups, self.out_channels // self.groups, self.in_channels // self.groups, -1)
        return tensor.reshape(shape).transpose(1, 2).flatten(0, 1)

    def _join(self, matrices: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo ``_split``."""
        if self.form == "depthwise":
            split = (self.groups, self.in_channels // self.groups, self.out_channels // self.groups, -1)
            matrices = matrices.reshape(split).transpose(1, 2)
        return matrices.reshape(shape)

    def effective_kernel(self) -> Tensor:
        """Return W, [c_out, c_in / groups, k_h, k_w], in float32 at least, under autocast too."""
        if not self.foldable:
            raise ValueError(f"middle={self.middle!r}: the block is not one convolution and has no effective kernel")
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        with torch.autocast(self.combination.device.type, enabled=False):
            dtype = torch.promote_types(self.bank.filters.dtype, torch.float32)  # a learned bank may be half
            combination_bom = self._split(self.combination.to(dtype))
            return self._join(combination_bom @ self._filters().to(dtype), shape)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x_BCHW, padding = F.pad(x_BCHW, self.border, mode=self.padding_mode), 0
        if self.mode == "folded":
            kernel = self.effective_kernel().to(x_BCHW.dtype)
            return F.conv2d(x_BCHW, kernel, self.bias, self.stride, padding, self.dilation, self.groups)
        groups = self.in_channels if self.form == "depthwise" else self.groups
        y_BMHW = F.conv2d(x_BCHW, self.bank.filters.to(x_BCHW.dtype), None, self.stride, padding, self.dilation, groups)
        return F.conv2d(self.between(y_BMHW), self.combination[:, :, None, None], self.bias, groups=self.groups)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """Return the plain convolution with the same outputs."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode,
            device=self.combination.device, dtype=self.combination.dtype,
        )  # fmt: skip
        conv.weight.copy_(self.effective_kernel())
        if self.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Return shape and settings in one line."""
        names = ("kernel_size", "stride", "groups", "expansion", "mode", "middle", "form")
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        bank = f"bank={self.bank.kind}, frozen={self.bank.frozen}"
        return f"{self.in_channels}, {self.out_channels}, {settings}, {bank}"
