"""Claims and metrics -> verdicts: one row a claim, whatever ran. No torch, except inside the exact checks.

    >>> frame = evaluate(load_ledgers(), runs, per_image, study_facts(study), exact=run_exact(load_ledgers()))

=============  ========================================================  =====================================
kind           what is decided                                           words
=============  ========================================================  =====================================
absolute       ours - paper, only where data and protocol are the        replicated, higher, lower,
               paper's                                                   inconclusive
delta,         variant - reference (unit `ratio`: variant / reference    supported, contradicted,
ordering       - 1), also on another data set, which `scope` names       no relevant difference, inconclusive
cost           variant / reference - the paper's ratio, only where       as absolute
               device and protocol are the paper's
exact          the number of a computation                               exact, differs
any            what stands in the way                                    not comparable, incomplete, failed,
                                                                         not run
=============  ========================================================  =====================================

Whether a difference is relevant says the claim's margin, fixed in the ledger; the rules are those of
`statistics.absolute_verdict` and `statistics.direction_verdict`. `not_lower` is non-inferiority: supported
when the 90 % interval (a one-sided test at 5 %) lies above -margin, contradicted when the 95 % interval
lies below 0 and the estimate below -margin. Intervals are over seeds and, where the evaluation kept the
results per image, over test images too; one seed decides nothing. Seeds pair only by design. Primary claims
keep their verdict only if it survives Holm's correction over the study's primary claims.
"""

import importlib
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import special

from convx import statistics
from convx.evidence import ONCE, Stop, Table, differences, study_facts
from convx.ledger import load_ledgers
from convx.statistics import Contrast, Interval
from convx.verdicts import DECIDED, VERDICTS, correct, detectable, two_level, verdict_of

__all__ = ["COLUMNS", "DECIDED", "VERDICTS", "evaluate", "load_ledgers", "study_facts"]

FROM_CLAIM = {
    "claim_id": "id",
    "paper_key": "paper",
    "paper_location": "location",
    "claim_kind": "kind",
    **{key: key for key in ("role", "statement", "variant", "reference", "metric", "unit", "direction")},
    **{key: key for key in ("paper_value", "paper_spread", "spread_kind", "paper_n", "margin")},
    "paper_data": "data",
}
NUMBERS = """\
ours_mean ours_sd ours_n ours_ci_low ours_ci_high reference_mean reference_sd reference_n
delta delta_ci_low delta_ci_high delta_ci90_low delta_ci90_high p_difference p_equivalence holm_p
minimum_detectable_effect probability_of_improvement
""".split()  # noqa: SIM905
COLUMNS = [
    *FROM_CLAIM,
    *("conditions", "evidence", "divergences", "study", "study_data", "protocol"),
    *NUMBERS,
    *("verdict", "reason", "scope", "method"),
]

COUNTED = ("parameters", "trainable_parameters", "stored_bytes", "macs")  # no spread
ENERGY = ("inference_energy", "training_energy")


def evaluate(
    claims: list[dict], runs: pd.DataFrame, per_image: Mapping, study: dict, exact: Mapping | None = None
) -> pd.DataFrame:
    """Return one row a claim (`COLUMNS`) with a verdict and, unless it is decided, the reason.

    ``runs``: the tidy table of a study (study, variant, seed, metric, value, unit, n, split, method,
    status, reason and a column a condition). ``per_image``: {variant: {seed: {"correct": bool [N],
    "corruption_correct_cells": uint8 [N]}}}. ``study``: as :func:`study_facts` returns it; whatever its
    variants state beyond seeds counts as protocol. ``exact``: the numbers of the exact checks, as
    :func:`run_exact` returns them. Differences are variant - reference, or ours - paper, in the claim's unit.
    """
    table = Table(runs, per_image, study)
    rows = []
    for claim in claims:
        row = _head(claim, study)
        try:
            row |= _exact(claim, exact) if claim["kind"] == "exact" else _compared(claim, table)
        except Stop as stop:
            row |= stop.row
        rows.append(row)
    correct(rows)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    numeric = [*NUMBERS, "paper_value", "paper_spread", "paper_n", "margin"]
    frame[numeric] = frame[numeric].astype(float).replace([np.inf, -np.inf], np.nan)
    assert frame["verdict"].isin(VERDICTS).all() and (frame["verdict"].isin(DECIDED) | (frame["reason"] != "")).all()
    return frame


def _head(claim: dict, study: dict) -> dict:
    status, source = claim["evidence"]["status"], claim["evidence"]["source"]
    return {column: claim[key] for column, key in FROM_CLAIM.items()} | {
        "conditions": ", ".join(f"{k}={v}" for k, v in claim["conditions"].items()),
        "evidence": f"{status}: {source}",
        "divergences": " ".join(claim["divergences"]),
        "study": study["name"],
        "study_data": study["data"]["name"],
        "protocol": "",
        "reason": "",
        "scope": "",
        "method": "",
    }


def run_exact(claims: list[dict]) -> dict[str, dict]:
    """Run the exact checks, each once: {"module:function": {"value": number} or {"error": text}}.

    They import torch and take half a minute for all papers; the workflow runs them once and keeps the result.
    """
    found = {}
    for check in sorted({c["check"] for c in claims if c["kind"] == "exact" and c["check"]}):
        module, _, name = check.partition(":")
        try:
            found[check] = {"value": float(getattr(importlib.import_module(module), name)())}
        except Exception as error:  # a broken check is a row of the table, not the end of it
            found[check] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return found


def _exact(claim: dict, numbers: Mapping | None) -> dict:
    """Compare the number of an exact check with the paper's: within the tolerance it is exact."""
    if claim["check"] is None:
        raise Stop("not run", "convx has no code for it yet")
    if not numbers or claim["check"] not in numbers:
        raise Stop("not run", "exact checks were left out")
    found = numbers[claim["check"]]
    if "error" in found:
        raise Stop("failed", f"{claim['check']}: {found['error']}")
    ours = found["value"]
    difference = ours - claim["paper_value"]
    within = abs(difference) <= claim["margin"] * (1 + 1e-9)
    return {
        "ours_mean": ours,
        "ours_n": 1,
        "delta": difference,
        "verdict": "exact" if within else "differs",
        "method": claim["check"],
    }


def _compared(claim: dict, table: Table) -> dict:
    """Decide a claim that rests on runs."""
    kind, differs = claim["kind"], differences(claim, table.study)
    for variant in filter(None, (claim["variant"], claim["reference"])):
        if variant not in table.study["variants"]:
            raise Stop("not run", f"{variant} is not in the study")
    row = {"scope": "; ".join(differs), "protocol": "differs" if differs else "as in the paper"}
    try:
        if claim["metric"] == "latency_ratio":
            row |= _latency(claim, table)
        elif claim["unit"] == "ratio":
            row |= _ratio(claim, table)
        elif claim["reference"]:
            row |= _difference(claim, table)
        else:
            row |= _absolute(claim, table)
    except Stop as stop:
        stop.row = row | stop.row
        raise
    contrast, images_alone = row.pop("contrast"), row.pop("images_alone", False)
    other_data = claim["data"] not in ("any", table.study["data"]["name"])
    if (kind in ("absolute", "cost") and differs) or (not claim["transfer"] and other_data):
        raise Stop("not comparable", "; ".join(differs), **row)
    row |= verdict_of(claim, contrast, row.pop("measured95", None))
    row["minimum_detectable_effect"] = effect = detectable(contrast, claim["margin"])
    if row["ours_n"] == 1 and not images_alone and claim["metric"] not in (*ONCE, *COUNTED):
        # Without this rule the test set's interval alone could decide, as if seeds did not differ.
        row |= {"verdict": "inconclusive", "reason": "one run: its spread is unknown"}
        row |= {"p_difference": None, "p_equivalence": None}
    elif row["verdict"] == "inconclusive":
        row["reason"] = _why(claim, row, effect)
    elif kind == "absolute" and claim["spread_kind"] == "unstated" and row["verdict"] in DECIDED:
        row["scope"] = "; ".join(filter(None, [row["scope"], _other_reading(claim, table, row["verdict"])]))
    return row


def _difference(claim: dict, table: Table) -> dict:
    """Variant - reference over seeds and, where they were kept, images."""
    a, b = (table.values(claim, claim[key]) for key in ("variant", "reference"))
    together = claim["pairing"] == "by_design" and list(a.index) == list(b.index)
    contrast = statistics.paired(a, b) if together else statistics.welch(a, b)
    shares = [table.shares(claim, claim[key], v) for key, v in (("variant", a), ("reference", b))]
    row = _described(claim, table, a, b)
    if all(s is not None for s in shares) and shares[0].shape[1] == shares[1].shape[1]:
        if min(len(a), len(b)) > 1:
            contrast = two_level(contrast, *shares, together)
        elif together and table.untrained(claim) and all(np.isin(s, (0, 1)).all() for s in shares):
            contrast, row["images_alone"] = statistics.paired_images(shares[0][0], shares[1][0]), True
    row["contrast"] = contrast
    better = statistics.probability_of_improvement(a.to_numpy(), b.to_numpy(), resamples=200).estimate
    row["probability_of_improvement"] = 1 - better if claim["direction"] == "lower" else better
    return row


def _absolute(claim: dict, table: Table) -> dict:
    """Ours - the paper's value; a ± of unstated kind is read as a standard deviation."""
    values = table.values(claim, claim["variant"])
    contrast = _to_paper(claim, table, values, claim["spread_kind"])
    row = _described(claim, table, values) | {"contrast": contrast}
    if len(values) == 1:
        inside = contrast.interval(0.95)
        row |= {
            "ours_ci_low": inside.low + claim["paper_value"],
            "ours_ci_high": inside.high + claim["paper_value"],
        }
    return row


def _to_paper(claim: dict, table: Table, values: pd.Series, spread_kind: str) -> Contrast:
    sd, n = claim["paper_spread"], claim["paper_n"]
    if sd is not None and spread_kind == "se":
        sd = sd * math.sqrt(n) if n else None
    return statistics.compare_to_paper(
        values, claim["paper_value"], paper_sd=sd, paper_n=n, test_images=table.images(claim)
    )


def _other_reading(claim: dict, table: Table, verdict: str) -> str:
    other = _to_paper(claim, table, table.values(claim, claim["variant"]), "se")
    second = statistics.absolute_verdict(other.interval(0.90), other.interval(0.95), claim["margin"])
    also = "either way" if second == verdict else f"as a standard error: {second}"
    return f"the paper's ± is read as a standard deviation ({also})"


def _ratio(claim: dict, table: Table) -> dict:
    """Variant / reference - the paper's ratio (or 1), its error by the delta method from the logarithms."""
    for key in ("variant", "reference"):
        if claim["metric"] in ENERGY and "estimate" in table.method(claim, claim[key]).lower():
            raise Stop("not comparable", "the energy is an estimate, and estimates are never ranked")
    a, b = (_with_start(claim, table, claim[key]) for key in ("variant", "reference"))
    if (a <= 0).any() or (b <= 0).any():
        raise Stop("failed", f"{claim['metric']} is not above zero, so there is no ratio")
    together = claim["pairing"] == "by_design" and list(a.index) == list(b.index)
    logs = (statistics.paired if together else statistics.welch)(np.log(a), np.log(b))
    ratio = math.exp(logs.estimate)
    se = 0.0 if claim["metric"] in COUNTED else ratio * logs.se
    null = claim["paper_value"] if claim["kind"] == "cost" else 1.0
    contrast = Contrast(ratio - null, se, logs.df, logs.n, f"ratio of geometric means, {logs.method}")
    return _described(claim, table, a, b) | {"contrast": contrast}


def _with_start(claim: dict, table: Table, variant: str) -> pd.Series:
    """Return the values by seed; a training that starts from another takes its part of that time."""
    values = table.values(claim, variant)
    facts = table.study["variants"][variant]
    if claim["metric"] != "train_seconds" or not facts.get("start_from"):
        return values
    start = _with_start(claim, table, facts["start_from"])
    if missing := [seed for seed in values.index if seed not in start.index]:
        raise Stop("incomplete", f"{facts['start_from']}, which {variant} starts from, lacks seed {missing[0]}")
    return values + facts.get("start_share", 1.0) * start[values.index]


def _latency(claim: dict, table: Table) -> dict:
    """The measured ratio of medians - the paper's ratio (or 1), with its measured 95 % interval.

    Standard error, 90 % interval and p values are those of a normal law with the wider half of it.
    """
    found = {}
    for name in ("median", "low", "high"):
        values = table.values(
            claim,
            claim["variant"],
            claim["conditions"] | {"statistic": name, "reference": claim["reference"]},
        )
        found[name] = float(values.iloc[0])
    null = claim["paper_value"] if claim["kind"] == "cost" else 1.0
    ratio, half = found["median"], max(found["high"] - found["median"], found["median"] - found["low"])
    method = f"paired with {claim['reference']}: {table.method(claim, claim['variant'])}"
    outer = Interval(ratio - null, found["low"] - null, found["high"] - null, 0.95, 1, method)
    contrast = Contrast(ratio - null, half / float(special.ndtri(0.975)), math.inf, 1, method)
    bounds = {"ours_mean": ratio, "ours_n": 1, "ours_ci_low": found["low"], "ours_ci_high": found["high"]}
    return bounds | {"contrast": contrast, "measured95": outer}


def _described(claim: dict, table: Table, ours: pd.Series, reference: pd.Series | None = None) -> dict:
    inside = statistics.t_interval(ours)
    row = {
        "ours_mean": ours.mean(),
        "ours_sd": ours.std(),
        "ours_n": len(ours),
        "ours_ci_low": inside.low,
        "ours_ci_high": inside.high,
    }
    if reference is not None:
        row |= {
            "reference_mean": reference.mean(),
            "reference_sd": reference.std(),
            "reference_n": len(reference),
        }
    return row


def _why(claim: dict, row: dict, effect: float) -> str:
    """Say why a claim is inconclusive."""
    if not math.isfinite(effect):
        return "one run: its spread is unknown"
    low, high, unit = row["delta_ci_low"], row["delta_ci_high"], claim["unit"]
    unit = "pp" if unit == "%" else "" if unit in ("ratio", "1") else unit
    text = f"the 95 % interval [{low:.2f}, {high:.2f}] {unit}".rstrip()
    beside = "a margin of" if claim["direction"] == "not_lower" else "0 and the margin of"
    return (
        f"{text} does not settle it beside {beside} {claim['margin']:g}; {effect:.2g} {unit}".rstrip()
        + " would be detected (80 % power)"
    )
