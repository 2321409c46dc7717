"""A row of the replication table in words: what the paper says, what was found, how sure that is. No
torch."""

from collections import Counter
from collections.abc import Iterable

import pandas as pd

from convx.claims import DECIDED, VERDICTS
from convx.report.words import DASH, known, listed, significant, with_interval

MEASURED = (*DECIDED, "inconclusive")  # verdicts that rest on a number of ours
# A sign for each verdict: never colour alone.
SIGNS = {
    "replicated": "✓",
    "supported": "✓",
    "exact": "✓",
    "higher": "↑",
    "lower": "↓",
    "contradicted": "✗",
    "differs": "✗",
    "no relevant difference": "=",
    "inconclusive": "?",
    "not comparable": "≁",
    "incomplete": "…",
    "failed": "!",
    "not run": "–",
}
MEANINGS = {
    "replicated": "our value is the paper's, within the margin",
    "supported": "the difference goes the way the paper says, and is relevant",
    "exact": "our computation gives the paper's number",
    "higher": "our value is above the paper's by more than the margin",
    "lower": "our value is below the paper's by more than the margin",
    "contradicted": "the difference goes the other way, and is relevant",
    "differs": "our computation gives another number",
    "no relevant difference": "whatever difference there is, it is smaller than the margin",
    "inconclusive": "measured, but the interval leaves it open",
    "not comparable": "the study's data or protocol are not the paper's",
    "incomplete": "not every run that the claim needs is there",
    "failed": "a run that the claim needs failed",
    "not run": "nothing was measured for it in this study",
}
assert set(SIGNS) == set(MEANINGS) == set(VERDICTS)
UNITS = {"%": " %", "pp": " pp", "ratio": "", "1": "", "M parameters": " M parameters", "taps": " taps"}
ABSENT = " is not in the study"
EXPECTED = {"higher": "higher", "lower": "lower", "not_lower": "not lower"}


def order(words: Iterable[str]) -> list[str]:
    """Return the verdicts that occur, decided ones first."""
    present = set(words)
    return [word for word in SIGNS if word in present]


def unit(row) -> str:
    """Return the unit of a claim as it follows a number."""
    return UNITS.get(row["unit"], f" {row['unit']}" if row["unit"] else "")


def is_difference(row) -> bool:
    """Return whether a claim is about a difference of two variants (in points, not as a ratio)."""
    return row["claim_kind"] in ("delta", "ordering") and row["unit"] != "ratio"


def paper_says(row) -> str:
    """Return the paper's number with its spread, or the direction where it gives none."""
    if not known(row["paper_value"]):
        return EXPECTED.get(row["direction"], DASH)
    sign = "+" if is_difference(row) and row["paper_value"] > 0 else ""
    text = f"{sign}{row['paper_value']:g}".replace("-", "−")
    if known(row["paper_spread"]):
        text += f" ± {row['paper_spread']:g}"
    if row["unit"] == "ratio":
        return f"{text} times"
    return text + unit(row)


def bounds(row) -> tuple[float, float, float]:
    """Return (value, low, high) of what was found, as the claim puts it: a difference, a ratio, or our own
    value.

    The table keeps differences to the null hypothesis; a ratio is one (or, for a cost, the paper's ratio)
    plus that.
    """
    if row["claim_kind"] in ("absolute", "exact") or not known(row["delta"]):
        return row["ours_mean"], row["ours_ci_low"], row["ours_ci_high"]
    null = 0.0
    if row["unit"] == "ratio":
        null = row["paper_value"] if row["claim_kind"] == "cost" else 1.0
    return row["delta"] + null, row["delta_ci_low"] + null, row["delta_ci_high"] + null


def found(row) -> str:
    """Return what was found with its 95 % interval, in the claim's unit; a dash where there is no number.

    One side of a difference is no difference: where only that is known, as of an incomplete claim, there is no number.
    """
    if is_difference(row) and not known(row["delta"]):
        return DASH
    value, low, high = bounds(row)
    if not known(value):
        return DASH
    if row["claim_kind"] == "exact":
        return (f"{value:.5g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}").replace("-", "−") + unit(row)
    sign = is_difference(row) and known(row["delta"])
    places = 2 if row["unit"] in ("%", "pp") else None
    return with_interval(value, low, high, places, sign, " times" if row["unit"] == "ratio" else unit(row))


def how_sure(row, reduced: str = "") -> str:
    """Return what stands behind a verdict (runs, margin, p, scope), or the reason why there is none.

    ``reduced``: the study's own words for what is reduced, which stand at the top of every page and are not
    repeated.
    """
    parts = []
    if row["verdict"] == "not comparable":
        return terms(row["reason"], reduced)
    if row["verdict"] not in DECIDED:
        parts.append(row["reason"] or "")
    elif row["claim_kind"] == "exact":
        parts.append(f"computed; tolerance {row['margin']:g}" if known(row["margin"]) and row["margin"] else "computed")
    else:
        runs = [int(row[key]) for key in ("ours_n", "reference_n") if known(row[key])]
        if runs:
            same = len(set(runs)) == 1
            counts = f"{runs[0]}" if same else " and ".join(map(str, runs))
            parts.append(f"{counts} run{'s' if max(runs) > 1 else ''}{' each' if same and len(runs) > 1 else ''}")
        if known(row["margin"]):
            parts.append(f"margin {row['margin']:g}{unit(row)}")
        if known(row["holm_p"]):
            parts.append(f"p {probability(row['holm_p'])} after Holm's correction")
        parts.append(size(row))
    if row["scope"] and row["verdict"] in MEASURED:
        parts.append(terms(row["scope"], reduced))
    return "; ".join(part for part in parts if part)


def size(row) -> str:
    """Return words where a difference goes the paper's way and the interval says that its size is another one.

    The verdict on a difference is about its direction, which other data can show too; its size belongs to the data.
    """
    low, high, said = row["delta_ci_low"], row["delta_ci_high"], row["paper_value"]
    told = row["claim_kind"] == "delta" and row["verdict"] == "supported" and row["unit"] == "pp"
    if not (told and known(low) and known(high) and known(said)) or low <= said <= high:
        return ""
    return f"{'smaller' if min(abs(low), abs(high)) < abs(said) else 'larger'} than the paper's"


def terms(scope: str, reduced: str = "") -> str:
    """Return in one line where a study's terms are not the paper's: the data in full, everything else by
    name.

    The table has all values: "data: digits (paper: imagenet); epochs: 3 (paper: 300); the images are a lossy
    copy".
    """
    if reduced:
        scope = scope.replace(f"reduced study: {reduced}", "reduced study")
    first, names, sentences = "", [], []
    for part in filter(None, scope.split("; ")):
        name, _, value = part.partition(": ")
        if name == "data":
            first = f"data {value.replace('(paper:', '(the paper:')}"
        elif "(paper: " in value:
            names.append(name)
        else:
            sentences.append(part)
    differ = listed([*filter(None, [first]), *names], 4)
    return "; ".join(filter(None, [f"not as in the paper: {differ}" if differ else "", *sentences]))


def probability(p: float) -> str:
    """Return "= 0.012" or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"= {significant(p, 2)}"


def reasons(frame: pd.DataFrame, reduced: str = "") -> list[tuple[str, str, list[str]]]:
    """Return (verdict, reason, claim ids) for claims without a number, grouped by what keeps them from one.

    Variants that the study lacks are one group with a list; terms that are not the paper's are one group with
    their names.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    absent: Counter = Counter()
    differing: dict[str, None] = {}
    for _, row in frame.iterrows():
        reason = row["reason"] or ""
        variant = reason.removesuffix(ABSENT)
        if variant != reason:
            absent[variant] += 1
            reason = ABSENT
        elif row["verdict"] == "not comparable":
            parts = reason.replace(f"reduced study: {reduced}", "a reduced study").split("; ")
            differing |= dict.fromkeys(part.partition(":")[0] for part in parts)
            reason = "terms"
        groups.setdefault((row["verdict"], reason), []).append(row["claim_id"])
    found = []
    for (word, reason), ids in sorted(groups.items(), key=lambda item: -len(item[1])):
        if reason == ABSENT:
            names = [f"{name} ({count})" if count > 1 else name for name, count in absent.most_common()]
            reason = f"not in the study: {listed(names, 12)}"
        elif reason == "terms":
            reason = f"not as in the paper: {', '.join(differing)}"
        found.append((word, reason, ids))
    return found
