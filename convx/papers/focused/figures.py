"""Figures of the focused studies: accuracy and latency against what is computed, image by image, on pictures, layer by layer.

Drawn from metrics files alone; a figure without data is not drawn.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from convx import config
from convx.evaluate.payload import unpack
from convx.report import style
from convx.report.comparison import interval

SHOWN = 3  # variants in the figures with a panel or a row for each, the first of the study


def draw(results, out: str | Path) -> list[str]:
    """Draw what a study holds of this paper into ``out`` as SVG and PNG; return the names of the figures.

    ``results`` is a :class:`convx.report.results.Results`.
    """
    names = [name for name in results.variants if config.declaration(results.study, name)["paper"] == "focused"]
    drawn = []
    for function in (operating_points, images, regions, layers):
        if (figure := function(results, names)) is not None:
            if results.study["reduced"]:
                style.note(figure, f"Reduced study: {results.study['reduced']}.")
            style.save(figure, out, f"focused_{function.__name__}")
            drawn.append(f"focused_{function.__name__}")
    return drawn


def _arrays(results, names: list[str], kind: str) -> dict[str, np.ndarray]:
    """Return {variant: array} of one kind, of the first seed that has it."""
    found: dict = {}
    for record in results.records:
        name = record["run"]["variant"]
        if name in names and kind in record.get("arrays", {}):
            found.setdefault(name, unpack(record["arrays"][kind]))
    return {name: found[name] for name in names if name in found}


def _one(results, name: str, metric: str, **conditions) -> float:
    values = results.values(name, metric, **conditions)
    return float(values.mean()) if len(values) else np.nan


def _timed(panel, before):
    """Return the panel of latencies with its line at the dense network; without any it goes, and ``before`` is the last."""
    if not panel.has_data():
        panel.remove()
        return before
    panel.axhline(1, color=style.SOFT, linewidth=0.9, linestyle=":")
    return panel


def operating_points(results, names: list[str]):
    """Top-1, changed predictions and latency of every variant against the mean share of the map that it computes."""
    baseline = results.study["baseline"]
    points = {name: _one(results, name, "aoi", statistic="mean") for name in names}
    points = {name: aoi for name, aoi in points.items() if np.isfinite(aoi)}
    if not points:
        return None
    size = style.with_legend([*points, baseline], 11.0, 3.9)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=size)
    for name in [baseline, *points]:
        look = style.look(results.variants.index(name)) | {"linestyle": "none", "markersize": 6, "capsize": 2}
        aoi = points.get(name, 100.0)
        top1 = interval(results, name, "top1")
        if top1:
            error = [[top1.estimate - top1.low], [top1.high - top1.estimate]]
            left.errorbar(aoi, top1.estimate, yerr=error if np.isfinite(error).all() else None, label=name, **look)
        changed, bound = (_one(results, name, "disagreement", statistic=s) for s in ("estimate", "upper95"))
        if np.isfinite(changed):
            middle.errorbar(aoi, changed, yerr=[[0], [bound - changed]], **look)
        ratio, low, high = (
            _one(results, name, "latency_ratio", statistic=s, batch=1) for s in ("median", "low", "high")
        )
        if np.isfinite(ratio):
            right.errorbar(aoi, ratio, yerr=[[ratio - low], [high - ratio]], label=name, **look)
    left.set_ylabel("top-1 on the test images (%)")
    middle.set_ylabel("predictions changed by focus (%)")
    right.set_ylabel(f"latency / `{baseline}`, batch 1")
    last = _timed(right, middle)
    for axes in (left, middle, last):
        axes.set_xlabel("kept share of the map (%)")
        axes.set_xlim(0, 104)
    handles, labels = left.get_legend_handles_labels()
    last.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, numpoints=1)
    style.title(
        figure, "What focus keeps, changes and saves: means over test images, 95 % intervals (middle: one-sided bound)"
    )
    return figure


def images(results, names: list[str]):
    """How much of each image is kept, and what that image costs, relative to the dense network, one mark an image."""
    aoi, cost = _arrays(results, names, "aoi"), _arrays(results, names, "image_latency")
    if not aoi:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=style.with_legend(list(aoi), 9.0, 3.8))
    for name, share_N in aoi.items():
        place = results.variants.index(name)
        left.plot(
            np.sort(share_N), 100 * np.arange(1, len(share_N) + 1) / len(share_N), label=name, **style.line(place)
        )
        if name in cost:
            kept, dense, focused = cost[name].T[:3]
            look = style.look(place) | {"linestyle": "none", "markersize": 4, "alpha": 0.7}
            right.plot(kept, focused / dense, **look)
    left.set(xlabel="kept share of the map (%)", ylabel="images with at most that share (%)", xlim=(0, 104))
    right.set(xlabel="kept share of the map (%)", ylabel="latency of the image, focused / dense", xlim=(0, 104))
    last = _timed(right, left)
    handles, labels = left.get_legend_handles_labels()
    last.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    what = "the kept share (left) and the latency at batch 1 (right)" if last is right else "the kept share"
    style.title(figure, f"Image by image: {what}, test images")
    return figure


def regions(results, names: list[str]):
    """The regions on test pictures: what is not computed is darkened."""
    pictures, kept = (_arrays(results, names, kind) for kind in ("pictures", "regions"))
    found = [name for name in pictures if name in kept][:SHOWN]
    if not found:
        return None
    count = len(pictures[found[0]])
    figure, grid = plt.subplots(len(found), count, figsize=(1.5 * count + 1.2, 1.55 * len(found) + 0.7), squeeze=False)
    for name, line in zip(found, grid):
        for picture, mask, axes in zip(pictures[name], kept[name], line):
            shown = picture * (0.25 + 0.75 * mask[..., None])
            axes.imshow(shown.squeeze(-1) if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{100 * mask.mean():.0f} %", fontsize=8)
            axes.grid(visible=False)
        line[0].set_ylabel(name, fontsize=8)
    style.title(figure, "Regions on test pictures: what is dark is not computed; kept share above each")
    return figure


def layers(results, names: list[str]):
    """What each layer after the insertion point costs: dense, and a quarter of the map as a crop and in tiles."""
    found = _arrays(results, names, "layer_cost")
    if not found:
        return None
    name, table = next(iter(found.items()))
    macs, dense, crop, tiles = table.T
    figure, (left, right) = plt.subplots(2, 1, figsize=(max(7.0, 0.17 * len(table) + 2), 5.2), sharex=True)
    at = np.arange(1, len(table) + 1)
    for values, label, place in (
        (dense, "dense", 0),
        (crop, "crop of a quarter", 2),
        (tiles, "the same quarter in tiles", 4),
    ):
        left.plot(at, values, label=label, markersize=4, **style.line(place) | style.look(place))
        if place:
            right.plot(at, values / dense, label=label, markersize=4, **style.line(place) | style.look(place))
    right.axhline(1, color=style.SOFT, linewidth=0.9, linestyle=":")
    right.axhline(0.25, color=style.SOFT, linewidth=0.9, linestyle="--")
    right.annotate(
        "a quarter", (at[-1], 0.25), xytext=(0, 3), textcoords="offset points", fontsize=7, color=style.SOFT, ha="right"
    )
    left.set(yscale="log", ylabel="median of one image (ms)")
    right.set(
        xlabel=f"convolution after the insertion point of {name}, in order",
        ylabel="over the dense layer",
        ylim=(0, None),
    )
    left.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    style.title(
        figure,
        f"Cost of each layer on this machine, bookkeeping included ({macs.sum():.0f} million multiply-accumulates in all)",
    )
    return figure
