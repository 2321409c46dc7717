"""Reading ``results/<study>``: the frozen study, the metrics files as one tidy table, per-image payloads,
histories."""

import io
import logging
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from convx import claims, config
from convx.evidence import Table, same
from convx.manifest import read_json
from convx.records import found_record
from convx.report import origins

log = logging.getLogger("convx")
FIRST = ["study", "variant", "seed", "what", "metric", "value", "unit", "n", "split"]
LAST = ["method", "status", "reason"]


@dataclass(frozen=True)
class Results:
    """One study's results folder; ``given`` is the checked study where it is at hand, else it is the frozen one there."""

    folder: Path
    given: dict | None = None

    @cached_property
    def study(self) -> dict:
        """Return the study, the frozen one where none was given."""
        if self.given is not None:
            return self.given
        file = self.folder / "study.json"
        if not file.exists():
            raise config.ConfigError(f"{file}: missing; run the workflow, or unpack a bundle, first")
        study = read_json(file)
        needed = ("study", "variants", "seeds", "baseline", "data", "evaluate")
        if missing := [key for key in needed if not isinstance(study, dict) or key not in study]:
            raise config.ConfigError(f"{file}: not a frozen study, it has no {missing[0]!r}; remove it and run again")
        return study

    @property
    def variants(self) -> list[str]:
        """Return the variants in the study's order."""
        return list(self.study["variants"])

    def seeds(self, variant: str) -> list[int]:
        return config.seeds(self.study, variant)

    @cached_property
    def files(self) -> dict[Path, dict]:
        """Return every metrics file of a run that the study holds, with its content, in the study's order.

        One that cannot be used, and a step that died before it wrote one, is a failed record with its reason.
        """
        found = {}
        for variant in self.variants:
            for seed in self.seeds(variant):
                folder = self.folder / "metrics" / variant / f"seed{seed}"
                there = {file.stem for file in folder.glob("*.json") if not file.name.startswith(".")}
                for what in sorted(there | self._promised(variant, seed)):
                    file = folder / f"{what}.json"
                    if record := found_record(file, variant, seed, self.study):
                        found[file] = record
        return found

    @cached_property
    def records(self) -> list[dict]:
        """Return the content of every metrics file that the study's recipes made."""
        return [record for file, record in self.files.items() if file not in self.strangers]

    @cached_property
    def strangers(self) -> dict[Path, str]:
        """Return the metrics files that another recipe than the study's made, with its digest: they are in no table."""
        recipes: dict[tuple, str] = {}
        found = {}
        for file, record in self.files.items():
            run = record["run"]
            key = (run["study"], run["variant"], run["seed"])
            if key not in recipes:
                recipes[key] = config.resolve(self.study | {"study": run["study"]}, *key[1:])["digest"]
            if recipes[key] != record["recipe_digest"]:
                found[file] = record["recipe_digest"]
        return found

    def _promised(self, variant: str, seed: int) -> set[str]:
        """Return the steps that the study makes of a run; what once was tried and no longer is does not count."""
        evaluate = self.study["evaluate"]
        costs = (evaluate.get("latency") or evaluate.get("energy")) and seed == self.seeds(variant)[0]
        return {"training", "evaluation", *(["cost"] if costs else [])}

    @cached_property
    def runs(self) -> pd.DataFrame:
        """Return the tidy table: one row a value, the conditions as columns; a failed step is one row without
        a value."""
        rows = []
        for record in self.records:
            head = record["run"] | {
                "what": record["what"],
                "status": record["status"],
                "reason": record["reason"],
            }
            if record["status"] == "failed":
                rows.append(head | {"metric": "", "value": np.nan, "unit": "", "split": "", "method": ""})
            for row in record["rows"]:
                rows.append(head | {k: v for k, v in row.items() if k != "conditions"} | row["conditions"])
        head = {"study": self.study["study"], "what": "derived", "status": "ok", "reason": ""}
        rows += [head | {k: v for k, v in row.items() if k != "conditions"} | row["conditions"] for row in self.derived]
        frame = pd.DataFrame(rows, columns=None if rows else [*FIRST, *LAST])
        for column in FIRST:
            if column not in frame:
                frame[column] = None
        conditions = sorted(set(frame.columns) - set(FIRST) - set(LAST))
        return frame[[*FIRST, *conditions, *LAST]]

    @property
    def derived(self) -> list[dict]:
        """Return rows that follow from several runs: ``rows(results)`` in the ``derived.py`` of a paper's folder."""
        papers = {config.declaration(self.study, name)["paper"]: None for name in self.variants}
        names = [f"convx.papers.{paper}.derived" for paper in papers]
        return [row for name in names if find_spec(name) for row in import_module(name).rows(self)]

    @cached_property
    def _places(self) -> dict[tuple[str, str], np.ndarray]:
        """Return where in ``runs`` the rows of each (variant, metric) stand: the table is asked hundreds of
        times."""
        return self.runs.groupby(["variant", "metric"]).indices

    def rows(self, variant: str, metric: str, **conditions) -> pd.DataFrame:
        """Return the rows of a metric of one variant under the conditions, one a seed where that can be.

        What the conditions leave open is at its plainest, as for claims: not folded, float32, the smallest
        batch, the test split.
        """
        frame = self.runs.iloc[self._places.get((variant, metric), [])]
        for key, value in conditions.items():
            frame = frame[
                [same(v, value) for v in frame[key]] if key in frame and len(frame) else np.zeros(len(frame), bool)
            ]
        return Table(frame, {}, {}).rows(variant, metric, conditions) if len(frame) else frame

    def values(self, variant: str, metric: str, **conditions) -> pd.Series:
        """Return the values of a metric of one variant, indexed by seed, from :meth:`rows`.

        A metric that has several rows a seed there has no single value, and the answer is empty.
        """
        rows = self.rows(variant, metric, **conditions)
        found = pd.to_numeric(rows["value"], errors="coerce").to_numpy(dtype=float)
        values = pd.Series(found, index=rows["seed"].to_numpy())
        values = values[np.isfinite(found)].sort_index()
        return values[:0] if values.index.has_duplicates else values

    def shares(self, variant: str, metric: str, values: pd.Series) -> np.ndarray | None:
        """Return the results per image [seeds, images] behind ``values`` as shares of 1, or None where none
        were kept."""
        return Table(self.runs, self.per_image, {}).shares({"metric": metric}, variant, values)

    def method(self, variant: str, metric: str) -> str:
        """Return how a metric of a variant was measured."""
        part = self.runs.iloc[self._places.get((variant, metric), [])]
        return str(part["method"].iloc[0]) if len(part) else ""

    @cached_property
    def replication(self) -> pd.DataFrame:
        """Return the replication table: one row a claim of every paper, and where its runs were made."""
        frame = claims.evaluate(claims.load_ledgers(), self.runs, self.per_image, self.claims_study, self.exact)
        pooled = [origins.pooled(self, row["variant"], row["reference"]) for _, row in frame.iterrows()]
        return frame.assign(devices=[p[0] for p in pooled], code_versions=[p[1] for p in pooled])

    def status(self, variant: str) -> tuple[str, str]:
        """Return ("ok" | "failed" | "incomplete" | "not run", reason) of a variant.

        Complete means that every seed has its training and evaluation.
        """
        mine = [r for r in self.records if r["run"]["variant"] == variant]
        failed = [r for r in mine if r["status"] == "failed"]
        if failed:
            return "failed", f"seed {failed[0]['run']['seed']}, {failed[0]['what']}: {failed[0]['reason']}"
        done = {r["run"]["seed"] for r in mine if r["what"] == "evaluation"}
        other = sorted({file.parent.name for file in self.strangers if file.parent.parent.name == variant})
        if not done:
            return "not run", f"made by another recipe: {', '.join(other)}" if other else "no evaluation"
        if missing := [s for s in self.seeds(variant) if s not in done]:
            return "incomplete", f"{len(done)} of {len(done) + len(missing)} seeds"
        return "ok", ""

    @cached_property
    def per_image(self) -> dict[str, dict[int, dict[str, np.ndarray]]]:
        """Return {variant: {seed: {"correct": bool [N], ...}}}, the payloads decoded."""
        from convx.evaluate.payload import decode

        found: dict = {}
        for record in self.records:
            if record["what"] == "evaluation" and record["per_image"]:
                run = record["run"]
                found.setdefault(run["variant"], {})[run["seed"]] = {
                    k: decode(v) for k, v in record["per_image"].items()
                }
        return found

    def history(self, variant: str, seed: int) -> pd.DataFrame | None:
        """Return the history of a run, or None where there is none, or none that can be read (the log says so)."""
        file = self.folder / "histories" / variant / f"seed{seed}.csv"
        if not file.exists():
            return None
        try:
            text = file.read_text(encoding="utf-8")
            frame = pd.read_csv(io.StringIO(text))
            if not text.endswith("\n") or "epoch" not in frame or not (frame.empty or is_numeric_dtype(frame["epoch"])):
                raise ValueError("it is no table of numbers by epoch, or was cut off")
        except ValueError as error:  # pandas' own errors are ValueErrors too
            log.warning("ignored %s: %s", file, " ".join(str(error).split()))
            return None
        return frame

    @property
    def claims_study(self) -> dict:
        """Return the facts of the study that decide which claims are comparable."""
        return claims.study_facts(self.study)

    @property
    def exact(self) -> dict | None:
        """Return the numbers of the exact checks, or None where they were not run."""
        file = self.folder / "exact.json"
        if not file.exists():
            return None
        try:
            return _checked_exact(read_json(file))
        except ValueError as error:
            text = f"{file.name} cannot be used: {str(error).removeprefix(f'{file}: ')}"
            return {claim["check"]: {"error": text} for claim in claims.load_ledgers() if claim["check"]}


def _checked_exact(numbers) -> dict:
    """Return the numbers of the exact checks if each is a number or an error in words."""
    if not isinstance(numbers, dict):
        raise ValueError("it holds no mapping of checks")
    for check, found in numbers.items():
        fine = isinstance(found, dict) and (
            isinstance(found.get("error"), str) or type(found.get("value")) in (int, float)
        )
        if not fine:
            raise ValueError(f"{check}: neither a number nor an error in words")
    return numbers
