"""The forest plot: every measured claim, ours with its 95 % interval beside the paper's number and the
margin."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from convx.claims import DECIDED
from convx.report import style
from convx.report.findings import MEASURED, SIGNS, bounds, is_difference
from convx.report.results import Results
from convx.report.words import known

MOST = 60  # rows; what does not fit is in the replication table
PAPER = "#C04A00"
PANELS = {
    "differences": "variant − reference (percentage points)",
    "values": "ours − the paper's value (percentage points)",
    "ratios": "variant / reference (ratio)",
}


def claims_forest(results: Results, table: pd.DataFrame):
    """Draw every claim that rests on runs and has a number of ours: one panel for differences of variants,
    one for absolute values (against the paper's, at zero), one for ratios. Claims that stayed open are drawn
    as such; nothing measured draws nothing."""
    frame = results.replication
    frame = frame[frame["verdict"].isin(MEASURED) & (frame["claim_kind"] != "exact") & frame["delta"].notna()]
    frame = frame.assign(panel=[_panel(row) for _, row in frame.iterrows()])
    frame = frame[frame["panel"] != ""]
    if frame.empty:
        return None
    decided = frame["verdict"].isin(DECIDED)
    rank = (frame["role"] != "primary") * 2 + ~decided
    frame = frame.assign(rank=rank).sort_values(["rank", "claim_id"], kind="stable")
    left_out, frame = max(0, len(frame) - MOST), frame[:MOST]
    panels = [name for name in PANELS if (frame["panel"] == name).any()]
    counts = [int((frame["panel"] == name).sum()) for name in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9.5, 1.5 + 0.75 * len(panels) + 0.3 * len(frame)),
        height_ratios=[n + 0.5 for n in counts],
        squeeze=False,
    )
    for name, ax in zip(panels, axes[:, 0]):
        _draw(ax, frame[frame["panel"] == name], name)
    words = "Claims against what was found, 95 % intervals"
    style.title(figure, words if frame["verdict"].isin(DECIDED).any() else f"{words}: none of them is decided yet")
    rest = [f"{left_out} more claims are in the replication table."] if left_out else []
    if results.study["reduced"]:
        rest.append(f"Reduced study: {results.study['reduced']}.")
    # The note is the legend's title: below the axes the layout keeps room for one thing only.
    notes = style.wrapped(figure, " ".join(rest)) or None
    keys = {"ncols": 4, "fontsize": 7.5, "title": notes, "title_fontsize": 7, "alignment": "left"}
    figure.legend(handles=_keys(), loc="outside lower left", **keys)
    return figure


def _panel(row) -> str:
    if row["unit"] == "ratio":
        return "ratios"
    if row["unit"] not in ("%", "pp"):
        return ""
    return "differences" if is_difference(row) else "values"


def _draw(axes, part: pd.DataFrame, name: str) -> None:
    null = 1.0 if name == "ratios" else 0.0
    axes.axvline(null, color="#777777", linewidth=0.8, zorder=1)
    for y, (_, row) in zip(range(len(part) - 1, -1, -1), part.iterrows()):
        value, low, high, paper, centre = _numbers(row, name)
        if known(row["margin"]):
            ends = (centre - row["margin"], centre + row["margin"])
            axes.fill_betweenx([y - 0.34, y + 0.34], *ends, color="#DADADA", zorder=0, linewidth=0)
        filled = "black" if row["role"] == "primary" else "white"
        error = [[max(0.0, value - low)], [max(0.0, high - value)]] if known(low) and known(high) else None
        axes.errorbar(
            value,
            y,
            xerr=error,
            capsize=3,
            marker="o",
            markersize=6,
            color="black",
            markerfacecolor=filled,
            zorder=3,
        )
        if known(paper):
            axes.plot(
                paper,
                y,
                marker="x",
                color=PAPER,
                markersize=7,
                markeredgewidth=1.8,
                linestyle="none",
                zorder=4,
            )
        text = f"{SIGNS[row['verdict']]} {row['verdict']}" + ("" if error else ", no interval")
        axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_yticks(range(len(part) - 1, -1, -1), part["claim_id"], fontsize=8)
    axes.set_ylim(-0.6, len(part) - 0.4)
    axes.set_xlabel(PANELS[name])
    axes.margins(x=0.06)
    axes.grid(axis="y", visible=False)


def _numbers(row, name: str) -> tuple[float, float, float, float | None, float]:
    """Return (ours, low, high, the paper's number, centre of the margin) on the panel's axis."""
    if name == "values":
        return row["delta"], row["delta_ci_low"], row["delta_ci_high"], 0.0, 0.0
    value, low, high = bounds(row)
    centre = 0.0
    if name == "ratios":
        centre = row["paper_value"] if row["claim_kind"] == "cost" else 1.0
    return value, low, high, row["paper_value"], centre


def _keys() -> list:
    """Return the legend: shapes first, colour repeats them."""
    dot = {"marker": "o", "color": "black", "markersize": 6}
    return [
        Line2D([], [], **dot, label="ours, primary claim"),
        Line2D([], [], **dot, markerfacecolor="white", label="ours, exploratory"),
        Line2D([], [], marker="x", color=PAPER, linestyle="none", markeredgewidth=1.8, label="the paper"),
        Patch(color="#DADADA", label="margin: no relevant difference inside"),
    ]
