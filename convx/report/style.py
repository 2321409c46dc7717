"""One look for all figures: readable in grey (marker shape and line style carry the meaning, colour repeats it), fonts that
embed, and files whose bytes depend on nothing but the numbers."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from convx.manifest import atomic

# Okabe & Ito's palette, safe for colour-blind readers, ordered so that neighbours differ in lightness.
COLOURS = ["#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C", "#5B3A8E", "#B8A000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "h"]
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (2, 4)), (0, (4, 2, 1, 2))]

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


def look(place: int) -> dict:
    """Return colour and marker of the n-th variant of a study."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def line(place: int) -> dict:
    """Return colour and line style of the n-th variant of a study."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[place % len(LINES)]}


def save(figure, folder: str | Path, name: str) -> None:
    """Write a figure as SVG and PNG, atomically, without dates, and close it."""
    for kind in ("svg", "png"):
        with atomic(Path(folder) / f"{name}.{kind}") as temporary:
            metadata = {"Date": None, "Creator": "convx"} if kind == "svg" else {"Software": "convx"}
            figure.savefig(temporary, format=kind, metadata=metadata)
    plt.close(figure)
