"""What focus costs and saves on the machine that runs it: image by image, and layer by layer.

Called by the step that owns the machine. The table of costs that it measures is what the network then plans its crops with.
"""

import copy

import numpy as np
import torch
from torch import nn

from convx.evaluate import EvaluationData, Result, evaluation_mode, output_of, row
from convx.evaluate.latency import paired, uncollected
from convx.layers.focused_costs import cost_table, layer_costs
from convx.layers.focused_network import Focused
from convx.statistics import t_interval

IMAGES = 12  # test images that are timed one by one
ROUNDS = 5


def run(networks: dict[str, nn.Module], recipe: dict, data: EvaluationData, settings: dict, device) -> Result:
    """Return the latency of single images beside the network's own dense form, and the costs of its layers.

    Rows: ``image_latency_ratio``, focused over dense, by ``statistic``: sum (over the images, of both) and geometric (mean
    of the images' ratios, with Student's 95 % interval over images, geometric_low and geometric_high); ``mask_cost``, what
    finding the region takes in percent of the dense latency; ``break_even`` and ``tuned_latency_ratio``, the share above which
    dense is faster and the ratio of sums when such images are computed densely. Arrays: ``image_latency`` [n, 3]: kept
    percent, dense ms, focused ms; ``layer_cost`` [layers, 4]: MACs / 1e6, dense ms, crop ms and tiles ms of a quarter of
    the map. The measured costs are given to the network.
    """
    model = next(iter(networks.values()))
    if not isinstance(model, Focused) or model.whole or not settings.get("latency"):
        return Result([])
    threads = settings["latency"]["threads"][0]
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(threads)
    last = recipe["training"]["channels_last"]
    model.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)
    sample = data.spread(IMAGES)
    x_NCHW = torch.cat([x for x, _ in sample.batches()])
    try:
        with evaluation_mode(model), torch.inference_mode(), uncollected():
            layers = layer_costs(model, x_NCHW[:1])
            for focus in model.focus:
                focus.costs = cost_table(layers)
            measured = np.array([_image(model, x_NCHW, sample.boxes, place) for place in range(len(x_NCHW))])
            tuned, most, dispatched = copy.deepcopy(model), None, None
            if model.focus[0].settings["halo"] != "official":  # the public code has no such choice
                most = tuned.tune(x_NCHW[:1])
                dispatched = np.array([_image(tuned, x_NCHW, sample.boxes, k)[:3] for k in range(len(x_NCHW))])
    finally:
        torch.set_num_threads(before)
    kept, dense, focused, mask = measured.T
    where = {"threads": threads, "batch": 1, "device": device.type}
    method = f"sum over {len(kept)} test images, each the median of {ROUNDS} interleaved rounds, batch 1"
    logs = t_interval(np.log(focused / dense))
    values = {"sum": focused.sum() / dense.sum(), "geometric": np.exp(logs.estimate)}
    values |= {"geometric_low": np.exp(logs.low), "geometric_high": np.exp(logs.high)}
    rows = [
        row("image_latency_ratio", v, "ratio", n=len(kept), method=method, statistic=k, **where)
        for k, v in values.items()
    ]
    if dispatched is not None:
        said = "largest kept share up to which the network is faster than dense here, boxes in the middle of one image"
        rows.append(row("break_even", 100 * most, "%", method=said, **where))
        said = f"as image_latency_ratio, images above the break-even share computed densely; {method}"
        ratio = dispatched[:, 2].sum() / dispatched[:, 1].sum()
        rows.append(row("tuned_latency_ratio", ratio, "ratio", n=len(kept), method=said, **where))
    said = "time of finding the region from the activations, over the dense latency, median over images"
    rows.append(row("mask_cost", 100 * np.median(mask / dense), "%", n=len(kept), method=said, **where))
    table = np.array([[r["macs"] / 1e6, r["dense"], r["crop"], r["tiles"]] for r in layers]).reshape(-1, 4)
    return Result(rows, arrays={"image_latency": measured[:, :3], "layer_cost": table})


def _image(model: Focused, x_NCHW, boxes, place: int) -> tuple[float, float, float, float]:
    """Return (kept percent, dense ms, focused ms, ms of the region) of one image."""
    x = x_NCHW[place : place + 1]
    mine = None if boxes is None else boxes[place : place + 1]
    given = {"boxes": mine} if model.takes_boxes else {}
    region = model.region(x, **given)
    calls = {
        "dense": lambda: model.dense(x),
        "focused": lambda: output_of(model, x, mine),
    }
    times = paired(calls, rounds=ROUNDS + 1, seconds=0.2, seed=place)  # warm already
    z = model.activations(x)
    focus = model.focus[int(model.depth)]
    of_mask = paired({"mask": lambda: focus.region(z, mine, tuple(x.shape[2:]))}, rounds=ROUNDS + 1, seconds=0.1)
    area = region.size[0] * region.size[1]
    medians = [float(np.median(ms)) for ms in (times["dense"], times["focused"], of_mask["mask"])]
    return (100 * region.kept[0] / area, *medians)
