"""Accidents to a study: kill it at a random place of one of its stages, run the same command again, compare the bits.

Used by the tests (a few kills) and by benchmarks/survival.py (twenty).
"""

import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from house import TINY, House

STUDY = TINY | {
    "recipes": {
        "train": {"epochs": 8, "batch_size": 32, "lr": 0.05, "weight_decay": 0.0005, "checkpoints": [1, 5]},
        "finetune": {"epochs": 1, "batch_size": 32, "optimizer": "adamw", "lr": 0.0005, "weight_decay": 0.05},
    },
    "variants": {"cnn": None, "cnn_frozen": None},
    "evaluate": {
        "corruption": {"protocol": "imagenet_c", "corruptions": ["fog", "elastic_transform"], "severities": [1, 3, 5]},
        "attacks": {"epsilons": [1]},
    },
}
COMMAND = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", "config/tiny.yaml"]
DRAWN = ("accuracy", "corruption_heatmap", "clean_against_corrupted", "training_curves")  # nothing of these is timed
TIMED = ("train_seconds", "train_images_per_second", "training_energy", "training_carbon", "peak_rss")  # measured

# Stage -> (what shows that it has begun, seconds that it takes or so).
STAGES = {
    "data": ("resources/data/.*.partial/*", 0.5),
    "corruption": ("resources/corrupted/*/*/*.npy.part", 2.0),
    "training": ("resources/progress/*/state.pt", 4.0),
    "weights": ("results/tiny/runs/*/seed0/model.safetensors", 0.5),
    "evaluation": ("results/tiny/metrics/*/seed0/.evaluation.attempt", 3.0),
    "tables": ("results/tiny/tables/.*", 0.3),
    "figures": ("results/tiny/figures/.*", 3.0),
}
VICTIMS = ("everything", "snakemake", "a job")


@dataclass(frozen=True)
class Kill:
    """One accident: after ``delay`` seconds of a stage, SIGKILL for a victim."""

    stage: str
    victim: str
    delay: float

    def __str__(self) -> str:
        return f"{self.stage}, {self.victim}, +{self.delay:.2f} s"


def draw(rng: random.Random, stage: str, victim: str | None = None) -> Kill:
    """Draw an accident in a stage."""
    return Kill(stage, victim or rng.choice(VICTIMS), rng.uniform(0, STAGES[stage][1]))


def house_of(root: Path) -> House:
    """Return a house of the study. The exact checks, which take longer than all the rest, are left out of it."""
    house = House.build(root, STUDY)
    house.write()
    house.results().mkdir(parents=True)
    house.results("exact.json").write_text("{}\n")
    return house


def start(house: House, *targets: str, **environment) -> subprocess.Popen:
    """Start the workflow of a house in the background."""
    return subprocess.Popen(
        [*COMMAND[:3], *targets, *COMMAND[3:]],
        cwd=house.root,
        env=house.environment | {"CONVX_SAVE_SECONDS": "0"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def descendants(pid: int) -> list[psutil.Process]:
    """Return the living processes below one."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_job(process: psutil.Process) -> bool:
    """Return whether a process is a verb of convx: not Snakemake, not the shell around the verb."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return any(Path(word).name == "convx" for word in words[:2]) or "multiprocessing" in " ".join(words[:3])


def strike(house: House, kill: Kill, *targets: str, timeout: float = 240) -> str:
    """Run the workflow, and kill the victim in the wanted stage; returns what was killed."""
    process = start(house, *targets)
    pattern, deadline = STAGES[kill.stage][0], time.monotonic() + timeout
    while not any(house.root.glob(pattern)):
        if process.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    else:
        time.sleep(kill.delay)
    below = descendants(process.pid)
    jobs = [child for child in below if is_job(child)]
    if kill.victim == "everything" or (kill.victim == "a job" and not jobs):
        struck = [*below, psutil.Process(process.pid)] if process.poll() is None else below
    else:
        struck = jobs[:1] if kill.victim == "a job" else [psutil.Process(process.pid)] if process.poll() is None else []
    names = []
    for victim in struck:
        try:
            words = victim.cmdline()
            victim.send_signal(signal.SIGKILL)
            names.append(next((w for w in words[1:] if w in VERBS), Path(words[0]).name) if words else "?")
        except psutil.Error:
            continue
    process.wait(timeout)  # Snakemake itself ends when a job of it is killed
    return f"{kill}: {', '.join(names) or 'it was over already'}"


VERBS = ("data", "corrupt", "recipe", "study", "train", "evaluate", "tables", "figures", "page", "snakemake")


def finish(house: House, *targets: str) -> None:
    """Run the same command again, to the end."""
    result = house.snakemake(*targets, timeout=600, CONVX_SAVE_SECONDS="0")
    assert result.returncode == 0, result.stdout[-4000:]


def fingerprint(house: House) -> dict[str, str]:
    """Return {name: digest} of everything that must have the same bits: weights, kept epochs, histories, metrics,
    corrupted images, figures. Times and energies are no bits of a result."""
    found = {}
    for file in sorted(house.root.glob("results/tiny/runs/**/*.safetensors")):
        found[file.relative_to(house.root).as_posix()] = _sha(file.read_bytes())
    for file in sorted(house.root.glob("results/tiny/histories/*/*.csv")):
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file.open())]
        found[file.relative_to(house.root).as_posix()] = _sha(json.dumps(rows).encode())
    for file in sorted(house.root.glob("results/tiny/metrics/*/*/*.json")):
        record = json.loads(file.read_text())
        assert record["status"] == "ok", record["reason"]
        rows = [row for row in record["rows"] if row["metric"] not in TIMED]
        kept = {key: record[key] for key in ("run", "what", "per_image", "arrays", "recipe_digest", "data_digest")}
        found[file.relative_to(house.root).as_posix()] = _sha(json.dumps([rows, kept], sort_keys=True).encode())
    for file in sorted(house.root.glob("resources/corrupted/*/*/*.npy")):
        found[file.relative_to(house.root).as_posix()] = _sha(file.read_bytes())
    for name in DRAWN:
        for kind in ("svg", "png"):
            if (file := house.results("figures", f"{name}.{kind}")).exists():
                found[f"{name}.{kind}"] = _sha(file.read_bytes())
    return found


def left_over(house: House) -> list[str]:
    """Return what no finished study leaves: temporary files and folders, notes of attempts, progress."""
    found = []
    for part in ("results", "resources"):
        for path in (house.root / part).rglob("*"):
            hidden = (
                path.name.startswith(".") and not path.name.endswith(".lock") and path.name != ".snakemake_timestamp"
            )
            if hidden or path.name.endswith((".part", ".partial", ".tmp")) or path.parent.name == "progress":
                found.append(path.relative_to(house.root).as_posix())
    return sorted(found)


def alive(house: House) -> list[psutil.Process]:
    """Return the processes that still work in a house."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and Path(process.cwd()) == house.root and process.status() != "zombie":
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def wait_until_quiet(house: House, seconds: float = 60) -> list[psutil.Process]:
    """Wait until no process works in a house; returns those that still do."""
    deadline = time.monotonic() + seconds
    while (left := alive(house)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
