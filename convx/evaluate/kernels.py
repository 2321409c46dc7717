"""What the filters of a network look like: variance entropy, spatial variance, the first layer's kernels.

Filter variance entropy: Gavrikov and Keuper, CNN Filter DB, CVPR 2022; spatial variance: arXiv 2301.11360, figure 8b.
All measures are taken on effective kernels, of any model that has some. On the convolution inside a block of linear
combinations they would see the frozen bank, which is random whatever was learned.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from convx.evaluate import EvaluationData, Result, row

FIRST_FILTERS = 16  # of the first layer, kept for pictures


def effective_kernels(model: nn.Module) -> dict[str, Tensor]:
    """Return {layer name: kernel [c_out, c_in / groups, k_h, k_w]} of every spatial convolution, first to
    last, in float32 or above.

    A foldable operator counts with the kernel that it stands for; one that is no convolution (an operation
    inside an LC block, open attention gates) is left out.
    """
    kernels, inside = {}, ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if callable(getattr(module, "effective_kernel", None)):
            inside = (*inside, f"{name}.")
            kernel = module.effective_kernel() if getattr(module, "foldable", True) else None
        else:
            kernel = module.weight if isinstance(module, nn.Conv2d) else None
        if kernel is not None and kernel.shape[2] * kernel.shape[3] > 1:
            kernels[name] = kernel.detach().to(torch.promote_types(kernel.dtype, torch.float32))
    return kernels


def filter_variance_entropy(kernel: Tensor) -> float:
    """Return H = -sum p log10 p, p the shares of variance along the principal axes of the k x k filters (CNN
    Filter DB, CVPR 2022).

    ``kernel`` [c_out, c_in, k_h, k_w]. 0: all filters are multiples of one pattern around their mean;
    log10(k_h k_w): the variance is spread evenly. Filters that do not vary at all have entropy 0.
    """
    filters_NP = kernel.detach().double().flatten(2).flatten(0, 1)
    centred_NP = filters_NP - filters_NP.mean(0)
    variance_P = torch.linalg.svdvals(centred_NP).square()
    if variance_P.sum() <= filters_NP.square().sum() * 1e-24:  # nothing but rounding is left
        return 0.0
    return float(torch.special.entr(variance_P / variance_P.sum()).sum() / math.log(10))


def entropy_of_random_filters(count: int) -> float:
    """Return T(n), the entropy expected of n = ``count`` random 3x3 filters: a sigmoid in log2 n."""
    return 1.2618047 / (1 + math.exp(-0.88767525 * (math.log2(count) - 2.30436435))) - 0.31050834


def normalised_entropy(kernel: Tensor) -> float:
    """Return H / T(n) of 3x3 kernels: about 1 for random filters, 0 for one repeated pattern.

    Raises ``ValueError`` for other kernel sizes, for which no T is known.
    """
    if kernel.shape[2:] != (3, 3):
        raise ValueError(f"the normalised entropy is for 3x3 kernels, not {kernel.shape[2]}x{kernel.shape[3]}")
    return filter_variance_entropy(kernel) / entropy_of_random_filters(kernel.shape[0] * kernel.shape[1])


def spatial_variance(kernels: Iterable[Tensor]) -> dict[tuple[int, int], Tensor]:
    """Return {kernel size: variance over all filters at each position [k_h, k_w]} (arXiv 2301.11360, figure
    8b).

    Each layer is divided by the standard deviation of its whole weight first. A flat map is that of random
    filters; learned filters have their variance in the centre.
    """
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for kernel in kernels:
        kernel = kernel.detach().double()
        deviation = kernel.std().clamp(min=torch.finfo(torch.float64).tiny)  # a layer of zeros stays one
        groups.setdefault(tuple(kernel.shape[2:]), []).append((kernel / deviation).flatten(0, 1))
    return {size: torch.cat(filters).var(0, correction=0) for size, filters in groups.items()}


def centre_to_border(variance: Tensor) -> float:
    """Return the variance at the centre of a map [k_h, k_w] over the mean of its border; 1 for a flat map."""
    inner = torch.zeros_like(variance, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    border = variance[~inner].mean()
    if border == 0:
        return 1.0 if variance.max() == 0 else math.inf
    return float(variance[variance.shape[0] // 2, variance.shape[1] // 2] / border)


def run(model: nn.Module, data: EvaluationData | None = None, settings: dict | None = None) -> Result:
    """Return the rows of the filters of a network; needs neither images nor settings.

    ``filter_variance_entropy`` (normalised, 3x3 layers) and ``filter_variance_entropy_raw`` of the first and
    the last spatial layer, ``spatial_variance_ratio`` (centre to border) for each kernel size. The entropies
    of all layers and the maps are in ``details`` ("entropy", "spatial_variance"). ``arrays``, for figures:
    ``spatial_variance_<h>x<w>`` [h, w] of each kernel size and ``first_layer_kernels`` [filters, c_in / groups, h, w],
    the first ``FIRST_FILTERS`` of the first spatial layer.
    """
    kernels = effective_kernels(model)
    entropy = {name: filter_variance_entropy(kernel) for name, kernel in kernels.items()}
    method = "singular values of the centred filters of the effective kernel"
    rows = []
    for layer, place in (("first", 0), ("last", -1)):
        name = list(kernels)[place] if kernels else None
        raw = entropy[name] if kernels else None
        said = method if kernels else "not measured: no layer is a convolution"
        rows.append(row("filter_variance_entropy_raw", raw, "1", method=said, layer=layer))
        if kernels and kernels[name].shape[2:] == (3, 3):
            value, said = normalised_entropy(kernels[name]), f"{method}, over that of random filters"
            rows.append(row("filter_variance_entropy", value, "1", method=said, layer=layer))
    maps = spatial_variance(kernels.values())
    for (height, width), variance in maps.items():
        said = "centre over border, of the variance over all effective kernels (each layer at unit deviation)"
        value = centre_to_border(variance)
        if not math.isfinite(value):
            value, said = None, "not measured: the border of the kernels does not vary"
        rows.append(row("spatial_variance_ratio", value, "ratio", method=said, kernel=f"{height}x{width}"))
    arrays = {f"spatial_variance_{height}x{width}": found for (height, width), found in maps.items()}
    if kernels:
        arrays["first_layer_kernels"] = next(iter(kernels.values()))[:FIRST_FILTERS]
    return Result(
        rows,
        details={"entropy": entropy, "spatial_variance": maps},
        arrays={name: array.cpu().numpy() for name, array in arrays.items()},
    )
