"""Figures of the T-CNN studies: gates, non-locality, centres of attention, what is looked at, and what it is good for.

Drawn from metrics files and histories alone; a figure without data is not drawn.
"""

import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

from convx import config
from convx.evaluate.payload import unpack
from convx.papers.tcnn.locality import HEADS, distance_of_taps, epsilon
from convx.report import style

SHOWN = 4  # variants in the figures with a panel for each, the first of the study
CONTROL = "cnn_finetuned"  # what the representations are compared with: the same start, recipe and epochs
GATE = re.compile(r"(.+)\.content_share_(\d+)$")  # columns of a history


def draw(results, out: str | Path) -> list[str]:
    """Draw what a study holds of this paper into ``out`` as SVG and PNG; return the names of the figures.

    ``results`` is a :class:`convx.report.results.Results`.
    """
    names = [name for name in results.variants if config.declaration(results.study, name)["paper"] == "tcnn"]
    drawn = []
    for function in (gates, non_locality, centres, attention, initial_error, partial_starts, arrows, cka):
        if (figure := function(results, names)) is not None:
            if results.study["reduced"]:
                style.note(figure, f"Reduced study: {results.study['reduced']}.")
            style.save(figure, out, f"tcnn_{function.__name__}")
            drawn.append(f"tcnn_{function.__name__}")
    return drawn


def _place(results, name: str) -> int:
    return results.variants.index(name)


def _arrays(results, names: list[str], kind: str) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """Return {variant: {seed: {layer: array}}} of the arrays ``<kind>/<layer>`` (or ``<kind>`` alone: the layer "")."""
    found: dict = {}
    for record in results.records:
        run = record["run"]
        for key, packed in record.get("arrays", {}).items() if run["variant"] in names else []:
            what, _, layer = key.partition("/")
            if what == kind:
                found.setdefault(run["variant"], {}).setdefault(run["seed"], {})[layer] = unpack(packed)
    return {name: found[name] for name in names if name in found}


def _shades(count: int) -> list:
    """Return one colour for each layer, early to late, from dark to light."""
    return [plt.get_cmap("viridis")(0.85 * i / max(1, count - 1)) for i in range(count)]


def _histories(results, name: str) -> list[pd.DataFrame]:
    found = [results.history(name, seed) for seed in results.seeds(name)]
    return [history for history in found if history is not None and len(history) > 1 and "epoch" in history]


def gates(results, names: list[str]):
    """The share of content in each recast layer while training (mean and range of its heads), and of each head at the end."""
    panels = {}
    for name in names:
        if histories := _histories(results, name):
            frame = pd.concat(histories).groupby("epoch").mean(numeric_only=True)
            columns = {c: GATE.match(c).groups() for c in frame.columns if GATE.match(c)}
            if columns and frame[list(columns)].nunique().max() > 1:  # gates that can move
                panels[name] = (frame, columns)
    panels = dict(list(panels.items())[:SHOWN])
    if not panels:
        return None
    figure, grid = plt.subplots(2, len(panels), figsize=(1.6 + 3.2 * len(panels), 5.6), squeeze=False)
    for (name, (frame, columns)), (top, bottom) in zip(panels.items(), grid.T):
        layers = list(dict.fromkeys(layer for layer, _ in columns.values()))
        table = []
        for layer, colour in zip(layers, _shades(len(layers))):
            heads = frame[sorted((c for c in columns if columns[c][0] == layer), key=lambda c: int(columns[c][1]))]
            top.plot(heads.index, heads.mean(axis=1), color=colour, label=layer)
            top.fill_between(heads.index, heads.min(axis=1), heads.max(axis=1), color=colour, alpha=0.15, linewidth=0)
            table.append(heads.iloc[-1].to_numpy())
        top.set(title=name, xlabel="epoch")
        top.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        top.set_ylim(bottom=0)
        width = max(map(len, table))
        image = np.array([np.pad(line, (0, width - len(line)), constant_values=np.nan) for line in table])
        shown = bottom.imshow(image, cmap="cividis", vmin=0, aspect="auto")
        bottom.set(xlabel="head (tap of the kernel, row by row)", yticks=range(len(layers)), yticklabels=layers)
        bottom.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        bottom.grid(visible=False)
        figure.colorbar(shown, ax=bottom, shrink=0.8)
    grid[0, 0].set_ylabel("share of content\n(line: mean, band: range of heads)")
    grid[0, -1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    style.title(figure, "Gates: share of content attention while training (above) and of each head at the end (below)")
    return figure


def non_locality(results, names: list[str]):
    """How far the heads of each layer look, against what they start with."""
    found = _arrays(results, names, "heads")
    found = {
        n: seeds
        for n, seeds in found.items()
        if any(np.isfinite(a[:, 0]).any() for s in seeds.values() for a in s.values())
    }
    if not found:
        return None
    layers = list(dict.fromkeys(layer for seeds in found.values() for arrays in seeds.values() for layer in arrays))
    figure, axes = plt.subplots(figsize=(4.2 + 0.42 * len(layers), 3.8))
    for name, seeds in found.items():
        frame = pd.DataFrame(
            [{layer: array[:, 0].mean() for layer, array in arrays.items()} for arrays in seeds.values()]
        )
        mean = frame.mean().reindex(layers)
        axes.plot(
            range(len(layers)),
            mean,
            label=name,
            markersize=5,
            **style.line(_place(results, name)) | style.look(_place(results, name)),
        )
    heads = {len(array) for seeds in found.values() for arrays in seeds.values() for array in arrays.values()}
    for start in sorted({distance_of_taps(count) for count in heads} - {None}):
        axes.axhline(start, color=style.SOFT, linewidth=0.9, linestyle=":")
        axes.annotate(
            f"start {start:.2f}", (0, start), xytext=(2, 3), textcoords="offset points", fontsize=7, color=style.SOFT
        )
    axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    axes.set_ylabel("non-locality (pixels of the layer's map)")
    style.legend(axes, len(found))
    style.title(figure, "Mean distance between a query and what it attends to; means of heads and seeds")
    return figure


def centres(results, names: list[str]):
    """Where the heads of the last recast layer look: taps at the start, centres and widths at the end, of the first seed."""
    found = dict(list(_arrays(results, names, "heads").items())[:SHOWN])
    if not found:
        return None
    figure, grid = plt.subplots(1, len(found), figsize=(3.1 * len(found) + 0.6, 3.6), squeeze=False)
    for (name, seeds), axes in zip(found.items(), grid[0]):
        layer, heads_H5 = list(next(iter(seeds.values())).items())[-1]
        y, x, span = (heads_H5[:, HEADS.index(key)] for key in ("centre_y", "centre_x", "span"))
        side = math.isqrt(len(heads_H5))
        if distance_of_taps(len(heads_H5)) is not None:
            taps = np.arange(side) - side // 2
            axes.plot(
                np.tile(taps, side), np.repeat(taps, side), "+", color=style.SOFT, markersize=11, label="tap (start)"
            )
        axes.plot(x, y, "o", color="#0072B2", markersize=4, label="centre (end)")
        for cx, cy, width in zip(x, y, np.sqrt(np.clip(span, 0, None) / 2)):
            if np.isfinite(width):
                axes.add_patch(Circle((cx, cy), width, fill=False, color="#0072B2", linewidth=0.8))
        reach = max(side / 2 + 0.5, *(v for v in np.abs([*x, *y]) + 0.5 if np.isfinite(v) and v < 4 * side))
        axes.set(
            xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal", title=f"{name}\n{layer}", xlabel="x (pixels)"
        )
    grid[0, 0].set_ylabel("y (pixels)")
    grid[0, -1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    style.title(
        figure,
        "Attention by position, last recast layer: centres; circles have the standard deviation of a head as radius",
    )
    return figure


def attention(results, names: list[str]):
    """What two output pixels of the last recast layer attend to, mean over heads, on test images, of the first seed."""
    maps, queries, pictures = (_arrays(results, names, kind) for kind in ("attention", "queries", "pictures"))
    found = [name for name in maps if name in queries and name in pictures][:SHOWN]
    if not found:
        return None
    images = next(iter(pictures[found[0]].values()))[""]
    figure, grid = plt.subplots(
        len(images), 1 + 2 * len(found), figsize=(1.5 + 2.5 * len(found), 1.25 * len(images) + 0.9), squeeze=False
    )
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
    for image, line in zip(images, grid):
        line[0].imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
    for place, name in enumerate(found):
        layer, maps_P2HW = list(next(iter(maps[name].values())).items())[-1]
        at = next(iter(queries[name].values()))[layer]
        for seen, line in zip(maps_P2HW, grid):
            for which in range(2):
                axes = line[1 + 2 * place + which]
                axes.imshow(seen[which], cmap="cividis", vmin=0)
                axes.plot(at[which][1], at[which][0], "x", color="#D55E00", markersize=6, markeredgewidth=1.6)
        grid[0, 1 + 2 * place].set_title(f"{name}, {layer}", fontsize=8)
    style.title(figure, "What the output pixel at the cross attends to, mean over heads; each map has its own scale")
    return figure


def initial_error(results, names: list[str]):
    """The error of recasting a layer against its locality: measured on the layers' inputs, and in closed form."""
    frame = results.runs
    part = frame[(frame["metric"] == "initial_error") & frame["variant"].isin(names)]
    if part.empty:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    alpha = np.linspace(1, max(22, part["alpha"].max() + 1), 200)
    axes.plot(alpha, [epsilon(a) for a in alpha], color="black", linewidth=1.2, label="exact, unbounded map")
    axes.plot(alpha, 4 * np.exp(-alpha), color=style.SOFT, linewidth=1.2, linestyle="--", label=r"$4\,e^{-\alpha}$")
    for name in dict.fromkeys(part["variant"]):
        mine = part[part["variant"] == name]
        axes.plot(
            mine["alpha"], mine["value"], linestyle="", markersize=5, label=name, **style.look(_place(results, name))
        )
    axes.set(yscale="log", xlabel=r"locality $\alpha$ (1/pixel²)", ylabel="relative error of a recast layer")
    style.legend(axes, 2 + part["variant"].nunique())
    style.title(
        figure, "Error at the start: every recast layer and seed, on its own inputs; open gates and borders add to it"
    )
    return figure


def _offset(results, name: str, seed: int) -> tuple[float, float] | None:
    """Return (epochs, seconds) that a run's start was trained for before, or None where its history is missing."""
    settings = config.variant_settings(results.study, name)
    start = settings["start_from"]
    if start is None:
        return 0.0, 0.0
    before, history = _offset(results, start, seed), results.history(start, seed)
    if before is None or history is None or "seconds" not in history:
        return None
    rows = history if settings["at_epoch"] is None else history[history["epoch"] == settings["at_epoch"]]
    return (before[0] + rows["epoch"].iloc[-1], before[1] + rows["seconds"].iloc[-1]) if len(rows) else None


def partial_starts(results, names: list[str]):
    """Accuracy while training against all epochs and all seconds, those of the start included."""
    settings = {name: config.variant_settings(results.study, name) for name in results.variants}
    partial = [name for name in names if settings[name]["at_epoch"] is not None]
    if not partial:
        return None
    whole = [n for n in names if n not in partial and settings[n]["start_from"] is None]
    starts = dict.fromkeys(settings[name]["start_from"] for name in partial)
    figure, grid = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    metrics, drawn = set(), 0
    for name in [*starts, *whole, *partial]:
        curves = []
        for seed in results.seeds(name):
            history, before = results.history(name, seed), _offset(results, name, seed)
            metric = next((m for m in ("validation_top1", "train_top1") if history is not None and m in history), None)
            if metric is None or before is None or len(history) < 2:
                continue
            metrics.add(metric)
            curves.append(
                pd.DataFrame(
                    {"epoch": history["epoch"] + before[0], "s": history["seconds"] + before[1], "y": history[metric]}
                )
            )
        if not curves:
            continue
        mean, drawn = pd.concat(curves).dropna().groupby("epoch").mean(), drawn + 1
        for axes, x in zip(grid, (mean.index, mean["s"])):
            axes.plot(x, mean["y"], label=name, **style.line(_place(results, name)))
            axes.plot(
                x[-1:] if axes is grid[0] else x.iloc[-1:],
                mean["y"].iloc[-1:],
                markersize=5,
                **style.look(_place(results, name)),
            )
    if drawn < 2:
        plt.close(figure)
        return None
    said = {"validation_top1": "validation top-1 (%)", "train_top1": "training top-1 (%)"}
    grid[0].set(xlabel="epochs, those of the start included", ylabel=said[min(metrics, key=list(said).index)])
    grid[0].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    grid[1].set(xlabel="seconds of training, those of the start included")
    style.legend(grid[1], drawn)
    style.title(figure, "Partial starts: accuracy against epochs and against time, means of seeds")
    return figure


def arrows(results, names: list[str]):
    """Clean against corrupted accuracy: an arrow from each network to what it became."""
    points = {}
    for name in results.variants:
        values = [results.values(name, metric) for metric in ("top1", "mean_corruption_accuracy")]
        if all(len(v) for v in values):
            points[name] = tuple(v.mean() for v in values)
    settings = {name: config.variant_settings(results.study, name) for name in names if name in points}
    # A partial start began before what its start became, so an arrow from there would say too much.
    pairs = [
        (s["start_from"], name) for name, s in settings.items() if s["at_epoch"] is None and s["start_from"] in points
    ]
    if not pairs:
        return None
    figure, axes = plt.subplots(figsize=(6.6, 4.2))
    for start, name in pairs:
        colour = style.look(_place(results, name))["color"]
        axes.annotate(
            "",
            points[name],
            points[start],
            arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 4, "shrinkB": 4},
        )
    shown = list(dict.fromkeys(name for pair in pairs for name in pair))
    for name in shown:
        axes.plot(*points[name], linestyle="", markersize=7, label=name, **style.look(_place(results, name)))
    axes.margins(0.12)
    axes.set(xlabel="clean top-1 (%)", ylabel="mean top-1 under corruption (%)")
    style.legend(axes, len(shown))
    style.title(figure, "From a trained network to what fine-tuning made of it; means of seeds")
    return figure


def _alignment(a_T: np.ndarray, b_T: np.ndarray) -> float:
    """Return the linear CKA from the upper triangles of two Gram matrices of norm one."""
    n = (math.isqrt(8 * len(a_T) + 1) - 1) // 2
    rows, columns = np.triu_indices(n)
    twice = np.where(rows == columns, 1.0, 2.0)
    a, b = a_T.astype(float), b_T.astype(float)
    return float((twice * a * b).sum() / math.sqrt((twice * a * a).sum() * (twice * b * b).sum()))


def cka(results, names: list[str]):
    """How alike the stages of each variant and of the fine-tuned CNN are, seed by seed: linear CKA on test images."""
    grams = _arrays(results, names, "gram")
    if CONTROL not in grams or len(grams) < 2:
        return None
    control = grams.pop(CONTROL)
    stages = list(next(iter(control.values())))
    figure, axes = plt.subplots(figsize=(4.4 + 0.6 * len(stages), 3.8))
    drawn = 0
    for name, seeds in grams.items():
        rows = [
            {s: _alignment(arrays[s], control[seed][s]) for s in stages if s in arrays and s in control[seed]}
            for seed, arrays in seeds.items()
            if seed in control
            and all(len(arrays[s]) == len(control[seed][s]) for s in stages if s in arrays and s in control[seed])
        ]
        if not rows or not any(rows):
            continue
        mean, drawn = pd.DataFrame(rows).mean().reindex(stages), drawn + 1
        axes.plot(
            range(len(stages)),
            mean,
            label=name,
            markersize=6,
            **style.line(_place(results, name)) | style.look(_place(results, name)),
        )
    if not drawn:
        plt.close(figure)
        return None
    axes.set_xticks(range(len(stages)), stages)
    axes.set_ylim(top=1.02)
    axes.set_ylabel(f"linear CKA with {CONTROL}")
    style.legend(axes, drawn)
    style.title(
        figure, "Representations of each stage, compared with those of the CNN fine-tuned alike; means of seeds"
    )
    return figure
