"""What the workflow asks: paths, parameters and inputs of every job of one study. No torch; no rule holds logic.

The Snakefile makes one ``Plan`` and its rules name the plan's methods as input and params functions. Every method that takes
``wildcards`` answers for one run.
"""

import json
import os
import sys
from functools import cached_property
from pathlib import Path

from convx import config, devices
from convx.checks import read_yaml
from convx.config import ConfigError
from convx.source import ledger_digest, source_digest

METRICS = ("training", "evaluation")  # of every run; "cost" is of a variant's first seed


def prefer_this_python() -> None:
    """Let jobs find the `convx` of the Python that runs Snakemake, also when its environment is not activated."""
    here = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != here:
        os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])


class Plan:
    """The jobs of one study."""

    def __init__(self, study: dict, where: str, files=()):
        for file in files:  # Snakemake has read them; it takes the last of two values of one key without a word
            read_yaml(file)
        self.study = config.load_study(study, where)
        self.name = self.study["study"]
        self.data_key = config.data_key(self.study["data"])
        self.corruption_key = config.corruption_key(self.study)
        self.measures_cost = bool(self.study["evaluate"]["latency"] or self.study["evaluate"]["energy"])
        self._recipes: dict[tuple[str, int], dict] = {}
        self._sources: dict[tuple[str, str], str] = {}

    # ---------------------------------------------------------------------------------------------------------------- runs

    @cached_property
    def runs(self) -> dict[tuple[str, int], None]:
        """Every (variant, seed) of the study, in order."""
        return {(name, seed): None for name in self.study["variants"] for seed in config.seeds(self.study, name)}

    def _run(self, wildcards) -> tuple[str, int]:
        return wildcards.variant, int(wildcards.seed)

    def recipe(self, variant: str, seed: int) -> dict:
        """Return the resolved recipe of a run."""
        if (variant, seed) not in self._recipes:
            if (variant, seed) not in self.runs:
                raise ConfigError(f"run {variant} seed {seed} is not in the study {self.name}")
            self._recipes[variant, seed] = config.resolve(self.study, variant, seed)
        return self._recipes[variant, seed]

    def _source(self, verb: str, wildcards) -> str:
        variant, seed = self._run(wildcards)
        if (verb, variant) not in self._sources:
            self._sources[verb, variant] = source_digest(verb, self.recipe(variant, seed))
        return self._sources[verb, variant]

    # -------------------------------------------------------------------------------------------------------------- params

    def study_json(self, wildcards=None) -> str:
        """Return the checked study as compact JSON."""
        return json.dumps(self.study, separators=(",", ":"))

    def recipe_json(self, wildcards) -> str:
        """Return the frozen recipe of a run as compact JSON."""
        return json.dumps(self.recipe(*self._run(wildcards)), separators=(",", ":"))

    def data_json(self, wildcards) -> str:
        """Return the settings of the data set as compact JSON."""
        return json.dumps(self.study["data"], separators=(",", ":"))

    def corruption_json(self, wildcards) -> str:
        """Return the settings of the corrupted test set as compact JSON."""
        return json.dumps(self.study["evaluate"]["corruption"], separators=(",", ":"))

    def mirrors(self, wildcards=None) -> list[str]:
        """Return the mirrors of the study."""
        return self.study["mirror"]

    def data_source(self, wildcards) -> str:
        return source_digest("data")

    def corrupt_source(self, wildcards) -> str:
        return source_digest("corrupt")

    def train_source(self, wildcards) -> str:
        return self._source("train", wildcards)

    def evaluate_source(self, wildcards) -> str:
        return self._source("evaluate", wildcards)

    def measure_source(self, wildcards) -> str:
        return self._source("measure", wildcards)

    def evaluate_json(self, wildcards) -> str:
        """Return what the evaluation of a run consumes of the study."""
        wanted = ("batch_size", "corruption", "attacks")
        return json.dumps({k: self.study["evaluate"][k] for k in wanted}, separators=(",", ":"))

    def measure_json(self, wildcards) -> str:
        """Return what the cost measurement of a variant consumes of the study."""
        settings = {k: self.study["evaluate"][k] for k in ("latency", "energy")}
        return json.dumps(settings | {"carbon": self.study["carbon"]}, separators=(",", ":"))

    def carbon_json(self, wildcards) -> str:
        """Return how energy becomes carbon, as compact JSON."""
        return json.dumps(self.study["carbon"], separators=(",", ":"))

    def threads(self, wildcards) -> int:
        """Return the CPU threads of a training."""
        return self.recipe(*self._run(wildcards))["training"]["threads"]

    def report_source(self, wildcards) -> str:
        return source_digest("report") + ledger_digest()

    def exact_source(self, wildcards) -> str:
        return source_digest("exact") + ledger_digest()

    def gpu(self, wildcards) -> int:
        """Return the GPU slots that a job of this study takes: one with ``device: cuda``, with ``auto`` if there are any here."""
        return int(self.study["device"] == "cuda" or (self.study["device"] == "auto" and bool(devices.visible_gpus())))

    def memory(self, wildcards, attempt) -> int:
        """Return the memory in MB that a job asks for, by the size of the images (a bound, not a measurement).

        A job that is tried again asks for as much more.
        """
        native = 224 if self.study["data"]["name"] == "folder" else 64
        return attempt * (3000 if (self.study["data"]["image_size"] or native) <= 64 else 16000)

    # -------------------------------------------------------------------------------------------------------------- inputs

    def data(self, wildcards=None) -> str:
        return f"resources/data/{self.data_key}/meta.json"

    def corrupted(self, wildcards=None) -> list[str]:
        """Return the corrupted test set that evaluations need, as a list of none or one."""
        if not self.corruption_key:
            return []
        return [f"resources/corrupted/{self.data_key}/{self.corruption_key}/meta.json"]

    def start(self, wildcards) -> list[str]:
        """Return the weights that a run starts from, as a list of none or one."""
        start = self.recipe(*self._run(wildcards))["start"]
        if not start:
            return []
        return [f"results/{self.name}/runs/{start['variant']}/seed{wildcards.seed}/model.safetensors"]

    def teacher(self, wildcards) -> list[str]:
        """Return the weights that a run learns from, as a list of none or one."""
        teacher = self.recipe(*self._run(wildcards)).get("teacher")
        if not teacher:
            return []
        return [f"results/{self.name}/runs/{teacher['variant']}/seed{wildcards.seed}/model.safetensors"]

    def reference(self, wildcards) -> list[str]:
        """Return recipe and weights of the baseline's first run, which latencies are paired with."""
        baseline = self.study["baseline"]
        if wildcards.variant == baseline:
            return []
        seed = config.seeds(self.study, baseline)[0]
        return [
            f"results/{self.name}/recipes/{baseline}/seed{seed}.json",
            f"results/{self.name}/runs/{baseline}/seed{seed}/model.safetensors",
        ]

    # ------------------------------------------------------------------------------------------------------------- targets

    @cached_property
    def metrics(self) -> list[str]:
        """Every metrics file that the study promises."""
        files = [file for run in self.runs for file in self.run_files(*run)]
        return [*files, *self.cost_files.values(), f"results/{self.name}/exact.json"]

    def run_files(self, variant: str, seed: int) -> list[str]:
        """Return the metrics files of one run."""
        return [f"results/{self.name}/metrics/{variant}/seed{seed}/{what}.json" for what in METRICS]

    @cached_property
    def cost_files(self) -> dict[str, str]:
        """Return {variant: metrics file of its cost}, of the first seed; empty where the study measures none."""
        if not self.measures_cost:
            return {}
        first = {variant: config.seeds(self.study, variant)[0] for variant in self.study["variants"]}
        return {v: f"results/{self.name}/metrics/{v}/seed{seed}/cost.json" for v, seed in first.items()}

    def table_inputs(self, workflow):
        """Return the input function of the tables.

        Everything that the study promises, or, when only `figures` or `report` were asked for, what exists: one missing
        metric would otherwise schedule a training. The targets of the command line are not known while the rules are
        parsed, so they are looked up when the function is called; this is the one place that relies on the attribute.
        """

        def inputs(wildcards):
            targets = set(workflow.dag_settings.targets or [])
            if targets and targets <= {"figures", "report"}:
                return [file for file in self.metrics if Path(file).exists()]
            return self.metrics

        return inputs
