"""Figures of the bootstrapped-ViT studies: how fast a ViT learns, how near its features come to the agent's, how far it looks.

Drawn from metrics files and histories alone; a figure without data is not drawn.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from convx import config
from convx.evaluate.payload import unpack
from convx.report import style
from convx.report.comparison import interval

FIRST = (
    "vit",
    "vit_trunc02",
    "vit_equal_compute",
    "agent",
    "vit_joint",
    "vit_joint_trunc02",
    "vit_shared",
    "vit_kd_agent",
)
SHOWN = 8  # curves of a figure, those above first
PANELS = 4  # variants in the figure with a panel for each
SHARES = ("vit", "vit_joint", "agent")  # drawn against the share of the training images: <name>_<percent>pct


def draw(results, out: str | Path) -> list[str]:
    """Draw what a study holds of this paper into ``out`` as SVG and PNG; return the names of the figures.

    ``results`` is a :class:`convx.report.results.Results`.
    """
    names = [name for name in results.variants if config.declaration(results.study, name)["paper"] == "bootstrap_vit"]
    names.sort(
        key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)
    )  # a stable order: the rest as it stands
    whole = [name for name in names if config.training_settings(results.study, name)["train_share"] == 1]
    drawn = []
    for function in (convergence, features, attention, fractions):
        if (figure := function(results, names if function is fractions else whole)) is not None:
            if results.study["reduced"]:
                style.note(figure, f"Reduced study: {results.study['reduced']}.")
            style.save(figure, out, f"bootstrap_vit_{function.__name__}")
            drawn.append(f"bootstrap_vit_{function.__name__}")
    return drawn


def _line(results, name: str) -> dict:
    return style.line(results.variants.index(name))


def _histories(results, name: str) -> dict[int, pd.DataFrame]:
    found = {seed: results.history(name, seed) for seed in results.seeds(name)}
    return {seed: history for seed, history in found.items() if history is not None and len(history) > 1}


def _column(results, name: str, column: str) -> pd.DataFrame:
    """Return epochs x seeds of one column of the history, empty where no run has it."""
    histories = {seed: h.set_index("epoch")[column] for seed, h in _histories(results, name).items() if column in h}
    return pd.DataFrame(histories).dropna()


def _band(axes, x, frame: pd.DataFrame, label: str, look: dict) -> None:
    axes.plot(x, frame.mean(axis=1), label=label, **look)
    if frame.shape[1] > 1:
        low, high = frame.min(axis=1), frame.max(axis=1)
        axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _compute(results, name: str) -> float | None:
    """Return the multiply-accumulates of an epoch of training, or None where a run did not say."""
    macs, seconds, rate = (
        results.values(name, metric) for metric in ("training_macs", "train_seconds", "train_images_per_second")
    )
    epochs = config.training_settings(results.study, name)["epochs"]
    if not (len(macs) and len(seconds) and len(rate) and epochs):
        return None
    images = float(seconds.iloc[0] * rate.iloc[0]) / epochs
    return float(macs.iloc[0]) * images


def _curves(results, names: list[str], column: str) -> dict[str, pd.DataFrame]:
    """Return {variant: epochs x seeds} of one column of the histories, for the first variants that have it."""
    found = {name: _column(results, name, column) for name in names}
    return dict([(name, frame) for name, frame in found.items() if len(frame)][:SHOWN])


def convergence(results, names: list[str]):
    """Accuracy on the validation split (without one: on the training batches) against epochs, and against compute."""
    what = "validation"
    if not (curves := _curves(results, names, "validation_top1")):
        what, curves = "training", _curves(results, names, "train_top1")
    if not curves:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), sharey=True)
    costs = {name: cost * frame.index[-1] for name, frame in curves.items() if (cost := _compute(results, name))}
    power = int(math.log10(max(costs.values()))) // 3 * 3 if costs else 0
    unknown = []
    for name, frame in curves.items():
        look = _line(results, name)
        _band(left, frame.index, frame, name, look)
        if (cost := _compute(results, name)) is None:
            unknown.append(name)
        else:
            _band(right, frame.index * cost / 10**power, frame, name, look)
    if "vit" in curves:
        for axes in (left, right):
            axes.axhline(curves["vit"].mean(axis=1).iloc[-1], color="#999999", linestyle=":", linewidth=1)
    left.set(xlabel="epoch", ylabel=f"top-1 on the {what} images (%)")
    right.set(xlabel=f"multiply-adds of training (10$^{{{power}}}$)")
    left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    right.set_xlim(left=0)
    if right.has_data():
        style.legend(right, len(curves))
    else:
        right.set_axis_off()
        left.legend(fontsize=8)
    dotted = "; dotted: where the plain ViT ends" if "vit" in curves else ""
    missing = f"; without a cost: {', '.join(unknown)}" if unknown and right.has_data() else ""
    title = f"Accuracy against epochs and compute: mean and range of seeds{dotted}{missing}"
    style.title(figure, title)
    return figure


def features(results, names: list[str]):
    """How far the ViT's features are from the agent's in each layer, epoch by epoch."""
    panels = {}
    for name in names:
        layers = []
        while len(frame := _column(results, name, f"feature_distance_{len(layers)}")):
            layers.append(frame)
        if layers:
            panels[name] = layers
    panels = dict(list(panels.items())[:PANELS])
    if not panels:
        return None
    size = (1.8 + 2.9 * len(panels), 3.7)
    figure, grid = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axes, (name, layers) in zip(grid[0], panels.items()):
        for layer, frame in enumerate(layers):
            colour = plt.get_cmap("viridis")(0.85 * layer / max(1, len(layers) - 1))
            look = {"color": colour, "linestyle": style.LINES[layer % len(style.LINES)]}
            _band(axes, frame.index, frame, f"layer {layer}", look)
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylim(bottom=0)
    grid[0, 0].set_ylabel("mean squared difference\nof normalised features")
    style.legend(grid[0, -1], max(map(len, panels.values())))
    style.title(figure, "Distance between the features of ViT and agent on the validation images (2 is unrelated)")
    return figure


def attention(results, names: list[str]):
    """How far the heads of each layer look, in pixels: mean over heads and seeds, range of the heads."""
    found: dict[str, list[np.ndarray]] = {}
    for record in results.records:
        name = record["run"]["variant"]
        if name in names and "attention_distance" in record.get("arrays", {}):
            found.setdefault(name, []).append(unpack(record["arrays"]["attention_distance"]))
    found = {name: found[name] for name in names if name in found}
    found = dict(list(found.items())[:SHOWN])
    if not found:
        return None
    depth = max(array.shape[0] for seeds in found.values() for array in seeds)
    figure, axes = plt.subplots(figsize=(5.4 + 0.25 * depth, 3.8))
    for place, (name, seeds) in enumerate(found.items()):
        heads_LH = np.mean(seeds, 0)
        layers = np.arange(len(heads_LH)) + 0.06 * (place - (len(found) - 1) / 2)
        look = _line(results, name)
        axes.plot(layers, heads_LH.mean(1), label=name, **look)
        axes.vlines(layers, heads_LH.min(1), heads_LH.max(1), color=look["color"], linewidth=1, alpha=0.7)
    axes.set(xlabel="layer", ylabel="mean attention distance (px)", xticks=range(depth))
    axes.set_ylim(bottom=0)
    style.legend(axes, len(found))
    style.title(figure, "How far attention looks: mean over heads and seeds, vertical lines: range of the heads")
    return figure


def fractions(results, names: list[str]):
    """Top-1 with its 95 % interval against the share of the training images."""
    lines: dict[str, dict[float, object]] = {}
    for name in names:
        base, _, end = name.rpartition("_")
        stem = base if end.endswith("pct") else name
        share = 100 * config.training_settings(results.study, name)["train_share"]
        if stem in SHARES and (top1 := interval(results, name, "top1")) is not None:
            lines.setdefault(stem, {})[share] = top1
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(6.8, 3.9))
    for i, (name, points) in enumerate(lines.items()):
        shares = sorted(points)
        middle = [points[share].estimate for share in shares]
        ends = [(points[s].low, points[s].high) for s in shares]
        bars = [[0.0 if math.isnan(e) else abs(m - e) for m, e in zip(middle, side)] for side in zip(*ends)]
        place = results.variants.index(name)
        look = style.line(place) | {k: v for k, v in style.look(place).items() if k != "color"}
        beside = np.array(shares) * 1.03 ** (i - (len(lines) - 1) / 2)  # so that intervals do not hide one another
        axes.errorbar(beside, middle, yerr=bars, capsize=2, label=name, **look)
    ticks = sorted({share for points in lines.values() for share in points})
    axes.set(xscale="log", xlabel="share of the training images (%)", ylabel="top-1 on the test images (%)")
    axes.set_xticks(ticks, [f"{share:g}" for share in ticks])
    axes.minorticks_off()
    style.legend(axes, len(lines))
    style.title(figure, "Accuracy against the amount of data, the same number of epochs; 95 % intervals")
    return figure
