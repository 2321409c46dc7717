"""One look for all figures: readable in grey (marker shape and line style carry the meaning, colour repeats
it), text that stays text in the SVG, and files whose bytes depend on nothing but the numbers."""

import math
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from convx.manifest import atomic

# Okabe & Ito's palette, safe for colour-blind readers, ordered so that neighbours differ in lightness.
COLOURS = [
    "#000000",
    "#E69F00",
    "#0072B2",
    "#56B4E9",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#8C8C8C",
    "#5B3A8E",
    "#B8A000",
]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "h"]
LINES = [
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 1)),
    (0, (8, 2)),
    (0, (2, 4)),
    (0, (4, 2, 1, 2)),
]

plt.rcParams.update(
    {
        "figure.dpi": 100,
        "savefig.dpi": 160,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E3E3E3",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "svg.hashsalt": "convx",
        "svg.fonttype": "none",
        "figure.constrained_layout.use": True,
    }
)


SOFT = "#555555"  # of what only explains; 7.5 : 1 on white


def look(place: int) -> dict:
    """Return colour, marker and filling of the n-th variant of a study; the first hundred differ.

    Colour and filling tell the second ten from the first, the shape shifts by one with every ten.
    """
    ten = place // len(MARKERS)
    colour = COLOURS[place % len(COLOURS)]
    marker = MARKERS[(place + ten) % len(MARKERS)]
    return {"color": colour, "marker": marker, "markerfacecolor": colour if ten % 2 == 0 else "white"}


def line(place: int) -> dict:
    """Return colour, line style and, after the first ten, width of the n-th variant of a study."""
    ten = place // len(LINES)
    style = LINES[(place + ten) % len(LINES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": style, "linewidth": (1.5, 2.4, 0.9)[ten % 3]}


LINES_OF_LEGEND = 25


def with_legend(labels: list[str], width: float, height: float) -> tuple[float, float]:
    """Return the size in inches of a figure whose axes take width x height and whose legend stands right of
    them."""
    columns = math.ceil(len(labels) / LINES_OF_LEGEND)
    longest = max(map(len, labels), default=0)
    tallest = 0.9 + 0.185 * min(len(labels), LINES_OF_LEGEND)
    return width + columns * (0.5 + 0.073 * longest), max(height, tallest)


def legend(axes, entries: int) -> None:
    """Put the legend right of the axes, in as many columns as keep it under 25 lines."""
    columns = math.ceil(entries / LINES_OF_LEGEND)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, ncols=columns, numpoints=1)


def wrapped(figure, text: str) -> str:
    """Return text of 7 points broken to the width of a figure."""
    return textwrap.fill(text, int(figure.get_figwidth() * 19))


def note(figure, text: str) -> None:
    """Write below a figure what qualifies its numbers, broken to its width."""
    figure.supxlabel(wrapped(figure, text), fontsize=7, color=SOFT, x=0.01, ha="left")


def title(figure, text: str) -> None:
    """Write a title at the left edge of a figure, so that long names of rows never push it out of the
    picture."""
    figure.suptitle(textwrap.fill(text, int(figure.get_figwidth() * 14)), fontsize=10, x=0.01, ha="left")


def save(figure, folder: str | Path, name: str) -> None:
    """Write a figure as SVG and PNG, atomically, without dates, and close it; its title goes into the
    metadata too."""
    title = {"Title": " ".join(figure.get_suptitle().split())} if figure.get_suptitle() else {}
    for kind in ("svg", "png"):
        with atomic(Path(folder) / f"{name}.{kind}") as temporary:
            metadata = title | ({"Date": None, "Creator": "convx"} if kind == "svg" else {"Software": "convx"})
            figure.savefig(temporary, format=kind, metadata=metadata)
        figure.set_layout_engine("none")  # the second file has the layout of the first, which took half of the time
    plt.close(figure)
