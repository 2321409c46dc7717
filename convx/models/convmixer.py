"""ConvMixer for small images, ``convmixer{W}_{D}[_k{K}][_p{P}]`` (Trockman and Kolter, "Patches Are All You
Need?", arXiv 2201.09792).

A patch embedding of width W, then D blocks: a residual depthwise K x K convolution and a 1x1 convolution,
each followed by GELU and batch normalisation. Every spatial convolution is combined linearly by the 1x1
behind it, with a nonlinearity in between. Kernel 5 and patch 2 by default, as in the authors' CIFAR-10 code;
convolutions have biases there and here. ConvMixer-128-8 on CIFAR-10: 166,026 parameters, 40.5 million
multiply-accumulates an image.
"""

import re

import torch.nn.functional as F
from torch import Tensor, nn

NAME = re.compile(r"convmixer(?P<width>\d+)_(?P<depth>\d+)(_k(?P<kernel>\d+))?(_p(?P<patch>\d+))?")


class ConvMixerBlock(nn.Module):
    """Residual depthwise convolution, then a 1x1 convolution; [N, W, H, W'] -> the same shape."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.bn1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW + self.bn1(F.gelu(self.depthwise(x_BCHW)))
        return self.bn2(F.gelu(self.pointwise(x_BCHW)))


class ConvMixer(nn.Module):
    """[N, C, H, W] -> logits [N, num_classes]; ``stem`` embeds the patches, ``blocks`` is the one stage,
    ``fc`` the head.

    Raises ``ValueError`` for an even kernel or a size below 1.
    """

    def __init__(
        self,
        width: int = 128,
        depth: int = 8,
        kernel: int = 5,
        patch: int = 2,
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"convmixer kernel {kernel}: the kernel size must be odd: 3, 5, 7, 9")
        if min(width, depth, patch) < 1:
            raise ValueError(f"convmixer width {width}, depth {depth}, patch {patch}: each must be at least 1")
        self.num_classes = num_classes
        self.stem = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(ConvMixerBlock(width, kernel) for _ in range(depth)))
        self.feature_info = [{"num_chs": width, "reduction": patch, "module": "blocks"}]
        self.fc = nn.Linear(width, num_classes)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the last feature map [N, width, H // patch, W // patch]."""
        return self.blocks(self.bn(F.gelu(self.stem(x_BCHW))))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.fc(self.forward_features(x_BCHW).mean(dim=(2, 3)))


def create(name: str, num_classes: int, in_channels: int = 3, image_size: int | None = None, **settings) -> ConvMixer:
    """Build ``convmixer{W}_{D}[_k{K}][_p{P}]``; ``settings`` override what the name says.

    Raises ``ValueError`` for another name, an unknown setting, or images smaller than a patch.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"model {name!r}: its name is convmixer{{W}}_{{D}}[_k{{K}}][_p{{P}}], e.g. convmixer128_8_k9")
    arguments = {"kernel": 5, "patch": 2} | {key: int(value) for key, value in match.groupdict().items() if value}
    if unknown := sorted(set(settings) - {"width", "depth", "kernel", "patch"}):
        raise ValueError(
            f"model {name!r}: unknown setting {unknown[0]!r}; the settings are depth, kernel, patch, width"
        )
    arguments |= settings
    if image_size is not None and image_size < arguments["patch"]:
        raise ValueError(f"model {name!r}: {image_size} px images are below the patch of {arguments['patch']} px")
    return ConvMixer(**arguments, num_classes=num_classes, in_channels=in_channels)
