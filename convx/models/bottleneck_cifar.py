"""CIFAR ResNet with bottleneck blocks, ``bottleneck{D}_{W}`` (He et al., arXiv 1512.03385, figure 5 right, on
small images).

Depth D = 9n + 2: a stem, three stages of n blocks of three convolutions (1x1, 3x3, 1x1), and the head. The
3x3 of a stage has W, 2W, 4W channels, the block's output four times as many. The 1x1 behind each 3x3 combines
its filters linearly, with normalisation and ReLU in between: an implicit linear combination in the words of
arXiv 2301.11360, section 3. Bottleneck-29-16 on CIFAR-10: 313,114 parameters, 47.1 million
multiply-accumulates an image.
"""

import re

import torch.nn.functional as F
from torch import Tensor, nn

NAME = re.compile(r"bottleneck(?P<depth>\d+)_(?P<width>\d+)")
EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1 down, 3x3 with the stride, 1x1 up, shortcut; [N, c_in, H, W] -> [N, 4 width, H / s, W / s]."""

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        c_out = EXPANSION * width
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        y_BCHW = F.relu(self.bn2(self.conv2(y_BCHW)))
        return F.relu(self.bn3(self.conv3(y_BCHW)) + self.shortcut(x_BCHW))


class BottleneckCIFAR(nn.Module):
    """[N, C, H, W] -> logits [N, num_classes]; stages ``layer1`` to ``layer3``, the last two halve the
    resolution.

    Raises ``ValueError`` when the depth is not 9n + 2 or the width not positive.
    """

    def __init__(self, depth: int = 29, width: int = 16, num_classes: int = 10, in_channels: int = 3):
        super().__init__()
        if depth < 11 or (depth - 2) % 9:
            raise ValueError(f"bottleneck depth {depth}: it has 9n + 2 layers: 11, 20, 29, 38, 47, 56, 110, 164")
        if width < 1:
            raise ValueError(f"bottleneck width {width}: the first stage needs at least one channel")
        self.num_classes = num_classes
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.feature_info, c_in = [], width
        for stage in (1, 2, 3):
            inner, blocks = width * 2 ** (stage - 1), []
            for place in range((depth - 2) // 9):
                blocks.append(Bottleneck(c_in, inner, stride=2 if stage > 1 and place == 0 else 1))
                c_in = EXPANSION * inner
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": c_in, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
        self.fc = nn.Linear(c_in, num_classes)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the last feature map [N, 16 width, H / 4, W / 4], rounded up."""
        x_BCHW = F.relu(self.bn(self.stem(x_BCHW)))
        return self.layer3(self.layer2(self.layer1(x_BCHW)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.fc(self.forward_features(x_BCHW).mean(dim=(2, 3)))


def create(
    name: str, num_classes: int, in_channels: int = 3, image_size: int | None = None, **settings
) -> BottleneckCIFAR:
    """Build ``bottleneck{D}_{W}``; any image size works; ``settings``: depth, width, over the name's."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"model {name!r}: its name is bottleneck{{D}}_{{W}}, e.g. bottleneck29_16")
    if unknown := sorted(set(settings) - {"depth", "width"}):
        raise ValueError(f"model {name!r}: unknown setting {unknown[0]!r}; there are depth and width")
    arguments = {key: int(value) for key, value in match.groupdict().items()} | settings
    return BottleneckCIFAR(**arguments, num_classes=num_classes, in_channels=in_channels)
