"""The figures of the random-filters study (arXiv 2301.11360, figures 4 to 11, and two of our own), each drawn when its data exist.

Every figure is one function of the results and the networks of the grid; the paper's axes, our values. What the paper does
not have says "own" in its title.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from convx import config, statistics
from convx.papers.randconv import pictures
from convx.papers.randconv.networks import Network, beside_baseline, networks, rank_thresholds
from convx.report import style
from convx.report.comparison import interval
from convx.report.results import Results

FROZEN, LEARNED, PLAIN, BARE = (style.look(place) for place in (4, 2, 0, 7))  # as in every figure here
WORDS = {True: "frozen filters, learned combinations", False: "all learned, with combinations"}
FGSM = {"metric": "fgsm_accuracy", "epsilon": "1/255"}

Point = tuple[float, float, float]  # estimate and the ends of its 95 % interval


def draw(results: Results, out: Path) -> list[str]:
    """Draw every figure that the study has data for into ``out``; returns their names."""
    grid = networks(results.study)
    drawn = []
    for function in FIGURES:
        figure = function(results, grid)
        if figure is not None:
            if results.study["reduced"] and function is not random_combinations_law:
                style.note(figure, f"Reduced study: {results.study['reduced']}.")
            name = f"randconv_{function.__name__}"
            style.save(figure, out, name)
            drawn.append(name)
    return drawn


# ------------------------------------------------------------------------------------------------------------------ points


def point(results: Results, variant: str, metric: str, **conditions) -> Point | None:
    """Return the mean over seeds and its 95 % interval: that of the tables for accuracies, else Student's t; NaN for no bound."""
    if metric in ("top1", "fgsm_accuracy"):
        found = interval(results, variant, metric, **conditions)
        return found and (found.estimate, found.low, found.high)
    values = results.values(variant, metric, **conditions)
    if not len(values):
        return None
    found = statistics.t_interval(values.to_numpy())
    known = math.isfinite(found.low)
    return float(values.mean()), *((found.low, found.high) if known else (math.nan, math.nan))


def difference(results: Results, a: str, b: str) -> Point | None:
    """Return top-1 of ``a`` minus ``b`` with Welch's 95 % interval; NaN bounds for a single seed."""
    first, second = results.values(a, "top1"), results.values(b, "top1")
    if not len(first) or not len(second):
        return None
    if min(len(first), len(second)) < 2:
        return float(first.mean() - second.mean()), math.nan, math.nan
    found = statistics.welch_interval(first.to_numpy(), second.to_numpy())
    return found.estimate, found.low, found.high


def errors(axes, x: Iterable[float], points: Iterable[Point], look: dict, label: str, joined: str = "-") -> None:
    """Draw points with their intervals, joined by a line."""
    values = np.array(list(points), dtype=float)
    ends = np.nan_to_num(np.abs(values[:, 1:] - values[:, :1])).T
    axes.errorbar(
        list(x), values[:, 0], yerr=ends, capsize=3, markersize=6, linewidth=1.4, linestyle=joined, label=label, **look
    )


def series(
    nets: Iterable[Network], measure: Callable[[Network], Point | None], frozen: bool
) -> list[tuple[Network, Point]]:
    """Return (network, point) of the networks with combinations, by expansion, where the value is known."""
    mine = sorted((n for n in nets if n.expansion and n.frozen == frozen), key=lambda n: n.expansion)
    return [(n, found) for n in mine if (found := measure(n))]


def _expansion_axis(axes, expansions: Iterable[int]) -> None:
    ticks = sorted(set(expansions))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(e) for e in ticks])
    axes.minorticks_off()
    axes.set_xlabel("expansion E (random filters per output channel)")


def _band(axes, found: Point | None, look: dict, label: str) -> None:
    """Draw a network without combinations as a line across, its interval as a band."""
    if found is None:
        return
    axes.axhline(found[0], color=look["color"], linestyle="--", linewidth=1.2, label=label)
    if math.isfinite(found[1]):
        axes.axhspan(found[1], found[2], color=look["color"], alpha=0.12, linewidth=0)


def _thresholds(axes, results: Results, nets: list[Network]) -> None:
    """Mark the expansions from which random filters span every kernel of a kind of layer."""
    from convx.data.sets import SETS

    channels = SETS[results.study["data"]["name"]].channels
    marks = defaultdict(list)
    for name, expansion in rank_thresholds(nets[0].kernel, channels, nets[0].width).items():
        marks[expansion].append(name)
    low, high = axes.get_xlim()
    for expansion, names in marks.items():
        if low <= expansion <= high:
            axes.axvline(expansion, color=style.SOFT, linestyle=":", linewidth=1)
            place = {"xycoords": ("data", "axes fraction"), "xytext": (3, 3), "textcoords": "offset points"}
            label = f"spans all kernels:\n{', '.join(names)}"
            axes.annotate(label, (expansion, 0), rotation=90, fontsize=6.5, color=style.SOFT, va="bottom", **place)


def _against_expansion(
    results: Results, nets: list[Network], measure, axes, thresholds: bool = False, baselines: bool = True
) -> bool:
    """Draw frozen and learned combinations against E with the networks that have none; False where no curve has two points."""
    curves = {frozen: series(nets, measure, frozen) for frozen in (True, False)}
    if max(map(len, curves.values())) < 2:
        return False
    for frozen, found in curves.items():
        if found:
            errors(
                axes,
                [n.expansion for n, _ in found],
                [p for _, p in found],
                FROZEN if frozen else LEARNED,
                WORDS[frozen],
            )
    for net in nets if baselines else ():
        if not net.expansion:
            look, label = (BARE, "frozen filters, no combinations") if net.frozen else (PLAIN, "plain network, learned")
            _band(axes, measure(net), look, label)
    _expansion_axis(axes, [n.expansion for found in curves.values() for n, _ in found])
    if thresholds:
        _thresholds(axes, results, nets)
    return True


def _expansion_figure(results, grid, metric: dict, ylabel: str, title: str, thresholds: bool = False):
    nets = beside_baseline(results.study, grid)
    figure, axes = plt.subplots(figsize=(7.6, 4.2))
    if not _against_expansion(results, nets, lambda n: point(results, n.variant, **metric), axes, thresholds):
        plt.close(figure)
        return None
    axes.set_ylabel(ylabel)
    style.title(figure, title)
    style.legend(axes, 4)
    return figure


# ----------------------------------------------------------------------------------------------------------------- figures


def accuracy_expansion(results: Results, grid: list[Network]):
    """Top-1 against the expansion (figure 4a), with the expansions from which random filters span every kernel."""
    title = "Accuracy against expansion: mean and 95 % interval"
    return _expansion_figure(results, grid, {"metric": "top1"}, "top-1 (%)", title, thresholds=True)


def fgsm_expansion(results: Results, grid: list[Network]):
    """Accuracy under FGSM against the expansion (figure 4c)."""
    title = "Robustness against expansion: FGSM, l-infinity 1/255, mean and 95 % interval"
    return _expansion_figure(results, grid, FGSM, "top-1 under FGSM (%)", title)


def gap_to_training(results: Results, grid: list[Network]):
    """Training minus test accuracy against the expansion (own: the paper speaks of regularisation and shows no such curve)."""
    title = "Top-1 on training images without augmentation minus test images (own figure)"
    return _expansion_figure(results, grid, {"metric": "generalisation_gap"}, "training - test (pp)", title)


def accuracy_parameters(results: Results, grid: list[Network]):
    """Top-1 against the number of learned parameters (figure 4b)."""
    nets = beside_baseline(results.study, grid)
    learned = {n.variant: results.values(n.variant, "trainable_parameters") for n in nets}
    nets = [n for n in nets if len(learned[n.variant])]
    figure, axes = plt.subplots(figsize=(7.6, 4.2))
    drawn = 0
    for frozen, look in ((True, FROZEN), (False, LEARNED)):
        found = series(nets, lambda n: point(results, n.variant, "top1"), frozen)
        if found:
            errors(axes, [learned[n.variant].mean() for n, _ in found], [p for _, p in found], look, WORDS[frozen])
            for net, (value, *_) in found if frozen else ():
                place = {"xytext": (5, -9), "textcoords": "offset points", "fontsize": 7, "color": style.SOFT}
                axes.annotate(f"x{net.expansion}", (learned[net.variant].mean(), value), **place)
        drawn += len(found)
    for net in nets:
        if not net.expansion and (found := point(results, net.variant, "top1")):
            look, label = (BARE, "frozen filters, no combinations") if net.frozen else (PLAIN, "plain network, learned")
            errors(axes, [learned[net.variant].mean()], [found], look, label, joined="none")
    if drawn < 2:
        plt.close(figure)
        return None
    axes.set(xscale="log", xlabel="learned parameters", ylabel="top-1 (%)")
    style.title(figure, "Accuracy against learned parameters: mean and 95 % interval")
    style.legend(axes, 4)
    return figure


def entropy_expansion(results: Results, grid: list[Network]):
    """Variance entropy of the combined filters of the first and the last layer against the expansion (figures 5, 10 and 11)."""
    nets = beside_baseline(results.study, grid)
    normalised = bool(nets) and nets[0].kernel == 3
    metric = "filter_variance_entropy" if normalised else "filter_variance_entropy_raw"
    figure, both = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    drawn = [
        _against_expansion(results, nets, lambda n, layer=layer: point(results, n.variant, metric, layer=layer), axes)
        for axes, layer in zip(both, ("first", "last"))
    ]
    if not all(drawn):
        plt.close(figure)
        return None
    for axes, layer in zip(both, ("first", "last")):
        axes.set_title(f"{layer} layer")
    both[0].set_ylabel("filter variance entropy" + (" / that of random filters" if normalised else ", log10"))
    style.title(
        figure,
        "Variance entropy of the combined filters: 0 is one repeated pattern" + (", 1 is random" if normalised else ""),
    )
    style.legend(both[1], 4)
    return figure


def gap_kernel_size(results: Results, grid: list[Network]):
    """Learned minus frozen against E, a line for each kernel size (figure 8a), and against c_out E / (c_in k^2) (own)."""
    baseline = beside_baseline(results.study, grid)
    if not baseline:
        return None
    same = [
        n
        for n in grid
        if (n.depth, n.width, n.lr) == (baseline[0].depth, baseline[0].width, baseline[0].lr) and n.expansion
    ]
    learned = {(n.kernel, n.expansion): n for n in same if not n.frozen}
    lines = defaultdict(list)
    for net in sorted((n for n in same if n.frozen), key=lambda n: (n.kernel, n.expansion)):
        other = learned.get((net.kernel, net.expansion))
        if other and (found := difference(results, other.variant, net.variant)):
            lines[net.kernel].append((net, found))
    lines = {kernel: found for kernel, found in lines.items() if len(found) > 1}
    if not lines:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for place, (kernel, found) in enumerate(lines.items()):
        for axes, x in ((left, [n.expansion for n, _ in found]), (right, [n.span for n, _ in found])):
            errors(axes, x, [p for _, p in found], style.look(place), f"k = {kernel}")
    for axes in (left, right):
        axes.axhline(0, color=style.SOFT, linewidth=0.8)
    _expansion_axis(left, [n.expansion for found in lines.values() for n, _ in found])
    right.set(xscale="log", xlabel="c_out E / (c_in k²) of the layers of equal width")
    right.axvline(1, color=style.SOFT, linestyle=":", linewidth=1)
    left.set_ylabel("learned - frozen, top-1 (pp)")
    left.set_title("by expansion (as in the paper)")
    right.set_title("own prediction: the lines fall together; from 1 on filters span all")
    style.title(figure, "What frozen filters cost under linear combinations, by kernel size: mean and 95 % interval")
    style.legend(right, len(lines))
    return figure


def spatial_variance(results: Results, grid: list[Network]):
    """Variance over all combined filters at each place of the kernel, learned against frozen, by kernel size (figure 8b)."""
    figure = pictures.spatial_variance(results.study, results.records, grid)
    if figure:
        style.title(
            figure, "Variance of the combined filters at each place of the kernel; flat is that of random filters"
        )
    return figure


def first_layer_filters(results: Results, grid: list[Network]):
    """Combined filters of the first layer at the largest kernel size: plain, then frozen by expansion."""
    figure = pictures.first_layer_filters(results.study, results.records, grid)
    if figure:
        style.title(
            figure, "Combined filters of the first layer (first input channel, first seed; each to its own scale)"
        )
    return figure


def accuracy_width(results: Results, grid: list[Network]):
    """Top-1 against the width of the network at the smallest common expansion, frozen and learned (figure 6a)."""
    start = beside_baseline(results.study, grid)
    same = [
        n
        for n in grid
        if start and n.expansion == 1 and (n.depth, n.kernel, n.lr) == (start[0].depth, start[0].kernel, start[0].lr)
    ]
    figure, axes = plt.subplots(figsize=(7.6, 4))
    widths = set()
    for frozen, look in ((True, FROZEN), (False, LEARNED)):
        mine = sorted((n for n in same if n.frozen == frozen), key=lambda n: n.width)
        found = [(n, p) for n in mine if (p := point(results, n.variant, "top1"))]
        if found:
            errors(axes, [n.width for n, _ in found], [p for _, p in found], look, WORDS[frozen])
            widths |= {n.width for n, _ in found}
    if len(widths) < 2:
        plt.close(figure)
        return None
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(widths), [str(w) for w in sorted(widths)])
    axes.minorticks_off()
    axes.set(xlabel="width W (channels of the first stage)", ylabel="top-1 (%)")
    style.title(figure, "Accuracy against width at E = 1: mean and 95 % interval")
    style.legend(axes, 2)
    return figure


def accuracy_stored(results: Results, grid: list[Network]):
    """Top-1 against the bytes of a checkpoint, which holds the seed of a frozen bank and not the bank (own): also other banks."""
    nets = beside_baseline(results.study, grid)
    size = {name: results.values(name, "stored_bytes").mean() / 1000 for name in results.variants}
    figure, axes = plt.subplots(figsize=(7.6, 4.4))
    drawn = 0
    for frozen, look in ((True, FROZEN), (False, LEARNED)):
        found = [
            (n, p) for n, p in series(nets, lambda n: point(results, n.variant, "top1"), frozen) if size[n.variant] > 0
        ]
        if found:
            errors(axes, [size[n.variant] for n, _ in found], [p for _, p in found], look, WORDS[frozen])
        drawn += len(found)
    plain = {n.variant: (BARE if n.frozen else PLAIN) for n in nets if not n.expansion}
    banks = {name: style.look(place + 11) for place, name in enumerate(_other_banks(results))}
    for name, look in (plain | banks).items():
        if size[name] > 0 and (found := point(results, name, "top1")):
            errors(axes, [size[name]], [found], look, name, joined="none")
    if drawn < 2:
        plt.close(figure)
        return None
    axes.set(xscale="log", xlabel="checkpoint (kB); a frozen bank is stored as its seed", ylabel="top-1 (%)")
    style.title(figure, "Accuracy against stored bytes (own figure): mean and 95 % interval")
    style.legend(axes, len(plain | banks) + 2)
    return figure


def _other_banks(results: Results) -> list[str]:
    """Return the variants on the study's host whose combinations are of other filters than the paper's."""
    settings = {name: config.variant_settings(results.study, name) for name in results.variants}
    host = settings[results.study["baseline"]]["model"]
    banks = {name: {step.get("bank", "iid_uniform") for step in s["surgery"]} for name, s in settings.items()}
    return [name for name in settings if settings[name]["model"] == host and banks[name] - {"iid_uniform"}]


def learning_rates(results: Results, grid: list[Network]):
    """Validation accuracy against the learning rate (own: a combined kernel's step grows with E)."""
    lines = defaultdict(list)
    for net in sorted(grid, key=lambda n: n.lr):
        if found := point(results, net.variant, "final_validation_top1", split="validation"):
            lines[net.depth, net.width, net.kernel, net.expansion, net.frozen].append((net, found))
    lines = {key: found for key, found in lines.items() if len({n.lr for n, _ in found}) > 1}
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(7.6, 4))
    for place, found in enumerate(lines.values()):
        label = min((n.variant for n, _ in found), key=len)
        errors(axes, [n.lr for n, _ in found], [p for _, p in found], style.look(place), label)
    axes.set(xscale="log", xlabel="learning rate", ylabel="top-1 on validation images (%)")
    style.title(figure, "Learning rates, chosen on images set aside from training (own figure): mean and 95 % interval")
    style.legend(axes, len(lines))
    return figure


def random_combinations_law(results: Results, grid: list[Network]):
    """How near combinations of random filters come to any kernel: predicted and measured, for 16 to 16 channels (own)."""
    if not any(n.expansion for n in grid):
        return None
    from convx.papers.randconv.kernels import law, plot_law

    figure, axes = plt.subplots(figsize=(6.4, 4))
    plot_law(axes, law())
    style.title(figure, "Fit of random 3x3 kernels by random filters (own, no training)")
    return figure


FIGURES = (
    accuracy_expansion,
    accuracy_parameters,
    fgsm_expansion,
    entropy_expansion,
    gap_kernel_size,
    spatial_variance,
    first_layer_filters,
    accuracy_width,
    accuracy_stored,
    gap_to_training,
    learning_rates,
    random_combinations_law,
)
