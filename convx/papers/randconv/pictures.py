"""Pictures of the filters of the random-filters study: spatial variance (figure 8b) and the first layer's combined filters.

Drawn from the small arrays that the metrics files hold, so they need no weights. ``figures.py`` adds the titles.
"""

from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np

from convx.evaluate.payload import unpack
from convx.papers.randconv.networks import Network, beside_baseline

SHOWN_FILTERS = 8


def spatial_variance(study: dict, records: list[dict], grid: list[Network]):
    """Variance over all combined filters at each place of the kernel, learned against frozen, by kernel size (figure 8b)."""
    kept, start = arrays(records), beside_baseline(study, grid)
    same = [n for n in grid if start and (n.depth, n.width, n.lr) == (start[0].depth, start[0].width, start[0].lr)]
    rows: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
    for net in same:
        name = f"spatial_variance_{net.kernel}x{net.kernel}"
        found = [run[name] for run in kept.get(net.variant, {}).values() if name in run]
        if found and (net.expansion or not net.frozen):
            title = (
                "plain, learned" if not net.expansion else f"{'frozen' if net.frozen else 'learned'} x{net.expansion}"
            )
            mean = np.mean(found, axis=0)
            rows[net.kernel][title] = mean / mean.mean()
    common = set.intersection(*(set(row) for row in rows.values())) if rows else set()
    columns = sorted(common if len(common) > 1 else {title for row in rows.values() for title in row}, key=_by_kind)
    if len(columns) < 2:
        return None
    size = (1.0 + 1.25 * len(columns), 0.9 + 1.35 * len(rows))
    figure, cells = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False)
    top = max(float(found.max()) for row in rows.values() for found in row.values())
    for line, kernel in zip(cells, sorted(rows)):
        for axes, title in zip(line, columns):
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            if title not in rows[kernel]:
                axes.set_visible(False)
                continue
            picture = axes.imshow(rows[kernel][title], cmap="cividis", vmin=0, vmax=top)
            axes.set_title(title, fontsize=7.5)
        line[0].set_ylabel(f"k = {kernel}")
        line[0].set_visible(True)
    figure.colorbar(picture, ax=cells, label="variance / its mean", shrink=0.8)
    return figure


def _by_kind(title: str) -> tuple:
    kind, _, expansion = title.partition(" x")
    return kind.split(",")[0] != "plain", kind != "learned", int(expansion or 0)


def first_layer_filters(study: dict, records: list[dict], grid: list[Network]):
    """Combined filters of the first layer at the largest kernel size, first input channel: plain, then frozen by expansion."""
    kept = arrays(records)
    # plain and learned, or combined and frozen: the two ends that the paper shows
    found = [n for n in grid if bool(n.expansion) == n.frozen and _first_filters(kept, n) is not None]
    largest = max((n.kernel for n in found if n.frozen), default=0)
    start = beside_baseline(study, grid)
    found = [n for n in found if start and (n.kernel, n.width, n.lr) == (largest, start[0].width, start[0].lr)]
    found.sort(key=lambda n: n.expansion)
    if sum(n.frozen for n in found) < 2:
        return None
    figure, cells = plt.subplots(
        len(found), SHOWN_FILTERS, figsize=(1.2 + 0.72 * SHOWN_FILTERS, 0.7 + 0.76 * len(found)), squeeze=False
    )
    for line, net in zip(cells, found):
        kernels = _first_filters(kept, net)[:SHOWN_FILTERS, 0]
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
        for axes, kernel in zip(line, kernels):
            bound = np.abs(kernel).max() or 1.0
            axes.imshow(kernel, cmap="PuOr", vmin=-bound, vmax=bound)
        for axes in line[len(kernels) :]:
            axes.set_visible(False)
        line[0].set_ylabel(
            f"frozen x{net.expansion}" if net.expansion else "plain", rotation=0, ha="right", va="center"
        )
    return figure


def _first_filters(kept: dict, net: Network) -> np.ndarray | None:
    runs = kept.get(net.variant, {})
    return runs[min(runs)].get("first_layer_kernels") if runs else None


def arrays(records: list[dict]) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """Return {variant: {seed: {name: array}}} of the pictures in the metrics files."""
    found: dict = defaultdict(dict)
    for record in records:
        if record["what"] == "evaluation" and record.get("arrays"):
            run = record["run"]
            found[run["variant"]][run["seed"]] = {name: unpack(packed) for name, packed in record["arrays"].items()}
    return found
