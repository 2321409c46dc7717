"""DCLS (arXiv 2112.03740) beside the kernel: where taps go, how many, how they repel. Imports torch alone."""

import torch
import torch.nn.functional as F
from torch import nn


def check(name: str, value, choices) -> None:
    """Raise ``ValueError`` when ``value`` is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not valid; choose one of {', '.join(choices)}")


def limits(size: int) -> tuple[int, int]:
    """Return the lowest and the highest position along an axis of s cells; the cell s // 2 is 0."""
    return -(size // 2), size - 1 - size // 2


def same_geometry(conv: nn.Conv2d, size: int | tuple[int, int] | None):
    """Return (kernel size, padding) for a kernel of ``size`` (None: its own) that keeps the output size."""
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size)]
    sizes = reach if size is None else [size, size] if isinstance(size, int) else size
    own = conv.padding
    if isinstance(own, str):
        own = [0, 0] if own == "valid" else [(r - 1) / 2 for r in reach]
    padding = [p + (s - r) / 2 for p, s, r in zip(own, sizes, reach)]
    if any(p != int(p) or p < 0 for p in padding):
        raise ValueError(f"dilated_kernel_size={size} cannot keep the output size of a {reach[0]}x{reach[1]} kernel")
    return tuple(sizes), tuple(map(int, padding))


def tap_grid(conv: nn.Conv2d, size: tuple[int, int]) -> torch.Tensor:
    """Return the positions [2, K] of the taps of a convolution in a kernel of ``size``, in their order."""
    axes = []
    for k, d, s in zip(conv.kernel_size, conv.dilation, size):
        first = (s - d * (k - 1) - 1) // 2 - s // 2
        if first < limits(s)[0]:
            raise ValueError(f"dilated_kernel_size={size} is too small for the {k} taps of the convolution")
        axes.append(torch.arange(k) * float(d) + first)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def spread(positions_2OIK: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tap radius (mean and 90th percentile, pixels from the centre) and the ``overlap``."""
    radius = positions_2OIK.norm(dim=0).flatten().sort()[0]
    p90 = radius[int(0.9 * (len(radius) - 1))]
    return {"tap_radius_mean": radius.mean(), "tap_radius_p90": p90, "tap_overlap": overlap(positions_2OIK)}


def iso_parameter_kernel_count(channels, depths, dense_k=7, positions_per_tap=2) -> int:
    """Return the K at which DCLS has as many parameters as dense k x k kernels.

    K = floor(k^2 S / (S + a sum c)) with S = sum c d. ``channels`` c and ``depths`` d list, per set of layers
    that share positions, the kernels of one layer (C of a depthwise one, C_out C_in / groups in general) and
    the number of layers. ``dense_k`` is k, or one k or (h, w) per set. ``positions_per_tap`` a is 2
    (bilinear) or 4 (with a width per axis). ConvNeXt-T gives 34 and 26, ConvNeXt-S and -B 40. ``ValueError``
    for lists of unequal length.
    """
    sides = dense_k if isinstance(dense_k, list | tuple) else [dense_k] * len(channels)
    areas = [k * k if isinstance(k, int) else k[0] * k[1] for k in sides]
    kernels = sum(c * d for c, d in zip(channels, depths, strict=True))
    dense = sum(c * d * area for c, d, area in zip(channels, depths, areas, strict=True))
    return dense // (kernels + positions_per_tap * sum(channels))


def share_positions(sets: list[list[nn.Module]]) -> None:
    """Give the layers of each list the positions and widths of its first: one parameter, several layers."""
    for first, *others in sets:
        for layer in others:
            layer.positions, layer.sigma = first.positions, first.sigma


def overlap(positions_2OIK: torch.Tensor) -> torch.Tensor:
    """Return the repulsion of one set of positions: the mean over tap pairs of max(0, 1 - distance)."""
    K = positions_2OIK.shape[-1]
    p_2CK = positions_2OIK.reshape(2, -1, K)
    i, j = torch.triu_indices(K, K, 1, device=p_2CK.device)
    squared = (p_2CK[..., i] - p_2CK[..., j]).square().sum(0)
    apart = squared > 0  # the root has no derivative at 0: coincident taps get none
    distance = torch.where(apart, squared, 1.0).sqrt() * apart
    return F.relu(1 - distance).sum() / max(1, squared.numel())


class Repulsion:
    """The repulsive loss of several layers: the squared mean ``overlap``, each shared set once.

    Off up to the share ``start`` of training, for good with None. The first layer reports it, so that a
    training loop that asks every layer adds it once.
    """

    def __init__(self, layers: list[nn.Module], start: float | None):
        self.layers, self.start = layers, start
        for layer in layers:
            layer.repulsion = self

    def loss(self) -> torch.Tensor:
        distinct = {id(layer.positions): layer.positions for layer in self.layers}.values()
        return torch.stack([overlap(positions.float()) for positions in distinct]).mean().square()

    def at(self, progress: float, layer: nn.Module) -> torch.Tensor | None:
        """Return the loss that ``layer`` reports at this share of training: the first layer's, or None."""
        off = self.start is None or progress <= self.start or layer is not self.layers[0]
        return None if off or not any(one.positions.requires_grad for one in self.layers) else self.loss()

    def owns(self, layer: nn.Module) -> bool:
        """True for the first of the layers that share a set of positions."""
        return next(other for other in self.layers if other.positions is layer.positions) is layer
