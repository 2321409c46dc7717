"""A small ConvNeXt for 32 px images (Liu et al., arXiv 2201.03545): two stages, at 1/2 and 1/4 of the image
size.

Patch stem 2x2, blocks of a large depthwise convolution and two pointwise layers, 2x2 downsampling, as the
host of DCLS at the scale of CIFAR. 0.56 M parameters with the default widths. Every module's
``reset_parameters`` is its initialisation here (normal weights of deviation 0.02 truncated at 2, biases 0,
layer scale 1e-6), so a network can be drawn anew module by module.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

LAYER_SCALE = 1e-6
WEIGHT_STD = 0.02


class Conv2d(nn.Conv2d):
    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.bias)


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.bias)


class LayerNorm2d(nn.LayerNorm):
    """Normalise over the channels of [N, C, H, W]."""

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return super().forward(x_NCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + scale * pointwise(GELU(pointwise(norm(depthwise(x)))))."""

    def __init__(self, width: int, kernel: int, dilation: int, drop_path: float):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv_dw = Conv2d(width, width, kernel, padding=padding, dilation=dilation, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.empty(width))
        self.drop_path = drop_path
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, LAYER_SCALE)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        x_NHWC = self.conv_dw(x_NCHW).permute(0, 2, 3, 1)
        x_NHWC = self.gamma * self.fc2(F.gelu(self.fc1(self.norm(x_NHWC))))
        if self.training and self.drop_path:
            kept = torch.rand(len(x_NHWC), 1, 1, 1, device=x_NHWC.device) >= self.drop_path
            x_NHWC = x_NHWC * kept / (1 - self.drop_path)
        return x_NCHW + x_NHWC.permute(0, 3, 1, 2)


class ConvNeXtCifar(nn.Module):
    """[N, C, H, W] -> [N, classes]; H and W from 4 on."""

    def __init__(self, num_classes, in_channels, widths, depths, kernels, dilation, drop_path):
        super().__init__()
        self.stem = nn.Sequential(Conv2d(in_channels, widths[0], 2, stride=2), LayerNorm2d(widths[0], eps=1e-6))
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()
        self.stages, before = nn.Sequential(), widths[0]
        for place, (width, depth, kernel) in enumerate(zip(widths, depths, kernels, strict=True)):
            down = [LayerNorm2d(before, eps=1e-6), Conv2d(before, width, 2, stride=2)] if place else []
            blocks = [Block(width, kernel, dilation, rates.pop(0)) for _ in range(depth)]
            self.stages.append(nn.Sequential(*down, *blocks))
            before = width
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (place + 1), "module": f"stages.{place}"}
            for place, width in enumerate(widths)
        ]
        self.norm = nn.LayerNorm(before, eps=1e-6)
        self.fc = Linear(before, num_classes)

    def forward_features(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.stages(self.stem(x_NCHW))

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.forward_features(x_NCHW).mean((2, 3))))


def create(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    widths: tuple[int, ...] = (64, 128),
    depths: tuple[int, ...] = (3, 3),
    kernels: tuple[int, ...] | None = None,
    dilation: int = 1,
    drop_path: float = 0.0,
) -> ConvNeXtCifar:
    """Build ``convnext_cifar`` (7x7 kernels) or ``convnext_cifar_k<K>``; ``kernels`` gives each stage its own
    size instead.

    ``dilation`` spaces the taps of every depthwise kernel by so many pixels; ``drop_path`` is the last
    block's rate of stochastic depth, rising linearly from 0. Raises ``ValueError`` for even kernels and lists
    of unequal length.
    """
    size = int(re.fullmatch(r"convnext_cifar(?:_k(\d+))?", name).group(1) or 7)
    kernels = [size] * len(widths) if kernels is None else list(kernels)
    if not len(widths) == len(depths) == len(kernels):
        raise ValueError(f"{name}: one number a stage is wanted in {widths=}, {depths=} and {kernels=}")
    if any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
        raise ValueError(f"{name}: kernels={kernels} must be odd")
    if not 0 <= drop_path < 1 or dilation < 1:
        raise ValueError(f"{name}: drop_path={drop_path} must be in [0, 1) and dilation={dilation} at least 1")
    return ConvNeXtCifar(num_classes, in_channels, list(widths), list(depths), kernels, dilation, drop_path)
