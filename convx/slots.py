"""The slots of a study: what is there of each run, what is missing, and what that would cost. No torch.

A slot is the unit of work that is handed out: one Snakemake target. ``<variant>_seed<k>`` trains and evaluates one run,
``<variant>_cost`` measures latency and energy of a variant on a machine that is left alone, ``exact.json`` runs the checks.
"""

from dataclasses import dataclass, field
from pathlib import Path

from convx import config
from convx.checks import ConfigError
from convx.manifest import read_json
from convx.merge import made_by
from convx.plan import METRICS, Plan
from convx.records import read_record

EXACT_SECONDS = 60.0  # of one core, for the exact checks of all papers
TRAINING_SAMPLE = 10_000  # training images that an evaluation looks at, too
GRADIENT = 3.0  # forward passes that a forward and backward pass is worth


@dataclass
class Slot:
    """One target of the workflow that is not finished."""

    study: str
    kind: str  # run | cost | exact
    variant: str
    seed: int | None
    state: str  # missing | trained (its evaluation is missing) | failed | other recipe
    target: str
    command: str
    after: list[str] = field(default_factory=list)  # targets that it needs first
    core_seconds: float | None = None
    note: str = ""


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def slot_name(variant: str, seed: int) -> str:
    """Return the name of the target that makes one run."""
    return f"{variant}_seed{seed}"


class Slots:
    """What is there and what is missing of one study; ``root`` is the folder that the workflow runs in."""

    def __init__(self, file: str | Path, root: str | Path = "."):
        self.file, self.root = str(file), Path(root)
        self.plan = Plan(config.read_yaml(file), str(file))
        self.study, self.name = self.plan.study, self.plan.name

    @property
    def folder(self) -> Path:
        return self.root / "results" / self.name

    def record(self, variant: str, seed: int, what: str) -> tuple[str, str]:
        """Return (state, reason) of a metrics file: ok, failed, missing, or of another recipe than the study's."""
        file = self.folder / "metrics" / variant / f"seed{seed}" / f"{what}.json"
        if not file.exists():
            return "missing", ""
        try:
            record = read_record(file, variant, seed)
        except ConfigError as error:
            return "failed", str(error)
        if not made_by(self.study, record):
            return "other recipe", f"{file} was made by another recipe than the study's"
        return ("failed", record["reason"]) if record["status"] == "failed" else ("ok", "")

    def weights(self, variant: str, seed: int) -> bool:
        """Return whether the weights of a run are on this machine."""
        return (self.folder / "runs" / variant / f"seed{seed}" / "model.safetensors").exists()

    def all(self) -> list[Slot]:
        """Return every slot that is not finished, in the study's order, starts before what starts from them."""
        found = [slot for variant, seed in self.plan.runs if (slot := self.run_slot(variant, seed))]
        if self.plan.measures_cost:
            found += [slot for variant in self.study["variants"] if (slot := self.cost_slot(variant))]
        if not (self.folder / "exact.json").exists():
            target = f"results/{self.name}/exact.json"
            slot = self._slot("exact", "", None, "missing", target)
            slot.core_seconds = EXACT_SECONDS
            found.append(slot)
        return found

    def _slot(self, kind: str, variant: str, seed: int | None, state: str, target: str, threads: int = 1) -> Slot:
        # The targets come first: --configfile takes every word that follows it.
        command = f"snakemake {target} --cores {threads} --configfile {self.file}"
        return Slot(self.name, kind, variant, seed, state, target, command)

    def run_slot(self, variant: str, seed: int) -> Slot | None:
        """Return the slot of a run, or None where its metrics are all there."""
        states = {what: self.record(variant, seed, what) for what in METRICS}
        wrong = [(state, reason) for state, reason in states.values() if state != "ok"]
        if not wrong:
            return None
        order = ("failed", "other recipe", "missing")
        state, reason = min(wrong, key=lambda pair: order.index(pair[0]))
        if state == "missing" and states["training"][0] == "ok" and self.weights(variant, seed):
            state = "trained"
        threads = self.plan.recipe(variant, seed)["training"]["threads"]
        slot = self._slot("run", variant, seed, state, slot_name(variant, seed), threads)
        slot.note = f"{reason}; `convx retry {self.folder} {variant}` makes it again" if state == "failed" else reason
        if (start := self.start(variant)) and state != "trained" and not self.weights(start, seed):
            slot.after = [slot_name(start, seed)]
            if self.run_slot(start, seed) is None:
                slot.note = _joined(
                    slot.note, f"{start} seed {seed} is trained again: its weights are not on this machine"
                )
        return slot

    def start(self, variant: str) -> str | None:
        """Return the variant that a variant starts from, or None."""
        return config.variant_settings(self.study, variant)["start_from"]

    def cost_slot(self, variant: str) -> Slot | None:
        """Return the slot of a cost measurement, or None where it is there."""
        seed = config.seeds(self.study, variant)[0]
        state, reason = self.record(variant, seed, "cost")
        if state == "ok":
            return None
        slot = self._slot("cost", variant, seed, state, f"{variant}_cost")
        slot.note = f"{reason}; `convx retry {self.folder} {variant}` makes it again" if state == "failed" else reason
        baseline = self.study["baseline"]
        for name in dict.fromkeys((baseline, variant)):
            first = config.seeds(self.study, name)[0]
            if not self.weights(name, first):
                slot.after.append(slot_name(name, first))
                if self.run_slot(name, first) is None:
                    slot.note = _joined(
                        slot.note, f"{name} seed {first} is trained again: its weights are not on this machine"
                    )
        return slot

    # -------------------------------------------------------------------------------------------------------------- costs

    def images(self) -> dict[str, int] | None:
        """Return the number of training, validation and test images, or None for a folder that nobody has counted yet."""
        from convx.data.sets import SETS

        meta = self.root / "resources" / "data" / self.plan.data_key / "meta.json"
        if meta.exists():
            return {key: read_json(meta)["counts"][key] for key in ("train", "validation", "test")}
        data, facts = self.study["data"], SETS[self.study["data"]["name"]]
        train, test = data["train_images"], data["test_images"]
        train, test = facts.train if train is None else train, facts.test if test is None else test
        if None in (train, test):
            return None
        share = data["validation"]
        validation = round(train * share) if share < 1 else int(share)
        return {"train": train - validation, "validation": validation, "test": test}

    def training_seconds(self, recipe: dict, pace: dict) -> float:
        """Return the core-seconds of a training, from the seconds of an image."""
        images, epochs = self.images(), recipe["training"]["epochs"]
        forwards = images["validation"] * (epochs + 1)
        return images["train"] * epochs * pace["train_seconds_per_image"] + forwards * pace["forward_seconds_per_image"]

    def evaluation_seconds(self, pace: dict) -> float:
        """Return the core-seconds of an evaluation: every image that goes through the network, a gradient as three."""
        images, wanted = self.images(), self.study["evaluate"]
        passes = images["test"] + min(TRAINING_SAMPLE, images["train"])
        if corruption := wanted["corruption"]:
            cells = len(corruption["corruptions"] or range(15)) * len(corruption["severities"])
            passes += cells * min(corruption["images"] or images["test"], images["test"])
        if attacks := wanted["attacks"]:
            attacked = min(attacks["images"] or images["test"], images["test"])
            steps, radii = attacks["pgd_steps"], len(attacks["epsilons"])
            passes += attacked * (GRADIENT + radii * (1 + (steps * GRADIENT + 1 if steps else 0)))
        return passes * pace["forward_seconds_per_image"]

    def price(self, slot: Slot, paces: dict[str, dict | None]) -> None:
        """Write the core-seconds of a slot into it, where the pace of its variant is known."""
        if slot.kind == "exact":
            return
        if slot.kind == "cost":
            latency, energy = (self.study["evaluate"][key] for key in ("latency", "energy"))
            conditions = len(latency["batches"]) * len(latency["threads"]) * len(latency["dtypes"]) if latency else 0
            slot.core_seconds = (latency or {"seconds": 0})["seconds"] * conditions + (energy or {"seconds": 0})[
                "seconds"
            ]
            both = dict.fromkeys((self.study["baseline"], slot.variant))
            again = [(name, config.seeds(self.study, name)[0]) for name in both]
        else:
            pace = paces.get(slot.variant)
            if pace is None or "reason" in pace or self.images() is None:
                slot.note = _joined(slot.note, (pace or {}).get("reason", ""))
                return
            trained = slot.state == "trained"
            training = 0.0 if trained else self.training_seconds(self.plan.recipe(slot.variant, slot.seed), pace)
            slot.core_seconds = training + self.evaluation_seconds(pace)
            again = [(name, slot.seed)] if (name := self.start(slot.variant)) and not trained else []
        for name, seed in again:  # finished, but its weights are elsewhere
            gone = not self.weights(name, seed) and self.run_slot(name, seed) is None
            if gone and (pace := paces.get(name)) and "reason" not in pace:
                slot.core_seconds += self.training_seconds(self.plan.recipe(name, seed), pace)
