"""Exact claims of the bootstrapped-ViT paper: parameters and multiply-adds of the networks of Table 1 at 224 px.

ViTs and agents are those that the studies train, the CNNs timm's; all are built without memory (PyTorch's meta device).
"""

from functools import partial

import torch
from torch import nn

from convx.evaluate.cost import macs, parameter_counts
from convx.models import create_model
from convx.surgery import agent_of

NETWORKS = {
    "vit_s": "vit_s",
    "vit_b": "vit_b",
    "resnet50": "timm/resnet50",
    "efficientnet_b2": "timm/efficientnet_b2",
}
AGENTS = {
    "agent_s": ("vit_s", {}),
    "agent_s_base": ("vit_s", {"style": "base"}),
    "agent_b": ("vit_b", {"norm": "post", "down_after": [2, 8]}),
}


def _network(name: str, classes: int) -> nn.Module:
    host, settings = AGENTS.get(name, (name, None))
    with torch.device("meta"):
        model = create_model(NETWORKS[host], num_classes=classes, image_size=224)
        return model if settings is None else agent_of(model, weights="own", **settings)


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
parameters_agent_s_10, parameters_agent_s_100 = (partial(parameters, "agent_s", n) for n in (10, 100))
parameters_agent_b_10, parameters_agent_b_100 = (partial(parameters, "agent_b", n) for n in (10, 100))
parameters_agent_s_base_100 = partial(parameters, "agent_s_base", 100)
macs_agent_s, macs_agent_b = partial(multiply_adds, "agent_s"), partial(multiply_adds, "agent_b")
macs_vit_s, macs_vit_b = partial(multiply_adds, "vit_s"), partial(multiply_adds, "vit_b")
macs_resnet50 = partial(multiply_adds, "resnet50")
macs_efficientnet_b2 = partial(multiply_adds, "efficientnet_b2")
