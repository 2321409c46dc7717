"""What DCLS learned: how far its taps went, where they are, how they repel; and the tap count at equal
parameters.

Everything reads a model with DCLS layers, or the history of its training; nothing trains.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from convx.evaluate import row
from convx.layers.dcls import DCLSConv2d
from convx.layers.dcls_spacings import iso_parameter_kernel_count, limits, spread
from convx.papers.dcls.curves import curves

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
QUANTILES = {"tap_radius_p10": 0.1, "tap_radius_p50": 0.5, "tap_radius_p90": 0.9}
METHOD = "positions of the taps, each shared set once, taps weighed equally"
UNITS = {"tap_radius_mean": "px", "tap_overlap": "px", "tap_share_outside": "%", "repulsive_loss": "px^2"}


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


def _measures(radius: torch.Tensor, overlap: float, outside: float) -> dict[str, float]:
    """Return the measures of some taps from their radii [n], their overlap and the percentage outside."""
    ordered = radius.flatten().sort()[0]
    quantiles = {name: ordered[int(q * (len(ordered) - 1))].item() for name, q in QUANTILES.items()}
    mean = {"tap_radius_mean": ordered.mean().item()}
    return mean | quantiles | {"tap_overlap": overlap, "tap_share_outside": outside}


@torch.no_grad()
def rows(
    model: nn.Module,
    split: str = "",
    dense_side: int | Mapping[str, int] = DENSE_SIDE,
    layers: bool = True,
    **conditions,
) -> list[dict]:
    """Return metric rows of the tap positions, for each set of positions and for all of them (layer "all").

    tap_radius_mean, _p10, _p50 and _p90: distance from the centre in px; tap_overlap: mean over tap pairs of
    max(0, 1 - distance in px); tap_share_outside: percent of the taps nearest to a cell beyond a kernel of
    ``dense_side``, which the dense kernel could not have; repulsive_loss (of all): the square of the mean
    overlap over the sets, as trained; n is the number of taps. ``dense_side`` is one number or one for each
    layer by name. ``layers`` False leaves out the single sets; ``conditions`` go to every row.
    """
    sets = {name: layer.positions.detach().double() for name, layer in dcls_layers(model).items()}
    sides = {name: dense_side[name] if isinstance(dense_side, Mapping) else dense_side for name in sets}
    found, radii = {}, {}
    for name, positions in sets.items():
        radii[name] = positions.norm(dim=0).flatten()
        outside = (positions.abs().amax(0) > sides[name] / 2).double().mean().item()
        overlap = spread(positions)["tap_overlap"].item()
        found[name] = _measures(radii[name], overlap, 100 * outside), len(radii[name]), sides[name]
    taps = sum(n for _, n, _ in found.values())
    overlap = sum(values["tap_overlap"] for values, _, _ in found.values()) / len(found)
    outside = sum(values["tap_share_outside"] * n for values, n, _ in found.values()) / taps
    together = _measures(torch.cat(list(radii.values())), overlap, outside) | {"repulsive_loss": overlap**2}
    found = found if layers else {}
    side = next(iter(sides.values())) if len(set(sides.values())) == 1 else "of each layer"
    return [
        row(
            metric, value, UNITS.get(metric, "px"), n=n, split=split, method=METHOD,
            layer=layer, dense_side=wide, **conditions,
        )
        for layer, (values, n, wide) in [*found.items(), ("all", (together, taps, side))]
        for metric, value in values.items()
    ]  # fmt: skip


def unspread(metric_rows: Iterable[dict], least: float = LEAST_SHARE) -> str | None:
    """Return why a claim about learned spacings is not comparable, or None when the taps did spread.

    They did when at least ``least`` percent of all taps stand where the dense kernel has none; taps that stay
    in its core test a small kernel with fewer weights, whatever the accuracy. ``metric_rows`` are those of
    one state of one network (see :func:`rows`).
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
