"""Exact claims of the paper on random convolutions: Lemma 3.1, two layers are one."""

import torch
from torch import nn

from convx.seeds import generator
from convx.surgery import fold, linear_combinations


def fold_error() -> float:
    """Return the largest difference between an LC block in two layers and the convolution it folds to.

    Kernels 3 and 5, strides 1 and 2, expansion 8, float64, outputs of ordinary size.
    """
    draws = generator(0, "exact", "randconv.lemma")
    errors = []
    for kernel, stride in ((3, 1), (3, 2), (5, 1)):
        conv = nn.Conv2d(12, 16, kernel, stride, padding=kernel // 2, bias=False)
        block = linear_combinations(nn.Sequential(conv), expansion=8, mode="two_layer").double().eval()
        x_BCHW = torch.randn(2, 12, 11, 9, generator=draws, dtype=torch.float64)
        with torch.no_grad():
            errors.append(float((block(x_BCHW) - fold(block)(x_BCHW)).abs().max()))
    return max(errors)
