"""The tables of a study: runs.csv (tidy), the comparison (one row a variant), the replication (one row a claim).

They build from whatever metrics exist: a failed or missing run keeps its row, with the reason.
"""

import math
from pathlib import Path

import pandas as pd

from convx import claims, config, statistics
from convx.manifest import atomic
from convx.report.results import Results

HUMAN = {
    "parameters": "parameters",
    "macs": "MACs / image",
    "top1": "top-1 %",
    "corruption": "corrupted top-1 %",
    "latency_ms": "latency ms (batch 1)",
    "latency_ratio": "ratio to baseline",
    "inference_kwh": "kWh / 1000 images",
    "inference_kgco2e": "kgCO2e / 1000 images",
    "training_kwh": "training kWh",
    "training_kgco2e": "training kgCO2e",
}


def write(folder: str | Path) -> None:
    """Write all tables of ``results/<study>`` to its tables/ folder, each file whole or not at all."""
    results = Results(Path(folder))
    out = results.folder / "tables"
    compared = comparison(results)
    replicated = replication(results)
    _csv(results.runs, out / "runs.csv")
    _csv(compared, out / "comparison.csv")
    _csv(replicated, out / "replication.csv")
    _text(comparison_markdown(results, compared), out / "comparison.md")
    _text(replication_markdown(results, replicated), out / "replication.md")


def _csv(frame: pd.DataFrame, path: Path) -> None:
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", float_format="%.10g")


def _text(text: str, path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _first(values: pd.Series) -> float:
    return float(values.iloc[0]) if len(values) else math.nan


def interval(results: Results, variant: str, metric: str, **conditions) -> statistics.Interval | None:
    """Return the mean of a percentage over seeds with its 95 % interval: Student's t, or Wilson on the test images for one seed."""
    values = results.values(variant, metric, **conditions)
    if not len(values):
        return None
    if len(values) > 1:
        return statistics.t_interval(values.to_numpy())
    frame = results.runs
    n = frame[(frame["variant"] == variant) & (frame["metric"] == metric)]["n"].iloc[0]
    if not n or math.isnan(n):
        return statistics.Interval(_first(values), math.nan, math.nan, 0.95, 1, "one run, no interval")
    share = statistics.wilson_interval(round(_first(values) / 100 * n), int(n))
    return statistics.Interval(_first(values), 100 * share.low, 100 * share.high, 0.95, 1, "n=1, test-set interval only")


def comparison(results: Results) -> pd.DataFrame:
    """Return the comparison table: one row a variant, in the study's order."""
    return pd.DataFrame([_row(results, name) for name in results.variants])


def _row(results: Results, name: str) -> dict:
    status, reason = results.status(name)
    row: dict = {
        "variant": name,
        "paper": config.declared(name, "variants")["paper"],
        "status": status,
        "seeds_done": len(results.values(name, "top1")),
        "seeds_planned": len(results.seeds(name)),
    }
    for column in ("parameters", "trainable_parameters", "stored_bytes"):
        row[column] = _first(results.values(name, column))
    row["macs"] = _first(results.values(name, "macs", folded="no"))
    row["peak_memory_mib"] = _first(results.values(name, "peak_memory"))
    for column, metric in (("top1", "top1"), ("corruption", "mean_corruption_accuracy")):
        found = interval(results, name, metric)
        for part in ("estimate", "low", "high"):
            row[column + {"estimate": "", "low": "_low", "high": "_high"}[part]] = getattr(found, part) if found else math.nan
    row["corruption_protocol"] = (results.study["evaluate"]["corruption"] or {}).get("protocol", "")
    latency = results.study["evaluate"]["latency"] or {}
    small = {"batch": min(latency.get("batches", [1])), "threads": min(latency.get("threads", [1])), "folded": "no"}
    for part in ("median", "median_low", "median_high"):
        row[f"latency_ms{part.removeprefix('median')}"] = _first(results.values(name, "latency", statistic=part, **small))
    for part in ("median", "low", "high"):
        value = _first(results.values(name, "latency_ratio", statistic=part, **small))
        row["latency_ratio" + ("" if part == "median" else f"_{part}")] = 1.0 if name == results.study["baseline"] else value
    for column, metric in (
        ("inference_kwh", "inference_energy"),
        ("inference_kgco2e", "inference_carbon"),
        ("training_kwh", "training_energy"),
        ("training_kgco2e", "training_carbon"),
    ):
        values = results.values(name, metric)
        row[column] = float(values.mean()) if len(values) else math.nan
    row["train_seconds"] = float(results.values(name, "train_seconds").mean())
    row["energy_method"] = results.method(name, "inference_energy")
    row["training_energy_method"] = results.method(name, "training_energy")
    row["reason"] = reason
    return row


def replication(results: Results) -> pd.DataFrame:
    """Return the replication table: one row a claim of every paper, decided or with its reason."""
    return claims.evaluate(claims.load_ledgers(), results.runs, results.per_image, results.claims_study)


# ---------------------------------------------------------------------------------------------------------------------- text


def number(value, digits: int = 3) -> str:
    """Return a number for people: thousands as k and M, small ones with their exponent, a dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    size = abs(value)
    for limit, mark in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.{digits}g} {mark}"
    if size != 0 and size < 1e-2:
        return f"{value:.2e}"
    return f"{value:.{digits}g}"


def _with_interval(row, column: str, decimals: int = 2) -> str:
    value, low, high = row[column], row[f"{column}_low"], row[f"{column}_high"]
    if math.isnan(value):
        return "–"
    return f"{value:.{decimals}f}" + ("" if math.isnan(low) else f" [{low:.{decimals}f}, {high:.{decimals}f}]")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def head(results: Results, title: str) -> str:
    """Return the title and the sentences that qualify every number below it."""
    study = results.study
    lines = [f"# {title}: {study['study']}", ""]
    if study["description"]:
        lines += [study["description"], ""]
    if study["reduced"]:
        lines += [f"**Reduced study**: {study['reduced']}. Absolute values are not comparable with the papers'.", ""]
    return "\n".join(lines) + "\n"


def comparison_markdown(results: Results, frame: pd.DataFrame) -> str:
    """Return the comparison table for people, with how each figure was obtained below it."""
    rows = []
    for _, row in frame.iterrows():
        rows.append(
            [
                f"`{row['variant']}`",
                f"{row['status']}" + (f" ({row['reason']})" if row["reason"] else ""),
                f"{row['seeds_done']}/{row['seeds_planned']}",
                number(row["parameters"]),
                number(row["macs"]),
                _with_interval(row, "top1"),
                _with_interval(row, "corruption"),
                _with_interval(row, "latency_ms"),
                _with_interval(row, "latency_ratio"),
                number(row["inference_kwh"]),
                number(row["inference_kgco2e"]),
                number(row["training_kwh"]),
                number(row["training_kgco2e"]),
            ]
        )
    notes = [
        "",
        "Brackets are 95 % intervals: of accuracies over seeds (Student's t; with one seed, of the test images alone), of latencies of the median.",
        f"Latency ratios are paired with `{results.study['baseline']}`, both models interleaved in one process.",
    ]
    protocol = results.study["evaluate"]["corruption"]
    if protocol:
        notes.append(f"Corrupted accuracy: mean over corruptions and severities, protocol `{protocol['protocol']}`" + ("." if protocol["protocol"] == "official" else ", regenerated."))
    for label, column in (("Inference", "energy_method"), ("Training", "training_energy_method")):
        methods = sorted({m for m in frame[column] if m})
        if methods:
            notes.append(f"{label} energy: {'; '.join(methods)}. Estimates are never ranked.")
    table = markdown(["variant", "status", "seeds", *HUMAN.values()], rows)
    return head(results, "Comparison") + table + "\n".join(f"\n{note}" for note in notes if note) + "\n"


def replication_markdown(results: Results, frame: pd.DataFrame) -> str:
    """Return the replication table for people, primary claims first."""
    parts = [head(results, "Replication")]
    counts = frame["verdict"].value_counts()
    parts.append("Verdicts: " + ", ".join(f"{count} {word}" for word, count in counts.items()) + ".\n\n")
    for role in ("primary", "exploratory"):
        rows = []
        for _, row in frame[frame["role"] == role].iterrows():
            ours = "–" if pd.isna(row["ours_mean"]) else f"{row['ours_mean']:.2f} (n={int(row['ours_n'])})"
            delta = "–" if pd.isna(row["delta"]) else f"{row['delta']:.2f} [{row['delta_ci_low']:.2f}, {row['delta_ci_high']:.2f}]"
            paper = "–" if pd.isna(row["paper_value"]) else f"{row['paper_value']:g} {row['unit']}"
            rows.append([row["claim_id"], row["statement"], paper, ours, delta, f"**{row['verdict']}**", row["reason"] or ""])
        parts.append(f"## {role.capitalize()} claims\n\n")
        parts.append(markdown(["claim", "what is claimed", "paper", "ours", "difference [95 %]", "verdict", "reason"], rows) + "\n")
    return "".join(parts)
