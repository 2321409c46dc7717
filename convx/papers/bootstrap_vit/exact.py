"""Exact claims of the bootstrapped-ViT paper: parameters and multiply-adds of the plain networks of Table 1.

The networks are timm's with the paper's sizes at 224 px, built without memory (PyTorch's meta device).
"""

from functools import partial

import torch
from torch import nn

from convx.evaluate.cost import macs, parameter_counts
from convx.models import create_model

NETWORKS = {
    "vit_s": ("timm/vit_tiny_patch16_224", {"embed_dim": 288, "depth": 6, "num_heads": 9}),
    "vit_b": ("timm/vit_small_patch16_224", {"embed_dim": 384, "depth": 12, "num_heads": 6}),
    "resnet50": ("timm/resnet50", {}),
    "efficientnet_b2": ("timm/efficientnet_b2", {}),
}


def _network(name: str, classes: int) -> nn.Module:
    model, settings = NETWORKS[name]
    with torch.device("meta"):
        return create_model(model, num_classes=classes, image_size=224, **settings)


def parameters(name: str, classes: int) -> float:
    """Return the parameters in millions."""
    return parameter_counts(_network(name, classes))["parameters"] / 1e6


def multiply_adds(name: str) -> float:
    """Return the billions of multiply-adds of an image."""
    return macs(_network(name, 10), torch.empty(1, 3, 224, 224, device="meta"))[0] / 1e9


parameters_vit_s_10, parameters_vit_s_100 = (partial(parameters, "vit_s", n) for n in (10, 100))
parameters_vit_b_10, parameters_vit_b_100 = (partial(parameters, "vit_b", n) for n in (10, 100))
parameters_resnet50_10, parameters_resnet50_100 = (partial(parameters, "resnet50", n) for n in (10, 100))
parameters_efficientnet_b2_10 = partial(parameters, "efficientnet_b2", 10)
parameters_efficientnet_b2_100 = partial(parameters, "efficientnet_b2", 100)
macs_vit_s, macs_vit_b = partial(multiply_adds, "vit_s"), partial(multiply_adds, "vit_b")
macs_resnet50 = partial(multiply_adds, "resnet50")
macs_efficientnet_b2 = partial(multiply_adds, "efficientnet_b2")
