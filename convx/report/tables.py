"""The tables of a study: runs.csv (tidy), the comparison (one row a variant), the replication (one row a
claim).

They build from whatever metrics exist: a failed or missing run keeps its row, with the reason. The CSV files
hold every row and column; the Markdown files hold what a person reads, in units that fit.
"""

from collections import Counter
from pathlib import Path

import pandas as pd

from convx.evaluate.energy import SHARED_COUNTERS
from convx.manifest import atomic, write_json
from convx.report import origins
from convx.report.comparison import COSTS, comparison, interval
from convx.report.findings import MEASURED, SIGNS, found, how_sure, order, paper_says, reasons
from convx.report.results import Results
from convx.report.words import DASH, grouped, known, listed, number, scaled, significant, with_interval

__all__ = ["comparison", "comparison_cells", "comparison_markdown", "interval", "markdown", "replication",
           "replication_markdown", "write"]  # fmt: skip


def write(folder: str | Path) -> None:
    """Write all tables of ``results/<study>`` to its tables/ folder, and its manifest; each file whole or not at all."""
    results = Results(Path(folder))
    out = results.folder / "tables"
    compared = comparison(results)
    _csv(results.runs, out / "runs.csv")
    _csv(compared, out / "comparison.csv")
    _csv(results.replication, out / "replication.csv")
    _text(comparison_markdown(results, compared), out / "comparison.md")
    _text(replication_markdown(results, results.replication), out / "replication.md")
    write_json(results.folder / "manifest.json", origins.manifest(results))


def replication(results: Results) -> pd.DataFrame:
    """Return the replication table: one row a claim of every paper, decided or with its reason."""
    return results.replication


def _csv(frame: pd.DataFrame, path: Path) -> None:
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", float_format="%.10g")


def _text(text: str, path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- text


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def head(results: Results, title: str) -> str:
    """Return the title and the sentences that qualify every number below it."""
    study = results.study
    lines = [f"# {title}: {study['study']}", ""]
    if study["description"]:
        lines += [study["description"], ""]
    if study["reduced"]:
        lines += [
            f"**Reduced study**: {study['reduced']}. Absolute values are not comparable with the papers'.",
            "",
        ]
    return "\n".join(lines) + "\n"


def comparison_cells(results: Results, frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the comparison for people: units in the header, one prefix a column."""
    header = ["variant", "status", "seeds", "parameters", "MACs / image", "top-1 %", "corrupted top-1 %"]
    header += [f"latency ms ({_latency_condition(frame)})", f"latency / `{results.study['baseline']}`"]
    units = {}
    for column in COSTS:
        factor, prefix = units[column] = scaled(frame[column])
        gas = column.endswith("kgco2e")
        what = "training" if column.startswith("training") else "inference"
        header.append(f"{what} {prefix}{'gCO2e' if gas else 'Wh'}" + ("" if what == "training" else " / 1000 images"))
    rows = []
    for _, row in frame.iterrows():
        cells = [row["variant"], row["status"] + (f": {row['reason']}" if row["reason"] else "")]
        cells += [
            f"{row['seeds_done']}/{row['seeds_planned']}",
            number(row["parameters"]),
            number(row["macs"]),
        ]
        cells += [_measured(row, column, 2) for column in ("top1", "corruption")]
        cells += [_measured(row, "latency_ms"), _measured(row, "latency_ratio", 2)]
        for column, (factor, _) in units.items():
            cells.append(_cost(row, column, factor))
        rows.append(cells)
    return header, rows


def _cost(row, column: str, factor: float) -> str:
    """Return one cost; a bound where the counters of a device ran for other jobs, too."""
    if not known(row[column]):
        return DASH
    bound = column.startswith("training") and SHARED_COUNTERS in str(row["training_energy_method"])
    return ("≤ " if bound else "") + significant(row[column] * factor)


def _measured(row, column: str, places: int | None = None) -> str:
    return with_interval(row[column], row[f"{column}_low"], row[f"{column}_high"], places)


def _latency_condition(frame: pd.DataFrame) -> str:
    batches = sorted({int(b) for b in frame["latency_batch"].dropna()})
    devices = sorted(set(frame["latency_device"].dropna()))
    return f"batch {listed([str(b) for b in batches]) or 1}" + (f", {', '.join(devices)}" if devices else "")


def _folded(results: Results) -> list[str]:
    """Return what folding makes of the cost of each variant that it changes, or that was timed in that form."""
    found = []
    for name in results.variants:
        plain, folded = (results.values(name, "macs", folded=form) for form in ("no", "yes"))
        parts = [f"{number(folded.iloc[0])} MACs"] if len(folded) and set(folded) != set(plain) else []
        ratio = [results.values(name, "latency_ratio", folded="yes", statistic=k) for k in ("median", "low", "high")]
        if all(len(values) for values in ratio):
            median, low, high = (float(values.iloc[0]) for values in ratio)
            parts.append(f"{with_interval(median, low, high, 2)} of `{results.study['baseline']}`'s latency")
        if parts:
            found.append(f"`{name}` {', '.join(parts)}")
    return found


def comparison_notes(results: Results, frame: pd.DataFrame) -> list[str]:
    """Return how each figure of the comparison was obtained, one sentence or two a note."""
    notes = []
    for label, column in (("Top-1", "top1_interval"), ("Corrupted top-1", "corruption_interval")):
        ways = grouped({row["variant"]: row[column] for _, row in frame.iterrows()})
        if ways:
            notes.append(f"{label}: the bracket is the 95 % interval of the mean over seeds, by {'; '.join(ways)}.")
    others = {
        r["variant"]: r["top1_method"] for _, r in frame.iterrows() if "argmax" not in (r["top1_method"] or "argmax")
    }
    if others:
        who = listed([f"`{name}`" for name in others])
        notes.append(f"Trained without labels, so no logits: top-1 of {who} is by {'; '.join(grouped(others))}.")
    protocol = results.study["evaluate"]["corruption"]
    if protocol and frame["corruption"].notna().any():
        made = "" if protocol["protocol"] == "official" else ", images regenerated"
        notes.append(
            f"Corrupted images: mean over corruptions and severities, protocol `{protocol['protocol']}`{made}."
        )
    if frame["latency_ms"].notna().any():
        notes.append(
            "Latencies are medians with the 95 % interval of the median. Each ratio was measured in one "
            "process, the variant "
            f"and `{results.study['baseline']}` by turns, and has its own interval; two latencies from "
            f"different rows were "
            "not measured side by side."
        )
    if forms := _folded(results):
        notes.append(f"Folded for inference, the same function: {'; '.join(forms)}.")
    for label, column in (("Inference", "energy_method"), ("Training", "training_energy_method")):
        ways = grouped({row["variant"]: row[column] for _, row in frame.iterrows()})
        if ways:
            rank = " Estimates are never ranked." if any("estimate" in way for way in ways) else ""
            if any(SHARED_COUNTERS in way for way in ways):
                rank += " What ran beside a training is in its counters, so they are upper bounds (≤)."
            notes.append(f"{label} energy: {'; '.join(ways)}.{rank}")
    return notes + origins.notes(results)


def comparison_markdown(results: Results, frame: pd.DataFrame) -> str:
    """Return the comparison table for people, with how each figure was obtained below it."""
    header, rows = comparison_cells(results, frame)
    table = markdown(header, [[f"`{row[0]}`", *row[1:]] for row in rows])
    return head(results, "Comparison") + table + "".join(f"\n{note}\n" for note in comparison_notes(results, frame))


def replication_markdown(results: Results, frame: pd.DataFrame) -> str:
    """Return the replication table for people: primary claims, then what was measured, then the rest counted
    by paper."""
    counts = Counter(frame["verdict"])
    parts = [head(results, "Replication")]
    parts.append(f"{len(frame)} claims of {frame['paper_key'].nunique()} papers: ")
    parts.append(", ".join(f"{counts[word]} {word}" for word in order(counts)) + ".\n\n")
    primary, measured, computed, rest = split(frame)
    reduced = results.study["reduced"]
    for title, part in (
        ("Primary claims", primary),
        ("Exploratory claims that were measured", measured),
        ("Claims that were computed", computed),
    ):
        if len(part):
            parts.append(f"## {title}\n\n" + _claims(part, reduced) + "\n")
    if len(rest):
        parts.append("## All other claims, by paper\n\nEach one is a row of `replication.csv`.\n")
    for paper, part in rest.groupby("paper_key", sort=True):
        parts.append(f"\n### {paper}: {len(part)}\n\n")
        for word, reason, names in reasons(part, reduced):
            parts.append(f"- {len(names)} **{word}**: {reason}. Claims {listed([f'`{name}`' for name in names], 3)}\n")
    if places := origins.notes(results):
        parts.append("\n## Where the runs were made\n\n" + "".join(f"- {line}\n" for line in places))
    return "".join(parts)


def split(frame: pd.DataFrame) -> tuple[pd.DataFrame, ...]:
    """Return the primary claims, the exploratory ones with a measured number, those with a computed one, and
    all others; the first three by verdict, decided ones first, within that in the ledgers' order."""
    primary = frame["role"] == "primary"
    number = ~primary & frame["verdict"].isin(MEASURED)
    exact = frame["claim_kind"] == "exact"
    rank = frame["verdict"].map({word: place for place, word in enumerate(SIGNS)})
    parts = []
    for chosen in (primary, number & ~exact, number & exact):
        parts.append(frame[chosen].assign(rank=rank[chosen]).sort_values("rank", kind="stable").drop(columns="rank"))
    return *parts, frame[~primary & ~number]


def _claims(frame: pd.DataFrame, reduced: str) -> str:
    header = [
        "claim",
        "what is claimed",
        "the paper says",
        "we found [95 %]",
        "verdict",
        "how sure, or why not",
    ]
    rows = []
    for _, row in frame.iterrows():
        texts = [
            row["statement"],
            paper_says(row),
            found(row),
            f"**{row['verdict']}**",
            how_sure(row, reduced),
        ]
        rows.append([f"`{row['claim_id']}`", *texts])
    return markdown(header, rows)
