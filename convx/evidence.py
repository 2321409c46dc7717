"""What a study has to say about a claim: the values by seed or why there are none. No torch."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from convx import config

ONCE = ("latency_ratio", "inference_energy")  # measured for the first seed of a variant alone
PER_IMAGE = {
    "top1": "correct",
    "knn_top1": "correct",  # of an encoder, top-1 is that of its neighbours
    "linear_top1": "linear_correct",
    "mean_corruption_accuracy": "corruption_correct_cells",
}
CURVE = "convergence"  # read off the curve of the validation split, which takes no part in an accuracy
# Which rows a claim means where it leaves a condition open: the plainest measurement.
PLAIN = {"folded": "no", "dtype": "float32", "threads": min, "batch": min}
# What a network costs whatever it learned: no precondition on the learning stands in the way of a claim about it.
COSTS = (
    *(
        "latency",
        "latency_ratio",
        "throughput",
        "inference_energy",
        "inference_carbon",
        "training_energy",
        "training_carbon",
    ),
    *("parameters", "trainable_parameters", "stored_bytes", "macs", "peak_memory", "train_seconds"),
)


class Stop(Exception):
    """A claim that cannot be decided: the verdict, its reason, and what is known all the same."""

    def __init__(self, verdict: str, reason: str, **columns):
        super().__init__(reason)
        self.row = {**columns, "verdict": verdict, "reason": reason}


def study_facts(study: dict) -> dict:
    """Return what :func:`convx.claims.evaluate` needs of a checked study: data, seeds, variants' recipes."""
    facts = {
        "name": study["study"],
        "data": study["data"],
        "seeds": study["seeds"],
        "reduced": study["reduced"],
        "variants": {},
    }
    for name in study["variants"]:
        settings = config.variant_settings(study, name)
        start = settings["start_from"]
        facts["variants"][name] = {
            **config.training_settings(study, name),
            "seeds": config.seeds(study, name),
            "model": settings["model"]["name"],
            "input_size": settings["model"]["settings"].get("input_size"),
            "start_from": start,
            "start_share": start and _share(settings["at_epoch"], config.training_settings(study, start)["epochs"]),
        }
    return facts


def _share(at_epoch: int | None, epochs: int) -> float:
    return 1.0 if at_epoch is None or not epochs else at_epoch / epochs


class Table:
    """The runs of a study, asked for the values of a claim."""

    def __init__(self, runs: pd.DataFrame, per_image: Mapping, study: dict):
        self.runs, self.per_image, self.study = runs, per_image, study

    def rows(self, variant: str, metric: str, conditions: dict) -> pd.DataFrame:
        """Return the rows of a metric, one a seed: what the claim leaves open is at its plainest."""
        frame = self.runs[(self.runs["variant"] == variant) & (self.runs["metric"] == metric)]
        for key, value in conditions.items():
            frame = frame[_equal(frame[key], value)] if key in frame else frame[:0]
        if "split" not in conditions and metric != CURVE:  # other images than the test split decide no claim
            frame = frame[frame["split"].isna() | frame["split"].isin(["", "test"])]
        if "branch" in frame and "branch" not in conditions:  # of a model with two heads, its own has no name
            frame = frame[frame["branch"].isna()]
        for key in frame.columns.intersection(list(PLAIN)).difference(list(conditions)):
            found = frame[key].dropna().unique()
            if len(found) > 1:
                wanted = PLAIN[key](found) if callable(PLAIN[key]) else PLAIN[key]
                kept = frame[_equal(frame[key], wanted)]
                frame = kept if len(kept) else frame
        return frame

    def values(self, claim: dict, variant: str, conditions: dict | None = None) -> pd.Series:
        """Return the values by seed, or stop: not run, failed, incomplete."""
        metric = claim["metric"]
        if variant not in self.study["variants"]:
            raise Stop("not run", f"{variant} is not in the study")
        conditions = claim["conditions"] if conditions is None else conditions
        frame = self.rows(variant, metric, conditions)
        found = pd.to_numeric(frame["value"], errors="coerce")
        values = pd.Series(found.to_numpy(), index=frame["seed"].to_numpy()).dropna().sort_index()
        if values.index.has_duplicates:
            raise Stop("not run", f"{variant} has several rows of {metric} a seed; the claim does not say which")
        wanted = list(self.study["variants"][variant].get("seeds") or self.study["seeds"])
        wanted = wanted[:1] if metric in ONCE else wanted
        missing = [seed for seed in wanted if seed not in values.index]
        mine = self.runs[(self.runs["variant"] == variant) & (self.runs["status"] == "failed")]
        for _, row in mine[mine["seed"].isin(missing)].iterrows():
            what = f", {row['what']}" if isinstance(row.get("what"), str) else ""
            raise Stop(
                "failed",
                f"{variant} seed {row['seed']}{what}: {row.get('reason') or 'no reason was recorded'}",
            )
        if values.empty:
            which = ", ".join(f"{k} {v}" for k, v in conditions.items())
            text = f"no rows of {metric} {f'({which}) ' if which else ''}for {variant}"
            if len(frame):
                text = f"{metric} of {variant}: {frame['method'].iloc[0] or 'no value'}"
            raise Stop("not run", text)
        if missing:
            known = {"ours_mean": values.mean(), "ours_n": len(values)} if variant == claim["variant"] else {}
            raise Stop("incomplete", f"{len(values)} of {len(wanted)} seeds of {variant}", **known)
        if metric not in COSTS and (unmet := self.unmet(variant, wanted)):
            which = "ours" if variant == claim["variant"] else "reference"
            known = {f"{which}_mean": values.mean(), f"{which}_sd": values.std(), f"{which}_n": len(values)}
            raise Stop("not comparable", unmet, **known)
        return values[list(wanted)]

    def unmet(self, variant: str, seeds: list[int]) -> str:
        """Return why a variant did not do what claims about its learning presuppose, "" where it did.

        An evaluator reports such a thing as a row ``precondition``: the condition ``name`` says which, the value is 1
        where it is met and 0 where not, the method says why. One seed that does not meet it is enough, as a mean over
        seeds would mix two things.
        """
        found = self.rows(variant, "precondition", {})
        found = found[found["seed"].isin(seeds)]
        reasons = []
        for name, rows in found.groupby("name", sort=False) if len(found) else []:
            failed = rows[pd.to_numeric(rows["value"], errors="coerce") != 1].sort_values("seed")
            if len(failed):
                first = failed.iloc[0]
                who = f"{variant}, {len(failed)} of {len(rows)} seeds" if len(rows) > 1 else variant
                said = first["method"] or f"the precondition {name} is not met"
                reasons.append(f"{who}: {said}" + (f" (seed {first['seed']})" if len(rows) > 1 else ""))
        return "; ".join(reasons)

    def untrained(self, claim: dict) -> bool:
        """Tell whether nothing was trained in a claim's variants, nor in what they start from: their seeds have no spread."""
        names = [claim["variant"], claim["reference"]]
        while names:
            facts = self.study["variants"][names.pop()]
            if facts.get("epochs") != 0:
                return False
            names += [facts["start_from"]] if facts.get("start_from") else []
        return True

    def method(self, claim: dict, variant: str) -> str:
        return " ".join(
            self.rows(variant, claim["metric"], claim["conditions"])["method"].dropna().astype(str).unique()
        )

    def images(self, claim: dict) -> int | None:
        """Return the number of test images behind an accuracy."""
        n = self.rows(claim["variant"], claim["metric"], claim["conditions"])["n"].dropna()
        return int(n.iloc[0]) if len(n) and claim["unit"] == "%" else None

    def shares(self, claim: dict, variant: str, values: pd.Series) -> np.ndarray | None:
        """Return the results per image [seeds, images] as shares, or None where none were kept."""
        key = PER_IMAGE.get(claim["metric"])
        kept = self.per_image.get(variant, {})
        if key is None or any(key not in kept.get(seed, {}) for seed in values.index):
            return None
        arrays = [np.asarray(kept[seed][key], dtype=float) for seed in values.index]
        if len({len(array) for array in arrays}) > 1:
            return None
        shares_SN = np.stack(arrays)
        if claim["metric"] == "mean_corruption_accuracy":
            cells = self.rows(variant, "corruption_cells", {})["value"].dropna()
            shares_SN = shares_SN / float(cells.iloc[0]) if len(cells) else shares_SN * np.nan
        fits = np.allclose(100 * shares_SN.mean(1), values.to_numpy(), atol=0.01)
        return shares_SN if fits else None


def _equal(column: pd.Series, wanted) -> np.ndarray:
    return np.array(
        [same(value, wanted) for value in column], dtype=bool
    )  # a list would be names of columns when empty


def same(found, wanted) -> bool:
    """Compare two conditions as numbers where both are, else as words."""
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return str(found) == str(wanted)


def differences(claim: dict, study: dict) -> list[str]:
    """Return in words where the study is not what the paper's number presupposes."""
    data, variant = study["data"], study["variants"].get(claim["variant"], {})
    size = data.get("image_size") or _native_size(data["name"])
    part = data.get("validation") or variant.get("train_share", 1) < 1
    facts = {
        "data": data["name"],
        "image_size": variant.get("input_size") or size,  # what the network sees, enlarged or not
        "train_images": data.get("train_images") or ("a part" if part else "all"),
        "test_images": data.get("test_images") or "all",
        **study.get("protocol", {}),
        **{k: v for k, v in variant.items() if k != "seeds"},
    }
    wanted = ({} if claim["data"] == "any" else {"data": claim["data"]}) | claim["protocol"]
    found = []
    for key, value in wanted.items():
        if key not in facts:
            found.append(f"{key.replace('_', ' ')}: the study does not say (paper: {value})")
        elif not same(facts[key], value):
            found.append(f"{key.replace('_', ' ')}: {facts[key]} (paper: {value})")
    if study.get("reduced") and claim["kind"] != "cost":
        text = study["reduced"] if isinstance(study["reduced"], str) else study.get("reduced_text", "see the study")
        found.append(f"reduced study: {text}")
    if data.get("lossy"):
        found.append("the images are a lossy copy")
    return found


def _native_size(name: str) -> int | None:
    from convx.data.sets import SETS

    return SETS[name].image_size if name in SETS else None
