"""A small MobileNetV2 for small images, ``mobilenet{D}_{W}`` (Sandler et al., arXiv 1801.04381, table 1 and
figure 4).

Depth D = 3n + 2 counts the spatial convolutions and the head: a stem, three stages of n inverted residual
blocks with W, 2W and 4W outputs. A block is a 1x1 expansion (factor 6; none in the first block), a 3x3
depthwise convolution and a linear 1x1 projection, with normalisation and ReLU6 before the projection. A 1x1
convolution to 16W channels precedes the pooling. MobileNet-20-16 on CIFAR-10: 414,730 parameters, 61.9
million multiply-accumulates an image.
"""

import re

import torch.nn.functional as F
from torch import Tensor, nn

NAME = re.compile(r"mobilenet(?P<depth>\d+)_(?P<width>\d+)")
EXPANSION = 6


class InvertedResidual(nn.Module):
    """Expand, filter, project, add the input where shapes agree; [N, c_in, H, W] -> [N, c_out, H', W']."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        inner = c_in * expansion
        self.expand = nn.Identity()
        if expansion > 1:
            self.expand = nn.Sequential(nn.Conv2d(c_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6())
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, c_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu6(self.bn1(self.depthwise(self.expand(x_BCHW))))
        y_BCHW = self.bn2(self.project(y_BCHW))
        return x_BCHW + y_BCHW if self.residual else y_BCHW


class MobileNetCIFAR(nn.Module):
    """[N, C, H, W] -> logits [N, num_classes]; stages ``layer1`` to ``layer3``, the last two halve the
    resolution.

    Raises ``ValueError`` when the depth is not 3n + 2 or the width not positive.
    """

    def __init__(self, depth: int = 20, width: int = 16, num_classes: int = 10, in_channels: int = 3):
        super().__init__()
        if depth < 5 or (depth - 2) % 3:
            raise ValueError(f"mobilenet depth {depth}: it has 3n + 2 layers: 5, 8, 11, 14, 17, 20")
        if width < 1:
            raise ValueError(f"mobilenet width {width}: the first stage needs at least one channel")
        self.num_classes = num_classes
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.feature_info, c_in = [], width
        for stage in (1, 2, 3):
            c_out, blocks = width * 2 ** (stage - 1), []
            for place in range((depth - 2) // 3):
                first = stage == 1 and place == 0
                stride = 2 if stage > 1 and place == 0 else 1
                blocks.append(InvertedResidual(c_in, c_out, stride, expansion=1 if first else EXPANSION))
                c_in = c_out
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": c_out, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
        self.last = nn.Sequential(nn.Conv2d(c_in, 4 * c_in, 1, bias=False), nn.BatchNorm2d(4 * c_in), nn.ReLU6())
        self.fc = nn.Linear(4 * c_in, num_classes)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the last feature map [N, 16 width, H / 4, W / 4], rounded up."""
        x_BCHW = F.relu6(self.bn(self.stem(x_BCHW)))
        return self.last(self.layer3(self.layer2(self.layer1(x_BCHW))))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.fc(self.forward_features(x_BCHW).mean(dim=(2, 3)))


def create(
    name: str, num_classes: int, in_channels: int = 3, image_size: int | None = None, **settings
) -> MobileNetCIFAR:
    """Build ``mobilenet{D}_{W}``; any image size works; ``settings``: depth, width, over the name's."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"model {name!r}: its name is mobilenet{{D}}_{{W}}, e.g. mobilenet20_16")
    if unknown := sorted(set(settings) - {"depth", "width"}):
        raise ValueError(f"model {name!r}: unknown setting {unknown[0]!r}; there are depth and width")
    arguments = {key: int(value) for key, value in match.groupdict().items()} | settings
    return MobileNetCIFAR(**arguments, num_classes=num_classes, in_channels=in_channels)
