"""Exact claims of the SERE paper: parameters of the encoders, built on PyTorch's meta device."""

from functools import partial

import torch

from convx.evaluate.cost import parameter_counts
from convx.models import create_model


def parameters(name: str) -> float:
    """Return the parameters of timm's ViT without a head, in millions."""
    with torch.device("meta"):
        model = create_model(f"timm/{name}", num_classes=0, image_size=224)
    return parameter_counts(model)["parameters"] / 1e6


parameters_vit_s = partial(parameters, "vit_small_patch16_224")
parameters_vit_b = partial(parameters, "vit_base_patch16_224")
