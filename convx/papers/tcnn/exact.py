"""Exact claims of the T-CNN paper: a recast network computes the function of the network it was made from."""

import torch
from torch import nn

from convx.models import create_model
from convx.papers.tcnn.analysis import recast_layers
from convx.seeds import generator
from convx.surgery import recast_attention


def layer_error() -> float:
    """Return the largest relative L2 error of a recast 3x3 layer, strides 1 and 2, float64, locality 46."""
    draws = generator(0, "exact", "tcnn.layer")
    errors = []
    for stride in (1, 2):
        conv = nn.Conv2d(16, 24, 3, stride, padding=1)
        for parameter in conv.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draws)
        x_BCHW = torch.randn(2, 16, 9, 11, generator=draws, dtype=torch.float64)
        errors.append(_error(nn.Sequential(conv), x_BCHW, locality=46.0))
    return max(errors)


def network_error() -> float:
    """Return the relative L2 error of ResNet-20's logits with the last stage recast, float32, locality 20."""
    draws = generator(0, "exact", "tcnn.network")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model("resnet20_16", num_classes=10)
    x_BCHW = torch.randn(4, 3, 32, 32, generator=draws)
    model.train()
    with torch.no_grad():  # running statistics, so that the logits are of ordinary size
        for _ in range(20):
            model(x_BCHW)
    return _error(model, x_BCHW, layers="{stage-1}", locality=20.0)


def _error(model: nn.Module, x_BCHW: torch.Tensor, **settings) -> float:
    recast = recast_attention(model, **settings)
    for layer in recast_layers(recast).values():
        layer.tolerance = 0.0  # no shortcut: the attention itself is measured
    with torch.no_grad():
        wanted, found = (network.to(x_BCHW.dtype).eval()(x_BCHW) for network in (model, recast))
    return float((found - wanted).norm() / wanted.norm())
