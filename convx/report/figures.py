"""The figures of a study, drawn from results/<study> alone. Every figure is one function; what has no data is
not drawn."""

import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from convx import config
from convx.report import style
from convx.report.comparison import comparison
from convx.report.forest import claims_forest
from convx.report.results import Results
from convx.report.words import known, scaled

FRONT = "Pareto front (of the means)"


def draw(folder: str | Path) -> list[str]:
    """Draw every figure of ``results/<study>`` into its figures/ folder as SVG and PNG; returns their names.

    Besides the figures here, a paper's folder may have ``figures.py`` with ``draw(results, out) -> list of
    names``. What an earlier version of the study had and this one has not is removed.
    """
    results = Results(Path(folder))
    out = results.folder / "figures"
    out.mkdir(parents=True, exist_ok=True)
    table = comparison(results)
    drawn = []
    for function in FIGURES:
        figure = function(results, table)
        if figure is not None:
            style.save(figure, out, function.__name__)
            drawn.append(function.__name__)
    drawn += paper_figures(results, out)
    for file in [*out.glob("*.svg"), *out.glob("*.png")]:
        if file.stem not in drawn:
            file.unlink()
    return drawn


def paper_figures(results: Results, out: Path) -> list[str]:
    """Draw the figures of every paper whose variants are in the study."""
    drawn = []
    for paper in sorted({config.declaration(results.study, name)["paper"] for name in results.variants}):
        if find_spec(f"convx.papers.{paper}.figures"):
            drawn += import_module(f"convx.papers.{paper}.figures").draw(results, out)
    return drawn


def _note(figure, results: Results, *sentences: str) -> None:
    """Write below a figure what qualifies its numbers."""
    reduced = f"Reduced study: {results.study['reduced']}." if results.study["reduced"] else ""
    if text := " ".join(filter(None, [*sentences, reduced])):
        style.note(figure, text)


def _rows(table: pd.DataFrame) -> np.ndarray:
    return np.arange(len(table))[::-1]


def _error(row, column: str) -> np.ndarray | None:
    """Return the distances to the interval's ends [2, 1] for matplotlib, or None where there is no finite
    interval."""
    low, high = row.get(f"{column}_low", math.nan), row.get(f"{column}_high", math.nan)
    if not (known(low) and known(high)):
        return None
    return np.clip([[row[column] - low], [high - row[column]]], 0, None)


def accuracy(results: Results, table: pd.DataFrame):
    """Top-1 of every variant: mean with its 95 % interval, the single runs as small marks."""
    if table["top1"].isna().all():
        return None
    figure, axes = plt.subplots(figsize=(7.5, 1.3 + 0.34 * len(table)))
    for place, (y, (_, row)) in enumerate(zip(_rows(table), table.iterrows())):
        if not known(row["top1"]):
            where = {
                "xycoords": ("axes fraction", "data"),
                "va": "center",
                "fontsize": 8,
                "color": style.SOFT,
            }
            axes.annotate(row["status"], (0.01, y), **where)
            continue
        axes.errorbar(
            row["top1"],
            y,
            xerr=_error(row, "top1"),
            capsize=3,
            markersize=6,
            linewidth=1.4,
            **style.look(place),
        )
        runs = results.values(row["variant"], "top1")
        if len(runs) > 1:
            axes.plot(runs, np.full(len(runs), y - 0.27), "|", color=style.SOFT, markersize=6)
    names = []
    for _, row in table.iterrows():
        part = 0 < row["seeds_done"] < row["seeds_planned"]
        names.append(row["variant"] + (f" ({row['seeds_done']} of {row['seeds_planned']} runs)" if part else ""))
    axes.set_yticks(_rows(table), names)
    axes.set_ylim(-0.7, len(table) - 0.4)
    axes.set_xlabel("top-1 on the test images (%)")
    several = "Accuracy: mean over seeds with its 95 % interval; ticks are single runs"
    one = "Accuracy: one run each, with the 95 % interval of its test images"
    style.title(figure, several if (table["seeds_done"] > 1).any() else one)
    axes.grid(axis="y", visible=False)
    others = [row["variant"] for _, row in table.iterrows() if "argmax" not in (row["top1_method"] or "argmax")]
    _note(figure, results, f"By neighbours, without training labels: {', '.join(others)}." if others else "")
    return figure


def corruption_heatmap(results: Results, table: pd.DataFrame):
    """Accuracy for every corruption, averaged over severities and seeds, with the numbers written in."""
    cells = results.runs[results.runs["metric"] == "corruption_accuracy"]
    if cells["value"].isna().all():
        return None
    grid = cells.assign(value=cells["value"].astype(float)).groupby(["variant", "corruption"])["value"].mean().unstack()
    order = [name for name in results.variants if name in grid.index]
    grid = grid.loc[order, grid.mean().sort_values(ascending=False, kind="stable").index]
    size = (max(7.0, 2.6 + 0.46 * grid.shape[1]), 2.0 + 0.32 * grid.shape[0])
    figure, axes = plt.subplots(figsize=size)
    values = grid.to_numpy()
    low, high = max(0.0, np.nanmin(values) - 3), min(100.0, np.nanmax(values) + 3)
    colours = plt.get_cmap("cividis").with_extremes(bad="white")
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        text = f"{value:.0f}" if np.isfinite(value) else "–"
        dark = np.isfinite(value) and image.norm(value) < 0.55
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(grid.shape[1]), [c.replace("_", " ") for c in grid.columns], rotation=45, ha="right")
    axes.set_yticks(range(grid.shape[0]), grid.index)
    axes.grid(visible=False)
    protocols = sorted(set(cells["protocol"].dropna()))
    made = "" if any(p.startswith("official") for p in protocols) else ", images regenerated"
    style.title(figure, f"Top-1 (%) under corruption: mean of severities and seeds ({', '.join(protocols)}{made})")
    figure.colorbar(image, ax=axes, label="top-1 (%)", shrink=0.85)
    _note(figure, results)
    return figure


def _scatter(table: pd.DataFrame, x: str, y: str, xlabel: str, ylabel: str, title: str, best: str | None):
    """Draw one mark a variant with its intervals in both directions.

    ``best``: the better x, "low" or "high", for the front of variants that no other one beats in both; None
    draws none. Returns the figure, or None where fewer than two variants have both numbers.
    """
    part = table[table[x].map(known) & table[y].map(known)]
    if len(part) < 2:
        return None
    labels = [*part["variant"], *([FRONT] if best is not None else [])]
    figure, axes = plt.subplots(figsize=style.with_legend(labels, 5.3, 4.3))
    for place, (_, row) in enumerate(table.iterrows()):
        if not (known(row[x]) and known(row[y])):
            continue
        looks = {"capsize": 2, "linewidth": 1, "markersize": 7, "linestyle": "none", **style.look(place)}
        axes.errorbar(row[x], row[y], xerr=_error(row, x), yerr=_error(row, y), label=row["variant"], **looks)
    if best is not None:
        front = pareto(part[x].to_numpy(), part[y].to_numpy(), best)
        where = "post" if best == "low" else "pre"
        axes.step(*zip(*front), where=where, color="#999999", linewidth=1, zorder=0, label=FRONT)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.margins(0.08)
    style.title(figure, title)
    style.legend(axes, len(labels))
    return figure


def pareto(x: np.ndarray, y: np.ndarray, best: str) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both (more y; less x for "low", more x for "high"), by
    rising x."""
    order = sorted(zip(x, y), key=lambda point: (point[0] if best == "low" else -point[0], -point[1]))
    front, highest = [], -math.inf
    for point in order:
        if point[1] > highest:
            highest = point[1]
            front.append((float(point[0]), float(point[1])))
    return sorted(front)


def clean_against_corrupted(results: Results, table: pd.DataFrame):
    """Corrupted against clean accuracy."""
    title = "Robustness: corrupted against clean accuracy, 95 % intervals"
    figure = _scatter(table, "top1", "corruption", "clean top-1 (%)", "corrupted top-1 (%)", title, "high")
    if figure:
        _note(figure, results)
    return figure


def accuracy_latency(results: Results, table: pd.DataFrame):
    """Accuracy against latency relative to the baseline: what was measured side by side in one process."""
    batch = ", ".join(sorted({f"batch {int(b)}" for b in table["latency_batch"].dropna()}))
    title = f"Accuracy against latency ({batch}), 95 % intervals"
    xlabel = f"latency / latency of {results.study['baseline']}, measured by turns in one process"
    figure = _scatter(table, "latency_ratio", "top1", xlabel, "top-1 (%)", title, "low")
    if figure:
        _note(figure, results)
    return figure


def accuracy_energy(results: Results, table: pd.DataFrame):
    """Accuracy against the energy of inference; an estimate says so and gets no front, for it is never
    ranked."""
    estimated = table["energy_method"].str.contains("estimate").any()
    factor, prefix = scaled(table["inference_kwh"])
    scaled_table = table.assign(energy=table["inference_kwh"] * factor)
    xlabel = f"inference energy ({prefix}Wh / 1000 images{', an estimate' if estimated else ''})"
    title = "Accuracy against energy of inference" + (" (an estimate, not for ranking)" if estimated else "")
    figure = _scatter(scaled_table, "energy", "top1", xlabel, "top-1 (%)", title, None if estimated else "low")
    if figure:
        _note(figure, results)
    return figure


def training_curves(results: Results, table: pd.DataFrame):
    """Validation accuracy (training accuracy where nothing is set aside) and training loss against epochs,
    mean over seeds."""
    found = {}
    for place, name in enumerate(results.variants):
        histories = [h for s in results.seeds(name) if (h := results.history(name, s)) is not None and "epoch" in h]
        if any(len(h) > 1 for h in histories):
            found[place, name] = pd.concat(histories)
    if not found:
        return None
    validated = any("validation_top1" in frame for frame in found.values())
    metric = "validation_top1" if validated else "train_top1"
    figure, (left, right) = plt.subplots(1, 2, figsize=style.with_legend([name for _, name in found], 8.3, 3.8))
    for (place, name), frame in found.items():
        for axes, column in ((left, metric), (right, "train_loss")):
            if column not in frame or frame[column].isna().all():
                axes.plot([], [], label=name, **style.line(place))  # it keeps its place in the legend
                continue
            groups = frame.dropna(subset=column).groupby("epoch")[column]
            mean = groups.mean()
            axes.plot(mean.index, mean, label=name, **style.line(place))
            axes.fill_between(
                mean.index,
                groups.min(),
                groups.max(),
                color=style.line(place)["color"],
                alpha=0.12,
                linewidth=0,
            )
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    left.set_ylabel("validation top-1 (%)" if validated else "training top-1 (%)")
    right.set_ylabel("training loss")
    style.title(figure, "While training: mean over seeds, shaded from the lowest to the highest seed")
    style.legend(right, len(found))
    later = any(config.variant_settings(results.study, name)["start_from"] for _, name in found)
    _note(figure, results, "Variants that start from another one begin at its end." if later else "")
    return figure


FIGURES = (
    claims_forest,
    accuracy,
    corruption_heatmap,
    clean_against_corrupted,
    accuracy_latency,
    accuracy_energy,
    training_curves,
)
