"""Figures of the DCLS studies: where the taps are, what kernels they build, how they spread, what they cost.

Drawn from metrics files and histories alone; a figure without data is not drawn.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from convx import config
from convx.evaluate.payload import unpack
from convx.papers.dcls.curves import curves
from convx.report import style
from convx.report.comparison import interval

SHOWN = 6  # variants in the figures of pictures, the first of the study
CHANNELS = 4  # kernels of each in the figure of kernels
STATES = {"start": "before training", "end": "after training"}


def draw(results, out: str | Path) -> list[str]:
    """Draw what a study holds of this paper into ``out`` as SVG and PNG; return the names of the figures.

    ``results`` is a :class:`convx.report.results.Results`.
    """
    names = [name for name in results.variants if config.declaration(results.study, name)["paper"] == "dcls"]
    drawn = []
    for function in (positions, kernels, radius, repulsion, parameters, throughput):
        if (figure := function(results, names)) is not None:
            if results.study["reduced"]:
                style.note(figure, f"Reduced study: {results.study['reduced']}.")
            style.save(figure, out, f"dcls_{function.__name__}")
            drawn.append(f"dcls_{function.__name__}")
    return drawn


def _look(results, name: str) -> dict:
    return style.look(results.variants.index(name))


def _arrays(results, names: list[str], kind: str) -> dict[str, dict[str, dict[str, list[np.ndarray]]]]:
    """Return {variant: {layer: {state: arrays of the seeds}}} of the pictures that the evaluations kept."""
    found: dict = {}
    for record in results.records:
        name = record["run"]["variant"]
        for key, packed in record.get("arrays", {}).items() if name in names else []:
            what, _, rest = key.partition("/")
            layer, _, state = rest.rpartition("/")
            if what == kind and state in STATES:  # other evaluators keep pictures too
                states = found.setdefault(name, {}).setdefault(layer, {})
                states.setdefault(state, []).append(unpack(packed))
    return {name: found[name] for name in names if name in found}


def _picture(axes, image_hw: np.ndarray, **settings) -> None:
    """Show a kernel with (0, 0) in its centre and the outline of the dense kernel where that is smaller."""
    half_h, half_w = (n // 2 for n in image_hw.shape)
    height, width = image_hw.shape
    edges = (-half_w - 0.5, width - half_w - 0.5, height - half_h - 0.5, -half_h - 0.5)
    axes.imshow(image_hw, extent=edges, **settings)
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set(visible=True, color="#CCCCCC", linewidth=0.6)


def positions(results, names: list[str]):
    """Where the taps of each set of positions are, in percent of its taps, mean over seeds: before and after training."""
    found = dict(list(_arrays(results, names, "positions").items())[:SHOWN])
    if not found:
        return None
    columns = [(place, state) for place in range(min(2, max(map(len, found.values())))) for state in STATES]
    size = 1.35 * len(columns) + 1.8, 1.45 * len(found) + 0.9
    figure, grid = plt.subplots(len(found), len(columns), figsize=size, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for (name, layers), line in zip(found.items(), grid):
        sets = [next(iter(layers.items())), list(layers.items())[-1]]  # the shallowest and the deepest
        for (place, state), axes in zip(columns, line):
            layer, states = sets[place]
            if state not in states or (place and len(layers) == 1):
                continue
            shares = np.mean(states[state], 0)
            axes.set_axis_on()
            _picture(axes, np.sqrt(shares), cmap="Greys", vmin=0)
            side = _dense_side(results, name, layer)
            if side and side < max(shares.shape):
                box = Rectangle((-side / 2, -side / 2), side, side, fill=False, color="#D55E00", linewidth=0.9)
                axes.add_patch(box)
            axes.set_xlabel(f"{layer}\n{shares.shape[0]}x{shares.shape[1]}", fontsize=6.5)
    for axes, (_, state) in zip(grid[0], columns):
        axes.annotate(STATES[state], (0.5, 1.04), xycoords="axes fraction", ha="center", fontsize=8)
    _row_names(grid, found)
    style.title(figure, "Where the taps are: darker is more (square root); box: the dense kernel that they replace")
    return figure


def _dense_side(results, name: str, layer: str) -> int | None:
    rows = results.runs
    rows = rows[(rows["variant"] == name) & (rows["metric"] == "tap_share_outside")]
    rows = rows[rows["layer"] == layer] if len(rows) else rows
    return int(rows["dense_side"].iloc[0]) if len(rows) else None


def _row_names(grid, names) -> None:
    """Write the variants left of the rows, also where the first picture of a row is missing."""
    for name, line in zip(names, grid):
        line[0].annotate(
            name.replace("_", "\n", 1), (-0.08, 0.5), xycoords="axes fraction", ha="right", va="center", fontsize=8
        )


def kernels(results, names: list[str]):
    """The first kernels of the first layer as they are built, first seed: before and after training."""
    found = {}
    for name, layers in list(_arrays(results, names, "kernels").items())[:SHOWN]:
        states = next(iter(layers.values()))
        found[name] = {state: seeds[0][:CHANNELS] for state, seeds in states.items()}
    if not found:
        return None
    size = 1.1 * 2 * CHANNELS + 1.8, 1.25 * len(found) + 0.9
    figure, grid = plt.subplots(len(found), 2 * CHANNELS, figsize=size, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for states, line in zip(found.values(), grid):
        for block, state in enumerate(STATES):
            for channel, kernel_hw in enumerate(states.get(state, [])):
                axes = line[block * CHANNELS + channel]
                axes.set_axis_on()
                top = float(np.abs(kernel_hw).max()) or 1.0
                _picture(axes, kernel_hw, cmap="RdGy", vmin=-top, vmax=top)
                axes.set_xlabel(f"channel {channel}", fontsize=6.5)
    for block, state in enumerate(STATES):
        grid[0, block * CHANNELS].annotate(STATES[state], (0, 1.06), xycoords="axes fraction", fontsize=8)
    _row_names(grid, found)
    style.title(
        figure, "Constructed kernels of the first layer, each scaled to its largest weight (red below 0, grey above)"
    )
    return figure


def _curves(results, names: list[str], quantity: str) -> dict[str, pd.DataFrame]:
    """Return {variant: epochs x seeds} of a quantity of the history, its mean over the sets of positions."""
    found = {}
    for name in names:
        seeds = {}
        for seed in results.seeds(name):
            history = results.history(name, seed)
            if history is None or len(history) < 2 or not history.columns.str.endswith(f".{quantity}").any():
                continue
            layers = curves(history.to_dict("records"), quantity)
            seeds[seed] = pd.Series(np.mean(list(layers.values()), 0), index=history["epoch"].to_numpy())
        if seeds:
            found[name] = pd.DataFrame(seeds)
    return found


def _plot(axes, results, name: str, frame: pd.DataFrame) -> None:
    look = style.line(results.variants.index(name))
    axes.plot(frame.index, frame.mean(axis=1), label=name, **look)
    if frame.shape[1] > 1:
        axes.fill_between(
            frame.index, frame.min(axis=1), frame.max(axis=1), color=look["color"], alpha=0.12, linewidth=0
        )


def radius(results, names: list[str]):
    """How far the taps are from the centre, epoch by epoch: mean and 90th percentile, over the sets of positions."""
    panels = {"tap_radius_mean": "mean tap radius (px)", "tap_radius_p90": "90th percentile of the tap radius (px)"}
    found = {quantity: _curves(results, names, quantity) for quantity in panels}
    if not found["tap_radius_mean"]:
        return None
    figure, both = plt.subplots(1, 2, figsize=(9, 3.8))
    for axes, (quantity, label) in zip(both, panels.items()):
        for name, frame in found[quantity].items():
            _plot(axes, results, name, frame)
        axes.set(xlabel="epoch", ylabel=label)
        axes.set_ylim(bottom=0)
    style.legend(both[1], len(found["tap_radius_mean"]))
    style.title(figure, "How far the taps spread: mean over the sets of positions and seeds, range of seeds")
    return figure


def repulsion(results, names: list[str]):
    """The repulsive loss epoch by epoch, from which share of training on it is a part of the loss, and its start."""
    found = {name: frame.pow(2) for name, frame in _curves(results, names, "tap_overlap").items()}
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    starts = set()
    for name, frame in found.items():
        _plot(axes, results, name, frame)
        steps = config.variant_settings(results.study, name)["surgery"]
        shares = {
            s["repulsion_start"]
            for s in steps
            if s.get("repulsion_start") is not None and s.get("learn_positions", True)
        }
        starts |= {share * config.training_settings(results.study, name)["epochs"] for share in shares}
    for epoch in starts:
        axes.axvline(epoch, color="#999999", linestyle=":", linewidth=1)
    axes.set(xlabel="epoch", ylabel="squared mean overlap of the taps (px²)")
    axes.set_ylim(bottom=0)
    dotted = "; dotted: it joins the loss where the variant has it" if starts else ""
    style.title(figure, f"Repulsive loss: mean over seeds, range of seeds{dotted}")
    style.legend(axes, len(found))
    return figure


def parameters(results, names: list[str]):
    """Top-1 with its 95 % interval against the number of parameters."""
    points = {}
    for name in names:
        sizes, top1 = results.values(name, "parameters"), interval(results, name, "top1")
        if len(sizes) and top1 is not None:
            points[name] = float(sizes.iloc[0]) / 1e6, top1
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 4.3))
    for name, (millions, top1) in points.items():
        low, high = (0.0 if math.isnan(end) else abs(top1.estimate - end) for end in (top1.low, top1.high))
        bars = {"yerr": [[low], [high]], "capsize": 2, "linewidth": 1, "linestyle": "none"}
        axes.errorbar(millions, top1.estimate, markersize=7, label=name, **bars, **_look(results, name))
    axes.set(xlabel="parameters (millions)", ylabel="top-1 on the test images (%)")
    style.title(figure, "Accuracy against parameters, 95 % intervals")
    style.legend(axes, len(points))
    return figure


def throughput(results, names: list[str]):
    """Images a second of dense and DCLS networks, these as trained and folded into plain convolutions.

    One panel a batch size. Right of the bars stands the time relative to the baseline, measured in turn with it.
    """
    frame = results.runs
    frame = frame[(frame["metric"] == "throughput") & frame["variant"].isin(names) & frame["value"].notna()]
    if frame.empty:
        return None
    frame = frame[frame["dtype"] == frame["dtype"].iloc[0]]
    frame = frame[frame["threads"] == frame["threads"].min()]
    batches = sorted(frame["batch"].unique())
    bars = [(name, form) for name in names for form in ("no", "yes")
            if len(frame[(frame["variant"] == name) & (frame["folded"] == form)])]  # fmt: skip
    size = (2.6 + 3.2 * len(batches), 1.4 + 0.28 * len(bars))
    figure, panels = plt.subplots(1, len(batches), figsize=size, sharey=True, squeeze=False)
    for axes, batch in zip(panels[0], batches):
        for y, (name, form) in enumerate(reversed(bars)):
            part = frame[(frame["variant"] == name) & (frame["folded"] == form) & (frame["batch"] == batch)]
            if part.empty:
                continue
            value = float(part["value"].astype(float).mean())
            folded = {"hatch": "///", "fill": False} if form == "yes" else {}
            axes.barh(
                y,
                value,
                height=0.7,
                edgecolor=_look(results, name)["color"],
                color=_look(results, name)["color"],
                **folded,
            )
            axes.annotate(
                _ratio(results, name, form, batch),
                (value, y),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axes.set_xlabel(f"images/s, batch {batch:g}")
        axes.margins(x=0.32)
        axes.grid(axis="y", visible=False)
    labels = [f"{name}, folded" if form == "yes" else name for name, form in reversed(bars)]
    panels[0, 0].set_yticks(range(len(bars)), labels)
    where = f"{frame['device'].iloc[0]}, threads: {frame['threads'].iloc[0]:g}"
    style.title(
        figure,
        f"Throughput ({where}); hatched: folded into plain convolutions; numbers: time relative to "
        f"{results.study['baseline']}, measured in turn, with 95 % interval",
    )
    return figure


def _ratio(results, name: str, form: str, batch) -> str:
    found = [
        results.values(name, "latency_ratio", batch=batch, folded=form, statistic=part)
        for part in ("median", "low", "high")
    ]
    if not all(len(values) for values in found):
        return ""
    return "{:.2f} ({:.2f} to {:.2f})".format(*(float(values.iloc[0]) for values in found))
