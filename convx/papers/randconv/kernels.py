"""The law of random combinations: how near the span of random filters comes to a kernel (arXiv 2301.11360, section 4).

The measures of filters are those of :mod:`convx.evaluate.kernels`, which every run gets.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from convx.evaluate.kernels import (
    centre_to_border,
    effective_kernels,
    entropy_of_random_filters,
    filter_variance_entropy,
    normalised_entropy,
    run,
    spatial_variance,
)
from convx.layers.linear_combination import LinearCombinationConv2d
from convx.seeds import derive

__all__ = [
    "best_fit_residual",
    "centre_to_border",
    "effective_kernels",
    "entropy_of_random_filters",
    "filter_variance_entropy",
    "law",
    "normalised_entropy",
    "plot_law",
    "predicted_residual",
    "run",
    "spatial_variance",
]


def predicted_residual(c_in: int, c_out: int, kernel: int, expansion: int) -> float:
    """Return sqrt(1 - c_out E / (c_in k^2)), or 0 from where the random filters span every kernel.

    The relative distance of a random kernel from the span of c_out E random directions in c_in k^2
    dimensions.
    """
    return math.sqrt(max(0.0, 1 - c_out * expansion / (c_in * kernel**2)))


def best_fit_residual(
    c_in: int, c_out: int, kernel: int, expansion: int, bank: str = "iid_uniform", seed: int = 0
) -> float:
    """Return |W - A F| / |W| for the best combinations A of a bank F and a random kernel W, in float64."""
    generator = torch.Generator().manual_seed(derive(seed, "target kernel"))
    conv = nn.Conv2d(c_in, c_out, kernel, bias=False, dtype=torch.float64).requires_grad_(False)
    conv.weight.copy_(torch.rand(conv.weight.shape, generator=generator, dtype=torch.float64) * 2 - 1)
    block = LinearCombinationConv2d.from_conv(
        conv, fit=True, expansion=expansion, bank=bank, seed=derive(seed, "filter bank", "law")
    )
    return float((block.effective_kernel().detach() - conv.weight).norm() / conv.weight.norm())


def law(
    c_in: int = 16,
    c_out: int = 16,
    kernel: int = 3,
    expansions: Iterable[int] = (1, 2, 4, 6, 8, 9, 16),
    seed: int = 0,
) -> list[dict]:
    """Return [{expansion, ratio, measured, predicted}] of the residual; ratio is c_out E / (c_in k^2)."""
    return [
        {
            "expansion": expansion,
            "ratio": c_out * expansion / (c_in * kernel**2),
            "measured": best_fit_residual(c_in, c_out, kernel, expansion, seed=seed),
            "predicted": predicted_residual(c_in, c_out, kernel, expansion),
        }
        for expansion in expansions
    ]


def plot_law(axes, rows: list[dict]) -> None:
    """Draw the law on matplotlib axes: predicted as a curve over c_out E / (c_in k^2), measured as points."""
    end = max(1.0, max(entry["ratio"] for entry in rows))
    ratios = [end * i / 200 for i in range(201)]
    axes.plot(ratios, [math.sqrt(max(0.0, 1 - r)) for r in ratios], label="predicted, sqrt(1 - x)")
    axes.plot([r["ratio"] for r in rows], [r["measured"] for r in rows], "o", label="measured, least squares")
    axes.set_xlabel("c_out E / (c_in k²)")
    axes.set_ylabel("relative residual")
    axes.legend()
