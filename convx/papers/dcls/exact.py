"""Exact claims of the DCLS papers: tap counts, parameters and multiply-adds of ConvNeXt at 224 px.

Networks are built without memory (PyTorch's meta device); multiply-adds are counted as everywhere in convx.
"""

from functools import partial

import torch
from torch import nn

from convx.evaluate.cost import macs, parameter_counts
from convx.layers.dcls_spacings import iso_parameter_kernel_count
from convx.models import create_model
from convx.replacing import is_spatial_conv, replace

SIZES = {"t": "timm/convnext_tiny", "s": "timm/convnext_small", "b": "timm/convnext_base"}
SIDE = 17  # of the constructed kernel in every stage


def _dense(size: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(SIZES[size], num_classes=1000, image_size=224)


def _stages(model: nn.Module) -> tuple[list[int], list[int]]:
    """Return (channels, depths) of the stages."""
    return [info["num_chs"] for info in model.feature_info], [len(stage.blocks) for stage in model.stages]


def _is_depthwise(module: nn.Module) -> bool:
    return is_spatial_conv(module) and module.groups == module.in_channels


def taps(size: str, positions_per_tap: int = 2) -> float:
    """Return the tap count at which the network has as many parameters as with dense 7x7 kernels."""
    return iso_parameter_kernel_count(*_stages(_dense(size)), 7, positions_per_tap)


def parameters(size: str, spaced: bool = False) -> float:
    """Return the millions of parameters; ``spaced``: with taps, and positions shared by a stage's blocks."""
    model = _dense(size)
    total = parameter_counts(model)["parameters"]
    if spaced:
        channels, depths = _stages(model)
        count = iso_parameter_kernel_count(channels, depths)
        kernels = sum(c * d for c, d in zip(channels, depths))
        total += count * (kernels + 2 * sum(channels)) - 49 * kernels
    return total / 1e6


def multiply_adds(size: str, spaced: bool = False) -> float:
    """Return the billions of multiply-adds of an image; ``spaced``: with the constructed 17x17 kernels."""
    model = _dense(size)
    if spaced:

        def constructed(name: str, conv: nn.Conv2d) -> nn.Conv2d:
            return nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                SIDE,
                padding=SIDE // 2,
                groups=conv.groups,
                device="meta",
            )

        model = replace(model, "*", _is_depthwise, constructed, "exact", "depthwise convolution")
    return macs(model, torch.empty(1, 3, 224, 224, device="meta"))[0] / 1e9


taps_t, taps_s, taps_b = (partial(taps, size) for size in SIZES)
taps_t_gauss = partial(taps, "t", 4)  # a width for each axis beside the two coordinates
parameters_t_dense, parameters_s_dense, parameters_b_dense = (partial(parameters, size) for size in SIZES)
parameters_t_dcls, parameters_s_dcls, parameters_b_dcls = (partial(parameters, size, True) for size in SIZES)
macs_t_dense, macs_s_dense, macs_b_dense = (partial(multiply_adds, size) for size in SIZES)
macs_t_dcls, macs_s_dcls, macs_b_dcls = (partial(multiply_adds, size, True) for size in SIZES)
