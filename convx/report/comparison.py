"""The comparison: one row a variant, whatever became of its runs. Every number with its interval and how it
was obtained."""

import math

import pandas as pd

from convx import config, statistics
from convx.report import origins
from convx.report.results import Results

RESAMPLES = 4_000  # bounds repeat to 2 % of the interval's half width; ten times less would show in the table
ACCURACIES = {"top1": "top1", "corruption": "mean_corruption_accuracy"}
COSTS = {
    "inference_kwh": "inference_energy",
    "inference_kgco2e": "inference_carbon",
    "training_kwh": "training_energy",
    "training_kgco2e": "training_carbon",
}


def comparison(results: Results) -> pd.DataFrame:
    """Return the comparison table: one row a variant, in the study's order; numbers in the units of the
    metrics files."""
    return pd.DataFrame([_row(results, name) for name in results.variants])


def interval(results: Results, variant: str, metric: str, **conditions) -> statistics.Interval | None:
    """Return the mean of a percentage over seeds with its 95 % interval, or None without a value.

    A mean over seeds, measured on a finite test set, is uncertain in both: where the results per image were
    kept, seeds and images are resampled together (`statistics.bootstrap_seeds_images`; of corrupted images
    the image is the unit, as the cells of one image are not independent). With one seed that is the interval
    of the test set alone: Wilson's for plain accuracies. Without results per image it is Student's t over
    seeds, which takes the test set as it is. ``method`` says which; a bound that is not known is NaN.
    """
    values = results.values(variant, metric, **conditions)
    if not len(values):
        return None
    estimate = float(values.mean())
    shares_SN = None if conditions else results.shares(variant, metric, values)
    if len(values) == 1 and metric != "mean_corruption_accuracy":
        rows = results.rows(variant, metric, **conditions)["n"].dropna()
        if not len(rows) or not rows.iloc[0]:
            return statistics.Interval(estimate, math.nan, math.nan, 0.95, 1, "one run, no interval")
        n = int(rows.iloc[0])
        found = statistics.wilson_interval(round(estimate / 100 * n), n)
        method = f"one run: Wilson over {n} test images alone"
        return statistics.Interval(estimate, 100 * found.low, 100 * found.high, 0.95, 1, method)
    if shares_SN is not None and shares_SN.shape[1] > 1:
        found = statistics.bootstrap_seeds_images(shares_SN, resamples=RESAMPLES)
        return statistics.Interval(
            estimate, max(0.0, found.low), min(100.0, found.high), 0.95, len(values), found.method
        )
    if len(values) == 1:
        return statistics.Interval(estimate, math.nan, math.nan, 0.95, 1, "one run, no interval")
    found = statistics.t_interval(values.to_numpy())
    method = f"Student's t over {len(values)} seeds, the test set as it is"
    return statistics.Interval(estimate, max(0.0, found.low), min(100.0, found.high), 0.95, len(values), method)


def _first(values: pd.Series) -> float:
    return float(values.iloc[0]) if len(values) else math.nan


def _row(results: Results, name: str) -> dict:
    status, reason = results.status(name)
    row: dict = {
        "variant": name,
        "paper": config.declaration(results.study, name)["paper"],
        "status": status,
        "seeds_done": len(results.values(name, "top1")),
        "seeds_planned": len(results.seeds(name)),
    }
    for column in ("parameters", "trainable_parameters", "stored_bytes"):
        row[column] = _first(results.values(name, column))
    row["macs"] = _first(results.values(name, "macs", folded="no"))
    row["peak_memory_mib"] = _first(results.values(name, "peak_memory"))
    for column, metric in ACCURACIES.items():
        found = interval(results, name, metric)
        for part, suffix in (("estimate", ""), ("low", "_low"), ("high", "_high")):
            row[column + suffix] = getattr(found, part) if found else math.nan
        row[f"{column}_interval"] = found.method if found else ""
    row["corruption_protocol"] = (results.study["evaluate"]["corruption"] or {}).get("protocol", "")
    row |= _latency(results, name)
    for column, metric in COSTS.items():
        values = results.values(name, metric)
        row[column] = float(values.mean()) if len(values) else math.nan
    row["train_seconds"] = float(results.values(name, "train_seconds").mean())  # of an empty series: NaN
    row["energy_method"] = results.method(name, "inference_energy")
    row["training_energy_method"] = results.method(name, "training_energy")
    row["devices"], row["code_versions"] = origins.pooled(results, name)
    row["top1_method"] = results.method(name, "top1")
    row["reason"] = reason
    return row


def _latency(results: Results, name: str) -> dict:
    """Return latency and its ratio to the baseline at the plainest condition: smallest batch, fewest threads,
    float32."""
    row = {}
    for part in ("median", "median_low", "median_high"):
        row[f"latency_ms{part.removeprefix('median')}"] = _first(results.values(name, "latency", statistic=part))
    for part in ("median", "low", "high"):
        suffix = "" if part == "median" else f"_{part}"
        row[f"latency_ratio{suffix}"] = _first(results.values(name, "latency_ratio", statistic=part))
    if name == results.study["baseline"] and not math.isnan(row["latency_ms"]):
        row["latency_ratio"] = 1.0  # by definition, so without an interval
    rows = results.rows(name, "latency", statistic="median")
    for key in ("batch", "threads", "device"):
        row[f"latency_{key}"] = rows[key].iloc[0] if key in rows and len(rows) else None
    return row
