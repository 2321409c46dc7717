"""What DCLS learned: how far its taps went, where they are, how they repel; and the tap count at equal
parameters.

Everything reads a model with DCLS layers, or the history of its training; nothing trains.
"""

from collections.abc import Iterable

import torch
from torch import nn

from convx.layers.dcls import DCLSConv2d
from convx.layers.dcls_spacings import iso_parameter_kernel_count, limits, spread

__all__ = [
    "curves",
    "dcls_layers",
    "iso_parameter_kernel_count",
    "kernels",
    "position_histograms",
    "rows",
    "unspread",
]
DENSE_SIDE = 7  # of the kernels that DCLS replaces in ConvNeXt
LEAST_SHARE = 5.0  # percent of the taps beyond the dense kernel from which on the taps count as spread
METHOD = "learned positions, each shared set once, taps weighed equally"


def dcls_layers(model: nn.Module, once: bool = True) -> dict[str, DCLSConv2d]:
    """Return {name: layer} of the DCLS layers; ``once`` keeps the first of those that share positions.

    Raises ``ValueError`` for a model without one.
    """
    found, seen = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, DCLSConv2d) and not (once and id(module.positions) in seen):
            seen.add(id(module.positions))
            found[name] = module
    if not found:
        raise ValueError("the model has no DCLS layer; convx.learnable_spacings makes them")
    return found


@torch.no_grad()
def rows(model: nn.Module, split: str = "none", dense_side: int = DENSE_SIDE) -> list[dict]:
    """Return metric rows of the tap positions, for each set of positions and for all of them (layer "all").

    tap_radius_mean and tap_radius_p90: distance from the centre in px; tap_overlap: mean over tap pairs of
    max(0, 1 - distance); tap_share_outside: percent of the taps beyond a centred kernel of ``dense_side``,
    which the dense kernel could not have; n is the number of taps.
    """
    sets = {name: layer.positions.detach().double() for name, layer in dcls_layers(model).items()}
    found = {}
    for name, positions in sets.items():
        values = {key: value.item() for key, value in spread(positions).items()}
        outside = (positions.abs().amax(0) > dense_side // 2).double().mean().item()
        found[name] = values | {"tap_share_outside": 100 * outside}, positions[0].numel()
    radius = torch.cat([positions.norm(dim=0).flatten() for positions in sets.values()]).sort()[0]
    taps = [n for _, n in found.values()]
    together = {
        "tap_radius_mean": radius.mean().item(),
        "tap_radius_p90": radius[int(0.9 * (len(radius) - 1))].item(),
        "tap_overlap": sum(values["tap_overlap"] for values, _ in found.values()) / len(found),
        "tap_share_outside": sum(v["tap_share_outside"] * n for v, n in found.values()) / sum(taps),
    }
    units = {"tap_radius_mean": "px", "tap_radius_p90": "px", "tap_overlap": "px", "tap_share_outside": "%"}
    return [
        {"metric": metric, "value": value, "unit": units[metric], "n": n, "split": split,
         "conditions": {"layer": layer, "dense_side": dense_side}, "method": METHOD}
        for layer, (values, n) in [*found.items(), ("all", (together, sum(taps)))]
        for metric, value in values.items()
    ]  # fmt: skip


def unspread(metric_rows: Iterable[dict], least: float = LEAST_SHARE) -> str | None:
    """Return why a claim about learned spacings is not comparable, or None when the taps did spread.

    They did when at least ``least`` percent of all taps stand where the dense kernel has none; taps that stay
    in its core test a small kernel with fewer weights, whatever the accuracy.
    """
    found = {r["metric"]: r["value"] for r in metric_rows if r["conditions"].get("layer") == "all"}
    if found["tap_share_outside"] >= least:
        return None
    return (
        f"the taps did not spread: {found['tap_share_outside']:.1f} % of them are beyond the dense kernel "
        f"(at least {least:g} % wanted), mean radius {found['tap_radius_mean']:.2f} px"
    )


@torch.no_grad()
def position_histograms(model: nn.Module, weighted: bool = False) -> dict[str, torch.Tensor]:
    """Return {layer: [h, w]}: how many taps stand nearest to each cell of the kernel, each shared set once.

    ``weighted`` counts a tap with its absolute weight, summed over the layers that share it.
    """
    found = {}
    for name, layer in dcls_layers(model).items():
        cells = []
        for axis, size in zip(layer.positions.detach(), layer.kernel_size):
            low, high = limits(size)
            cells.append((axis.float().round().clamp(low, high) - low).long())
        flat = (cells[0] * layer.kernel_size[1] + cells[1]).flatten()
        mass = torch.ones(flat.shape, dtype=torch.float64)
        if weighted:
            sharing = [m for m in dcls_layers(model, once=False).values() if m.positions is layer.positions]
            mass = sum(m.weight.detach().abs().double().flatten() for m in sharing)
        counts = torch.zeros(layer.kernel_size[0] * layer.kernel_size[1], dtype=torch.float64)
        found[name] = counts.index_add(0, flat.cpu(), mass.cpu()).view(layer.kernel_size)
    return found


@torch.no_grad()
def kernels(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return {layer: [C_out, C_in / groups, h, w]}, the dense kernels of every DCLS layer, on the CPU."""
    return {name: layer.effective_kernel().cpu() for name, layer in dcls_layers(model, once=False).items()}


def curves(history: list[dict], quantity: str = "tap_radius_mean") -> dict[str, list[float]]:
    """Return {layer: value per epoch} of one quantity that the DCLS layers add to a training history.

    ``quantity`` is tap_radius_mean, tap_radius_p90 (px) or tap_overlap; epoch 0 is before any update. The
    repulsive loss of an epoch is the square of the mean of tap_overlap over the layers. Raises ``ValueError``
    when the history has none.
    """
    suffix = f".{quantity}"
    names = [key for key in history[0] if key.endswith(suffix)] if history else []
    if not names:
        raise ValueError(f"the history has no column *{suffix}; was the network trained with DCLS layers?")
    return {name.removesuffix(suffix): [float(row[name]) for row in history] for name in names}
