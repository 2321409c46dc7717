"""What a run of T-CNN says beyond its accuracy: how local its heads are, how far its gates opened, what it looks at.

Called with every variant of this paper. The control without recast layers gives what others are compared with: the Gram
matrices of its stages.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convx.evaluate import EvaluationData, Result, evaluation_mode, row
from convx.layers.gpsa import GatedPositionalAttention
from convx.layers.gpsa_positions import axis_geometry, centres_and_spans, query_positions, tap_offsets
from convx.papers.tcnn import analysis
from convx.papers.tcnn.locality import HEADS
from convx.replacing import stage_names

IMAGES = 64  # evenly spaced over the test images, for the Gram matrices
ATTENDED = 16  # of them, for attention maps
PICTURES = 3  # of them, of which maps are kept
PICTURE_SIDE = 48  # pixels of a kept picture at most
LARGEST_MAP = 2**24  # entries of one sample's attention; a layer with more is not measured


def run(model: nn.Module, recipe: dict, data: EvaluationData) -> Result:
    """Return rows and arrays of the recast layers of a network, on true inputs of each.

    Rows, with the condition ``layer``, means over heads: ``non_locality`` (pixels between a query and what it attends to),
    ``content_share`` and ``content_share_max``, ``centre_drift`` (pixels, the largest of the heads), ``span`` (1/alpha,
    pixels^2), and ``initial_error``, the relative error of recasting the layer's filters by the variant's own settings
    (condition ``alpha``). Arrays: ``heads/<layer>`` [heads, 5] in the order of ``locality.HEADS``; of the first and the last recast
    layer ``attention/<layer>`` [pictures, 2, H, W], what two output pixels attend to, mean over heads (the rest is the
    halo's), and ``queries/<layer>`` [2, 2], where they stand; ``pictures`` [pictures, H, W, C] in 0..1;
    ``gram/<stage>``, the upper triangle of :func:`convx.papers.tcnn.analysis.unit_gram` of every stage.
    """
    sample = _sample(data, IMAGES)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, GatedPositionalAttention)}
    with evaluation_mode(model), torch.no_grad():
        x_BCHW = torch.cat([x for x, _ in sample.batches()])
        found = Result([], arrays=_grams(model, x_BCHW))
        if not layers:
            return found
        inputs = analysis.activations(model, x_BCHW[:ATTENDED], list(layers), inputs=True)
        for name, layer in layers.items():
            found += _layer(name, layer, inputs[name], recipe)
        pictures = torch.cat([images for images, _ in sample.first(PICTURES).raw_batches()]).float() / 255
        scale = max(1, -(-pictures.shape[-1] // PICTURE_SIDE))
        arrays = {"pictures": F.avg_pool2d(pictures, scale).permute(0, 2, 3, 1).cpu().numpy()}
        for name in dict.fromkeys((next(iter(layers)), list(layers)[-1])):
            arrays |= _attention(name, layers[name], inputs[name][:PICTURES])
    return found + Result([], arrays=arrays)


def _sample(data: EvaluationData, count: int) -> EvaluationData:
    """Return evenly spaced images: a folder is sorted by class."""
    places = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int))
    at = torch.as_tensor(places, device=data.device)
    return data.replaced(data.images[at if isinstance(data.images, Tensor) else places], data.labels[at])


def _grams(model: nn.Module, x_BCHW: Tensor) -> dict[str, np.ndarray]:
    stages, arrays = [n for n in stage_names(model) if n in dict(model.named_modules())], {}
    for name, features in analysis.activations(model, x_BCHW, stages).items():
        try:
            gram_BB = analysis.unit_gram(features.float()).cpu().numpy()
        except ValueError:  # a stage that gives the same for all images has no alignment with anything
            continue
        arrays[f"gram/{name}"] = gram_BB[np.triu_indices(len(gram_BB))]
    return arrays


def _entries(layer: GatedPositionalAttention, x_BCHW: Tensor) -> int:
    """Return the entries of one sample's attention map, the halo included."""
    entries = layer.heads
    for size, axis in zip(x_BCHW.shape[2:], layer.axes, strict=True):
        queries, _, before, after = axis_geometry(size, *axis)
        entries *= queries * (before + size + after)
    return entries


def _layer(name: str, layer: GatedPositionalAttention, x_BCHW: Tensor, recipe: dict) -> Result:
    centres_H2, span_H = centres_and_spans(layer.positions.detach().double().cpu())
    local_H = span_H.gt(0) & span_H.isfinite()  # a head without a positive locality has no centre
    share_H = layer.content_share().detach().double().cpu()
    missing = torch.full_like(share_H, torch.nan)
    small = _entries(layer, x_BCHW) <= LARGEST_MAP
    distance_H = analysis.non_locality(layer, x_BCHW).double().cpu() if small else missing
    centres_H2, span_H = (
        torch.where(local_H.view(-1, *[1] * (t.dim() - 1)), t, torch.nan) for t in (centres_H2, span_H)
    )
    taps_H2 = torch.cartesian_prod(*(tap_offsets(*axis) for axis in layer.axes)).to(centres_H2)
    drift_H = (centres_H2 - taps_H2).norm(dim=1)
    parameters, which = "from the parameters", {"layer": name}
    said = f"{analysis.METHOD}, mean over heads" if small else "not measured: its attention map is too large"
    rows = [
        row("non_locality", _value(distance_H.mean()), "px", n=len(x_BCHW), split="test", method=said, **which),
        row("content_share", _value(share_H.mean()), "fraction", method=f"{parameters}, mean over heads", **which),
        row("content_share_max", _value(share_H.max()), "fraction", method=f"{parameters}, largest head", **which),
        row("centre_drift", _value(drift_H.max()), "px", method=f"{parameters}, largest head", **which),
        row("span", _value(span_H.mean()), "px^2", method=f"{parameters}, mean over heads", **which),
    ]
    if (error := _initial_error(layer, x_BCHW, recipe)) is not None:
        said = "relative L2 error of the layer's filters recast anew by the variant's settings, float64, on its inputs"
        rows.append(
            row("initial_error", error[1], "1", n=len(x_BCHW), split="test", method=said, alpha=error[0], **which)
        )
    heads_H5 = torch.stack([distance_H, share_H, *centres_H2.unbind(1), span_H], dim=1)
    assert heads_H5.shape[1] == len(HEADS)
    return Result(rows, arrays={f"heads/{name}": heads_H5.numpy()})


def _value(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _recast_step(recipe: dict) -> dict | None:
    """Return the surgery step that recast the network, here or in what it started from; None for none or several."""
    steps = [step for step in recipe["surgery"] if step["verb"] == "recast_attention"]
    if steps or not recipe["start"]:
        return steps[0] if len(steps) == 1 else None
    return _recast_step(recipe["start"]["recipe"])


def _initial_error(layer: GatedPositionalAttention, x_BCHW: Tensor, recipe: dict) -> tuple[float, float] | None:
    """Return (alpha, relative error), or None where the layer did not start from a convolution of local heads."""
    step = _recast_step(recipe)
    if (
        step is None
        or step.get("positions") == "random"
        or layer.padding == "same"
        or _entries(layer, x_BCHW) > LARGEST_MAP
    ):
        return None
    size, width = layer.kernel_size, layer.out_weight.shape[2]
    conv = nn.Conv2d(
        layer.in_channels, layer.out_channels, size, layer.stride, layer.padding, layer.dilation, layer.groups,
        bias=False, padding_mode=layer.padding_mode,
    ).to(layer.out_weight.device)  # fmt: skip
    conv.weight.data.copy_(layer.out_weight.detach().transpose(1, 2).reshape(layer.out_channels, width, *size))
    alpha = float(step.get("locality", 15.0))
    settings = {key: step[key] for key in ("gate", "gate_init", "border", "key_dim") if key in step}
    return alpha, analysis.initial_error(conv, x_BCHW, [alpha], **settings)[0][1]


def _attention(name: str, layer: GatedPositionalAttention, x_BCHW: Tensor) -> dict[str, np.ndarray]:
    """Return the maps of two output pixels, one in the middle and one a quarter of the way, over the pixels of the input."""
    if _entries(layer, x_BCHW) > LARGEST_MAP:
        return {}
    height, width = x_BCHW.shape[2:]
    ys, xs = (query_positions(size, *axis) for size, axis in zip((height, width), layer.axes, strict=True))
    maps = analysis.attention_maps(layer, x_BCHW)
    mixed_BQN = maps["mixed"].reshape(-1, layer.heads, *maps["distance"].shape).mean(1)
    inside_N = ((maps["keys"] >= 0) & (maps["keys"] < maps["keys"].new_tensor([height, width]))).all(1)
    at = [(len(ys) // 2, len(xs) // 2), (len(ys) // 4, len(xs) // 4)]
    seen = [mixed_BQN[:, y * len(xs) + x][:, inside_N].unflatten(1, (height, width)) for y, x in at]
    queries = [[float(ys[y]), float(xs[x])] for y, x in at]
    return {
        f"attention/{name}": torch.stack(seen, dim=1).float().cpu().numpy(),
        f"queries/{name}": np.array(queries),
    }
