"""CIFAR ResNet with basic blocks, ``resnet{D}_{W}[_k{K}][_dw]`` (He et al., arXiv 1512.03385, section 4.2).

Depth D = 6n + 2 counts the spatial convolutions and the linear head, W is the width of the first of three
stages (W, 2W, 4W). Where shape changes, the shortcut is a 1x1 convolution with batch normalisation (option
B). Convolutions have no bias and keep PyTorch's default initialisation, as in the trainer of the first author
of arXiv 2301.11360. With ``_k{K}`` every 3x3 kernel is KxK (padding K // 2). With ``_dw`` every spatial
convolution is a depthwise one followed by a 1x1 convolution with nothing in between: a linear combination by
construction. ResNet-20-16 on CIFAR-10: 272,474 parameters, 40.8 million multiply-accumulates an image.
"""

import re

import torch.nn.functional as F
from torch import Tensor, nn

NAME = re.compile(r"resnet(?P<depth>\d+)_(?P<width>\d+)(_k(?P<kernel>\d+))?(?P<depthwise>_dw)?")


def spatial_conv(c_in: int, c_out: int, kernel: int, stride: int = 1, depthwise: bool = False) -> nn.Module:
    """Return the K x K convolution of the network, or its depthwise and pointwise pair."""
    if not depthwise:
        return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, kernel, stride, padding=kernel // 2, groups=c_in, bias=False),
        nn.Conv2d(c_in, c_out, 1, bias=False),
    )


class BasicBlock(nn.Module):
    """Two spatial convolutions and a shortcut; [N, c_in, H, W] -> [N, c_out, H / stride, W / stride]."""

    def __init__(self, c_in: int, c_out: int, stride: int, kernel: int, depthwise: bool):
        super().__init__()
        self.conv1 = spatial_conv(c_in, c_out, kernel, stride, depthwise)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = spatial_conv(c_out, c_out, kernel, 1, depthwise)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        return F.relu(self.bn2(self.conv2(y_BCHW)).add_(self.shortcut(x_BCHW)), inplace=True)


class ResNetCIFAR(nn.Module):
    """ResNet of three stages of ``(depth - 2) / 6`` basic blocks; [N, C, H, W] -> logits [N, num_classes].

    ``stem`` is the first convolution; ``layer1`` to ``layer3`` are the stages, the last two halve the
    resolution; ``fc`` is the head. Raises ``ValueError`` when the depth is not 6n + 2, the kernel is even, or
    the width is not positive.
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        kernel: int = 3,
        depthwise: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"resnet depth {depth}: a CIFAR ResNet has 6n + 2 layers: 8, 14, 20, 32, 44, 56, 110")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"resnet kernel {kernel}: the kernel size must be odd: 3, 5, 7, 9")
        if width < 1:
            raise ValueError(f"resnet width {width}: the first stage needs at least one channel")
        self.num_classes = num_classes
        self.stem = spatial_conv(in_channels, width, kernel, depthwise=depthwise)
        self.bn = nn.BatchNorm2d(width)
        self.feature_info, c_in = [], width
        for stage in (1, 2, 3):
            c_out, blocks = width * 2 ** (stage - 1), []
            for place in range((depth - 2) // 6):
                stride = 2 if stage > 1 and place == 0 else 1
                blocks.append(BasicBlock(c_in, c_out, stride, kernel, depthwise))
                c_in = c_out
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": c_out, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
        self.fc = nn.Linear(c_in, num_classes)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the last feature map [N, 4W, ceil(H / 4), ceil(W / 4)]."""
        x_BCHW = F.relu(self.bn(self.stem(x_BCHW)), inplace=True)
        return self.layer3(self.layer2(self.layer1(x_BCHW)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.fc(self.forward_features(x_BCHW).mean(dim=(2, 3)))


def create(name: str, num_classes: int, in_channels: int = 3, image_size: int | None = None, **settings) -> ResNetCIFAR:
    """Build ``resnet{D}_{W}[_k{K}][_dw]``; any image size works, ``settings`` override what the name says."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"model {name!r}: its name is resnet{{D}}_{{W}}[_k{{K}}][_dw], e.g. resnet20_16_k5")
    known = {"depth", "width", "kernel", "depthwise"}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"model {name!r}: unknown setting {unknown[0]!r}; the settings are {', '.join(sorted(known))}")
    arguments = {
        "depth": int(match["depth"]),
        "width": int(match["width"]),
        "kernel": int(match["kernel"] or 3),
        "depthwise": match["depthwise"] is not None,
    }
    return ResNetCIFAR(**{**arguments, **settings}, num_classes=num_classes, in_channels=in_channels)
