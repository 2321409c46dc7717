"""The figures of a study, drawn from results/<study> alone. Every figure is one function; what has no data is not drawn."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from convx.report import style
from convx.report.results import Results
from convx.report.tables import comparison, replication

DECIDED = ("supported", "contradicted", "no relevant difference", "replicated", "higher", "lower", "inconclusive")


def draw(folder: str | Path) -> list[str]:
    """Draw every figure of ``results/<study>`` into its figures/ folder as SVG and PNG; returns their names.

    Besides the figures here, a paper's folder may have ``figures.py`` with ``draw(results, out) -> list of names``.
    """
    results = Results(Path(folder))
    out = results.folder / "figures"
    out.mkdir(parents=True, exist_ok=True)
    table = comparison(results)
    drawn = []
    for function in (accuracy, corruption_heatmap, clean_against_corrupted, accuracy_latency, accuracy_energy, training_curves, claims_forest):
        figure = function(results, table)
        if figure is not None:
            style.save(figure, out, function.__name__)
            drawn.append(function.__name__)
    return drawn + paper_figures(results, out)


def paper_figures(results: Results, out: Path) -> list[str]:
    """Draw the figures of every paper whose variants are in the study."""
    from importlib import import_module
    from importlib.util import find_spec

    from convx import config

    drawn = []
    for paper in sorted({config.declared(name, "variants")["paper"] for name in results.variants}):
        if find_spec(f"convx.papers.{paper}.figures"):
            drawn += import_module(f"convx.papers.{paper}.figures").draw(results, out)
    return drawn


def _note(figure, results: Results) -> None:
    """Write below a figure what qualifies its numbers."""
    if results.study["reduced"]:
        figure.supxlabel(f"Reduced study: {results.study['reduced']}", fontsize=7, color="#555555", x=0.01, ha="left")


def _rows(table: pd.DataFrame) -> np.ndarray:
    return np.arange(len(table))[::-1]


def _errors(table: pd.DataFrame, column: str) -> np.ndarray:
    """Return the distances to the interval's ends [2, rows] for matplotlib; zero where there is no interval."""
    ends = np.stack([table[column] - table[f"{column}_low"], table[f"{column}_high"] - table[column]])
    return np.nan_to_num(np.clip(ends.astype(float), 0, None))


def accuracy(results: Results, table: pd.DataFrame):
    """Top-1 of every variant: mean with its 95 % interval, the single runs as small marks."""
    if table["top1"].isna().all():
        return None
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.34 * len(table)))
    for place, (y, (_, row)) in enumerate(zip(_rows(table), table.iterrows())):
        if math.isnan(row["top1"]):
            axes.annotate(row["status"], (0.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, color="#555555")
            continue
        error = _errors(table.iloc[[place]], "top1")
        axes.errorbar(row["top1"], y, xerr=error, capsize=3, markersize=6, linewidth=1.4, **style.look(place))
        runs = results.values(row["variant"], "top1")
        axes.plot(runs, np.full(len(runs), y - 0.22), "|", color="#555555", markersize=6)
    axes.set_yticks(_rows(table), table["variant"])
    axes.set_ylim(-0.7, len(table) - 0.4)
    axes.set_xlabel("top-1 on the test images (%)")
    axes.set_title("Accuracy: mean and 95 % interval; ticks are single runs")
    axes.grid(axis="y", visible=False)
    _note(figure, results)
    return figure


def corruption_heatmap(results: Results, table: pd.DataFrame):
    """Accuracy for every corruption, averaged over severities and seeds, with the numbers written in."""
    frame = results.runs
    cells = frame[frame["metric"] == "corruption_accuracy"]
    if cells.empty:
        return None
    grid = cells.groupby(["variant", "corruption"])["value"].mean().unstack()
    order = [name for name in results.variants if name in grid.index]
    grid = grid.loc[order, grid.mean().sort_values(ascending=False).index]
    figure, axes = plt.subplots(figsize=(1.9 + 0.52 * grid.shape[1], 1.7 + 0.36 * grid.shape[0]))
    image = axes.imshow(grid.to_numpy(), cmap="cividis", vmin=max(0, np.nanmin(grid) - 5), vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(grid.to_numpy()):
        dark = image.norm(value) < 0.55
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(grid.shape[1]), [c.replace("_", " ") for c in grid.columns], rotation=45, ha="right")
    axes.set_yticks(range(grid.shape[0]), grid.index)
    axes.grid(visible=False)
    protocol = results.study["evaluate"]["corruption"]["protocol"]
    axes.set_title(f"Top-1 (%) under corruption, mean of severities and seeds ({protocol}" + (")" if protocol == "official" else ", regenerated)"))
    figure.colorbar(image, ax=axes, label="top-1 (%)", shrink=0.85)
    _note(figure, results)
    return figure


def _scatter(results, table, x, y, xlabel, ylabel, title, xlog=False, diagonal=False):
    """Draw one mark a variant with its intervals in both directions, and the Pareto front where less x and more y is better."""
    part = table[table[x].notna() & table[y].notna()]
    if part.empty:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.3))
    for place, (index, row) in enumerate(table.iterrows()):
        if index not in part.index:
            continue
        one = table.loc[[index]]
        xerr = _errors(one, x) if f"{x}_low" in table else None
        yerr = _errors(one, y) if f"{y}_low" in table else None
        axes.errorbar(row[x], row[y], xerr=xerr, yerr=yerr, capsize=2, linewidth=1, markersize=7, label=row["variant"], **style.look(place))
    if diagonal:
        low = min(part[x].min(), part[y].min()) - 1
        axes.plot([low, 100], [low, 100], color="#999999", linestyle=":", linewidth=1, label="equal")
    else:
        best, front = -math.inf, []
        for _, row in part.sort_values([x, y], ascending=[True, False]).iterrows():
            if row[y] > best:
                best = row[y]
                front.append((row[x], row[y]))
        axes.step(*zip(*front), where="post", color="#999999", linewidth=1, zorder=0, label="Pareto front")
    if xlog:
        axes.set_xscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    _note(figure, results)
    return figure


def clean_against_corrupted(results: Results, table: pd.DataFrame):
    """Corrupted against clean accuracy."""
    title = "Robustness: corrupted against clean accuracy, 95 % intervals"
    return _scatter(results, table, "top1", "corruption", "clean top-1 (%)", "corrupted top-1 (%)", title)


def accuracy_latency(results: Results, table: pd.DataFrame):
    """Accuracy against latency at batch 1."""
    title = "Accuracy against latency (median, batch 1), 95 % intervals"
    return _scatter(results, table, "latency_ms", "top1", "latency (ms)", "top-1 (%)", title)


def accuracy_energy(results: Results, table: pd.DataFrame):
    """Accuracy against the energy of inference; estimates say so in the axis label and have no Pareto claim."""
    methods = sorted({m for m in table["energy_method"] if m})
    estimated = any("estimate" in m for m in methods)
    label = "inference energy (kWh / 1000 images" + (", an estimate: not for ranking)" if estimated else ")")
    return _scatter(results, table, "inference_kwh", "top1", label, "top-1 (%)", "Accuracy against energy of inference")


def training_curves(results: Results, table: pd.DataFrame):
    """Validation accuracy (training accuracy where nothing is set aside) and training loss against epochs, mean over seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    drawn = False
    for place, name in enumerate(results.variants):
        histories = [h for s in results.seeds(name) if (h := results.history(name, s)) is not None and "epoch" in h and len(h) > 1]
        if not histories:
            continue
        drawn = True
        both = pd.concat(histories)
        metric = "validation_top1" if "validation_top1" in both else "train_top1"
        for axes, column in ((left, metric), (right, "train_loss")):
            if column not in both:
                continue
            groups = both.groupby("epoch")[column]
            mean = groups.mean().dropna()
            axes.plot(mean.index, mean, label=name, linewidth=1.5, **style.line(place))
            if len(histories) > 1:
                low, high = groups.min().loc[mean.index], groups.max().loc[mean.index]
                axes.fill_between(mean.index, low, high, color=style.line(place)["color"], alpha=0.12, linewidth=0)
        left.set_ylabel("validation top-1 (%)" if metric == "validation_top1" else "training top-1 (%)")
    if not drawn:
        plt.close(figure)
        return None
    left.set_xlabel("epoch")
    right.set_xlabel("epoch")
    right.set_ylabel("training loss")
    left.set_title("Accuracy while training: mean, range of seeds")
    right.set_title("Training loss")
    right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    _note(figure, results)
    return figure


def claims_forest(results: Results, table: pd.DataFrame):
    """Differences with 95 % intervals of every claim that the study could measure, with the paper's value and the margin.

    Claims in percentage points only, so that one axis serves; the verdict is written out.
    """
    frame = replication(results)
    part = frame[frame["verdict"].isin(DECIDED) & frame["delta"].notna() & frame["unit"].isin(["%", "pp"])]
    if part.empty:
        return None
    part = part.sort_values(["role", "claim_id"], ascending=[False, True])
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.42 * len(part)))
    for y, (_, row) in zip(_rows(part), part.iterrows()):
        primary = row["role"] == "primary"
        error = [[row["delta"] - row["delta_ci_low"]], [row["delta_ci_high"] - row["delta"]]]
        axes.errorbar(row["delta"], y, xerr=error, capsize=3, marker="o", markersize=6, color="black", markerfacecolor="black" if primary else "white")
        if row["claim_kind"] != "absolute" and not pd.isna(row["paper_value"]):
            axes.plot(row["paper_value"], y, marker="x", color="#D55E00", markersize=7, markeredgewidth=1.8)
        if not pd.isna(row["margin"]):
            axes.fill_betweenx([y - 0.3, y + 0.3], -row["margin"], row["margin"], color="#DDDDDD", zorder=0, linewidth=0)
        axes.annotate(row["verdict"], (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.axvline(0, color="#777777", linewidth=0.8)
    axes.set_yticks(_rows(part), part["claim_id"])
    axes.set_ylim(-0.8, len(part) - 0.2)
    axes.set_xlabel("difference (percentage points); grey band: margin of no relevance; ×: the paper's difference; filled: primary claim")
    axes.set_title("Claims: our differences with 95 % intervals")
    axes.grid(axis="y", visible=False)
    _note(figure, results)
    return figure
