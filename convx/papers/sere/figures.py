"""Figures of the self-supervised studies: neighbours over epochs, relations between views, the collapse watch, attention.

Drawn from metrics files and histories alone; a figure without data is not drawn.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from convx import config
from convx.evaluate.payload import unpack
from convx.report import style

SHOWN = 4  # variants in the figure of attention, the first of the study
RELATIONS = {"spatial": "spatial relation, symmetric KL (nats)", "channel": "channel relation, symmetric KL (nats)"}


def draw(results, out: str | Path) -> list[str]:
    """Draw what a study holds of this paper into ``out`` as SVG and PNG; return the names of the figures.

    ``results`` is a :class:`convx.report.results.Results`.
    """
    names = [name for name in results.variants if config.declaration(results.study, name)["paper"] == "sere"]
    drawn = []
    for function in (neighbours, relations, relation_losses, collapse_watch, attention):
        if (figure := function(results, names)) is not None:
            if results.study["reduced"]:
                style.note(figure, f"Reduced study: {results.study['reduced']}.")
            style.save(figure, out, f"sere_{function.__name__}")
            drawn.append(f"sere_{function.__name__}")
    return drawn


def curve(results, name: str, column: str) -> pd.DataFrame | None:
    """Return a column of the history, epochs x seeds, or None where no seed has it."""
    seeds = {}
    for seed in results.seeds(name):
        history = results.history(name, seed)
        if history is not None and column in history and history[column].notna().any():
            seeds[seed] = history.set_index("epoch")[column]
    return pd.DataFrame(seeds) if seeds else None


def _curves(axes, results, names: list[str], column: str) -> int:
    """Plot a column of the history of each variant: mean over seeds and their range; return how many have it."""
    found = 0
    for name in names:
        if (frame := curve(results, name, column)) is None:
            continue
        found += 1
        look = style.line(results.variants.index(name))
        axes.plot(frame.index, frame.mean(axis=1), label=name, **look)
        if frame.shape[1] > 1:
            low, high = frame.min(axis=1), frame.max(axis=1)
            axes.fill_between(frame.index, low, high, color=look["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return found


def neighbours(results, names: list[str]):
    """Top-1 of the nearest neighbours on the validation images, epoch by epoch; epoch 0 is the encoder before training."""
    figure, axes = plt.subplots(figsize=style.with_legend(names, 5.6, 3.8))
    found = _curves(axes, results, names, "knn_top1")
    if not found:
        plt.close(figure)
        return None
    axes.set_ylabel("validation top-1 of the neighbours (%)")
    style.title(figure, "Neighbours in the frozen features while training: mean over seeds, range of seeds")
    style.legend(axes, found)
    return figure


def _relation_rows(results, name: str, relation: str, pair: str, encoder: str = "trained") -> pd.Series:
    where = {"relation": relation, "pair": pair, "encoder": encoder}
    return results.values(name, "relation_divergence", **where)


def relations(results, names: list[str]):
    """How much relations differ between two views of an image, beside views of different images: per variant and relation."""
    names = [name for name in names if len(_relation_rows(results, name, "spatial", "matched"))]
    if not names:
        return None
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 1.7 + 0.42 * len(names)), sharey=True)
    rows = np.arange(len(names))[::-1]
    pairs = {"matched": "two views of an image", "unmatched": "views of different images"}
    for axes, quantity in zip(panels, (*RELATIONS, "agreement")):
        for pair, label in pairs.items():
            for y, name in zip(rows, names):
                for encoder in ("trained", "untrained"):
                    if quantity == "agreement":
                        values = results.values(name, "relation_agreement", pair=pair, encoder=encoder)
                    else:
                        values = _relation_rows(results, name, quantity, pair, encoder)
                    if not len(values):
                        continue
                    look = style.look(results.variants.index(name))
                    filled = pair == "matched"
                    marker = {
                        "marker": "o" if filled else "s",
                        "color": look["color"] if encoder == "trained" else "#999999",
                    }
                    axes.plot(values.mean(), y - (0.22 if encoder == "untrained" else 0), markersize=6, linestyle="none",
                              markerfacecolor=marker["color"] if filled else "white", **marker)  # fmt: skip
                    axes.plot(values, np.full(len(values), y - (0.36 if encoder == "untrained" else 0.14)), "|",
                              color=style.SOFT, markersize=4)  # fmt: skip
            face = "#444444" if pair == "matched" else "white"
            axes.plot([], [], "o" if pair == "matched" else "s", color="#444444", markerfacecolor=face, label=label)
        axes.plot([], [], "o", color="#999999", label="the encoder before training")
        axes.set_xlabel("same strongest relation (%)" if quantity == "agreement" else RELATIONS[quantity])
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(rows, names)
    panels[0].set_ylim(-0.7, len(names) - 0.5)
    style.title(figure, "Relations of aligned views on test images: mean over seeds, ticks are single runs")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return figure


def _panels(results, names: list[str], columns: dict[str, str], title: str):
    names = [name for name in names if any(curve(results, name, column) is not None for column in columns)]
    if not names:
        return None
    figure, panels = plt.subplots(
        1, len(columns), figsize=style.with_legend(names, 3.4 * len(columns), 3.5), squeeze=False
    )
    for axes, (column, label) in zip(panels[0], columns.items()):
        _curves(axes, results, names, column)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    for name in names:  # a panel may lack a variant that another one shows
        panels[0, -1].plot([], [], **style.line(results.variants.index(name)), label=name)
    handles, labels = panels[0, -1].get_legend_handles_labels()
    kept = dict(zip(labels, handles))
    panels[0, -1].legend(
        [kept[name] for name in names], names, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8
    )
    style.title(figure, title)
    return figure


def relation_losses(results, names: list[str]):
    """The relation losses above their least value, the entropy of the teacher's rows: KL, epoch by epoch."""
    columns = {"train_spatial_kl": "spatial KL (nats)", "train_channel_kl": "channel KL (nats)"}
    return _panels(
        results, names, columns, "Relation losses less the teacher's entropy: mean over seeds, range of seeds"
    )


def collapse_watch(results, names: list[str]):
    """What shows a collapse: the teacher's entropy, what its output says about the image, the length of the centre."""
    columns = {
        "train_teacher_entropy": "teacher's entropy (nats)",
        "train_teacher_information": "information on the image (nats)",
        "train_centre_norm": "length of the centre",
    }
    return _panels(results, names, columns, "Watch for collapse (information near 0): mean over seeds, range of seeds")


def attention(results, names: list[str]):
    """What the class token of the last block attends to: a few test images, mean over heads, first seed."""
    found = {}
    for record in results.records:
        kept, name = record.get("arrays", {}), record["run"]["variant"]
        if name in names and "attention" in kept and "pictures" in kept and name not in found:
            found[name] = unpack(kept["pictures"]), unpack(kept["attention"])
    found = dict(list(found.items())[:SHOWN])
    if not found:
        return None
    columns = len(next(iter(found.values()))[0])
    size = 1.35 * columns + 1.9, 1.42 * (len(found) + 1) + 0.7
    figure, grid = plt.subplots(len(found) + 1, columns, figsize=size, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
    pictures = next(iter(found.values()))[0]
    for axes, picture in zip(grid[0], pictures):
        axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1)
    for line, (_, maps) in zip(grid[1:], found.values()):
        top = maps.mean(1).max()  # one scale a variant
        for axes, map_hw in zip(line, maps.mean(1)):
            axes.imshow(map_hw, cmap="Greys_r", vmin=0, vmax=top)
    for axes, text in zip(grid[:, 0], ["image", *found]):
        axes.annotate(
            text.replace("_", "\n", 1), (-0.08, 0.5), xycoords="axes fraction", ha="right", va="center", fontsize=8
        )
    style.title(figure, "Attention of the class token: brighter is more, one scale a row")
    return figure
