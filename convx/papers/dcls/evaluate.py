"""What a run with learnable spacings says beyond its accuracy: where its taps started and where they ended.

Called with every variant of this paper; one without DCLS layers adds nothing.
"""

import numpy as np
import torch
from torch import nn

from convx import surgery
from convx.evaluate import EvaluationData, Result, row
from convx.layers.dcls import DCLSConv2d
from convx.papers.dcls import analysis
from convx.runs import build_model

KEPT_CHANNELS = 6  # kernels kept of a layer, for the figure
KEPT_LAYERS = 4  # layers of which kernels are kept: the first of each set of positions


def run(model: nn.Module, recipe: dict, data: EvaluationData) -> Result:
    """Return the positions of the taps at the start and the end of training, and whether they spread.

    Rows: those of :func:`convx.papers.dcls.analysis.rows` with the condition ``state`` (start: of all sets together;
    end: of each too), and, where positions are learned, ``precondition`` (name taps_spread, 1 or 0, the method says
    why): without it no claim about what was learned is decided. Arrays, per set of positions (its first layer):
    ``positions/<layer>/<state>`` [h, w], percent of the taps nearest to each cell, and
    ``kernels/<layer>/<state>`` [channels, h, w], the first kernels as they are built. Of a network that went on from
    learned positions of another run the start is not known here and left out. Takes the shape of the images alone.
    """
    layers = [module for module in model.modules() if isinstance(module, DCLSConv2d)]
    if not layers:
        return Result([])
    host, start = _start(model, recipe, data)
    sides = {name: _reach(host, name) for name in analysis.dcls_layers(model)}
    found = Result([])
    if start is not None:
        found += Result(
            analysis.rows(start, dense_side=sides, layers=False, state="start"), arrays=_arrays(start, "start")
        )
    end = analysis.rows(model, dense_side=sides, state="end")
    found += Result(end, arrays=_arrays(model, "end"))
    if any(layer.positions.requires_grad for layer in layers):
        reason = analysis.unspread(end)
        said = reason or f"at least {analysis.LEAST_SHARE:g} % of the taps are beyond the dense kernel"
        found += Result([row("precondition", float(reason is None), "1", method=said, name="taps_spread")])
    return found


def _start(model: nn.Module, recipe: dict, data: EvaluationData) -> tuple[nn.Module, nn.Module | None]:
    """Return (host before any surgery, network before training or None where it cannot be known).

    Every draw is keyed by the recipe's seeds, so building it again gives the same network; positions that are not
    learned are those of the trained one, also where they came from another run.
    """
    channels, side, _ = data.shape_CHW
    with torch.no_grad():
        classes = model(next(data.first(1).batches())[0]).shape[-1]
    steps, first = [], recipe
    while first["start"]:
        steps, first = [first, *steps], first["start"]["recipe"]
    with torch.random.fork_rng(devices=[]):
        meta = {"num_classes": classes, "channels": channels, "image_size": side}
        host = build_model(first | {"surgery": []}, meta)
        start = host
        for one in [first, *steps]:
            start = surgery.apply(start, one["surgery"], one["seed"])
    for name, layer in analysis.dcls_layers(model, once=False).items():
        if layer.positions.requires_grad:
            if recipe["start"]:
                return host, None
            continue
        anew = start.get_submodule(name)
        anew.positions.data.copy_(layer.positions)
        if anew.sigma is not None:
            anew.sigma.data.copy_(layer.sigma)
    return host, start.eval()


def _reach(host: nn.Module, name: str) -> int:
    """Return the longest side of the kernel that a DCLS layer replaced, dilation included."""
    modules = dict(host.named_modules())
    if not isinstance(conv := modules.get(name), nn.Conv2d):  # a user's own model that had DCLS layers from the start
        return analysis.DENSE_SIDE
    return max(d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation))


@torch.no_grad()
def _arrays(model: nn.Module, state: str) -> dict[str, np.ndarray]:
    arrays = {}
    for name, counts_hw in analysis.position_histograms(model).items():
        arrays[f"positions/{name}/{state}"] = (100 * counts_hw / counts_hw.sum()).numpy()
    for name, layer in list(analysis.dcls_layers(model).items())[:KEPT_LAYERS]:
        arrays[f"kernels/{name}/{state}"] = layer.effective_kernel()[:KEPT_CHANNELS, 0].float().cpu().numpy()
    return arrays
