"""The cluster profiles: what each would submit, and a study through a real Slurm, with a job killed on the way."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import slurm_nodes
import yaml
from house import REPOSITORY, TINY, House
from test_distributed import NETWORK

PROFILES = sorted(path.name for path in (REPOSITORY / "profiles").iterdir())
# Where Snakemake's plugins for clusters are, if not in the environment itself: with Slurm's client programs installed and no
# controller, the plugin makes every start of Snakemake ten seconds longer, whether it is used or not.
PLUGINS = os.environ.get("CONVX_CLUSTER_PLUGINS", "")
TARGETS = [f"results/tiny/metrics/cnn/seed0/{what}.json" for what in ("training", "evaluation")]


def plugin(name: str) -> None:
    """Skip where a plugin is neither in the environment nor in the folder of plugins."""
    module = f"snakemake_executor_plugin_{name}"
    if not importlib.util.find_spec(module) and not (Path(PLUGINS) / module).is_dir():
        pytest.skip(f"{module} is not installed; pip install --target a folder, named by CONVX_CLUSTER_PLUGINS")


def run(house: House, *words: str, **environment) -> subprocess.CompletedProcess:
    paths = [str(house.root), *([PLUGINS] if PLUGINS else [])]
    return house.snakemake(*words, PYTHONPATH=os.pathsep.join(paths), **environment)


@pytest.mark.parametrize("name", PROFILES)
def test_every_line_of_a_profile_says_what_it_is_for(name):
    """Each key has a comment on its line, or above it where its value takes the lines below; so do the scripts beside it."""
    folder = REPOSITORY / "profiles" / name
    lines = (folder / "profile.yaml").read_text().splitlines()
    assert yaml.safe_load("\n".join(lines))["nolock"]
    indent = lambda line: len(line) - len(line.lstrip())  # noqa: E731
    for place, line in enumerate(lines):
        text = line.strip()
        if not text or text.startswith("#") or ":" not in text.split()[0]:
            continue
        parents = [upper for upper in lines[:place] if indent(upper) < indent(line)]
        told = "#" in text or lines[place - 1].strip().startswith("#") or (parents and "runtime" in text)
        assert told or text.endswith(":"), f"{name}: {text}"
    for script in folder.glob("*.sh"):
        assert script.read_text().splitlines()[1].startswith("# ") and os.access(script, os.X_OK)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PROFILES if name != "default"])
def test_dry_run(name, tmp_path):
    """Each profile parses with its plugin and plans the study; jobs carry what the profile asks for."""
    plugin({"kubernetes": "cluster_generic"}.get(name, name).replace("-", "_"))
    house = House.build(tmp_path / "house", TINY | {"device": "cuda"})
    result = run(house, "--workflow-profile", f"profiles/{name}", "--dry-run")
    assert result.returncode == 0, result.stdout
    jobs = dict(part.split(":", 1) for part in result.stdout.split("\nrule ")[1:])
    resources = {
        rule: text.split("resources: ")[1].splitlines()[0] for rule, text in jobs.items() if "resources: " in text
    }
    assert "runtime=720" in resources["train"] and "gpu=1" in resources["train"] and "mem_mb=3000" in resources["train"]
    assert "runtime=120" in resources["evaluate"] and "gpu=1" in resources["measure"]
    alone = {"slurm": "slurm_extra=--exclusive", "kubernetes": "alone=1", "cluster-generic": "place= -l place=excl"}[
        name
    ]
    assert alone in resources["measure"] and alone not in resources["train"]


# ------------------------------------------------------------------------------------------------ a stand-in for Kubernetes

KUBECTL = """#!{python}
# Stands in for kubectl: runs a job's container on this machine and remembers how it ended.
import json, pathlib, subprocess, sys
jobs = pathlib.Path(__file__).parent
if sys.argv[1] == "apply":
    job = json.load(sys.stdin)
    (jobs / (job["metadata"]["name"] + ".json")).write_text(json.dumps(job))
    pod = job["spec"]["template"]["spec"]["containers"][0]
    code = subprocess.run(pod["command"], cwd=pod["workingDir"]).returncode
    (jobs / (job["metadata"]["name"] + ".status")).write_text("1/" if code == 0 else "/1")
else:
    status = jobs / (sys.argv[5] + ".status")
    if not status.exists():
        sys.exit("Error from server (NotFound)")
    print(status.read_text(), end="")
"""


@pytest.mark.slow
def test_kubernetes_jobs_mount_the_volume_and_run(tmp_path):
    """The profile's own scripts, with a kubectl that runs a job's container here."""
    plugin("cluster_generic")
    house = House.build(tmp_path / "house", TINY | {"evaluate": {"batch_size": 60}, "variants": {"cnn": None}})
    (tmp_path / "bin").mkdir()
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.write_text(KUBECTL.format(python=sys.executable))
    kubectl.chmod(0o755)
    path = f"{kubectl.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = ["--workflow-profile", "profiles/kubernetes", "--latency-wait", "5", "--seconds-between-status-checks", "1"]
    result = run(house, TARGETS[0], *words, PATH=path)
    assert result.returncode == 0, result.stdout
    jobs = [json.loads(file.read_text()) for file in kubectl.parent.glob("*.json")]
    assert len(jobs) == 2 and {len(list(kubectl.parent.glob("*.status")))} == {
        2
    }  # data and train; the recipe runs here
    job = max(jobs, key=lambda job: job["spec"]["activeDeadlineSeconds"])
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["activeDeadlineSeconds"] == 720 * 60 and job["spec"]["backoffLimit"] == 0
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "1", "memory": "3000M", "nvidia.com/gpu": "0"}
    assert pod["containers"][0]["volumeMounts"][0] == {"name": "shared", "mountPath": "/convx"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "convx"}


# -------------------------------------------------------------------------------------------------------------- a real Slurm


@pytest.fixture(scope="module")
def slurm():
    plugin("slurm")
    if reason := slurm_nodes.absent():
        pytest.skip(reason)
    before = {p.pid for p in psutil.process_iter() if p.name() in slurm_nodes.PROGRAMS}
    with slurm_nodes.slurm() as found:
        yield found
    left = {p.pid for p in psutil.process_iter() if p.name() in slurm_nodes.PROGRAMS and slurm_nodes.alive(p.pid)}
    assert left <= before and not slurm_nodes.CONFIGURATION.exists() and not found.root.exists()


SUBMIT = ["--workflow-profile", "profiles/slurm", "--slurm-no-account", "--slurm-status-command", "squeue"]
SUBMIT += [
    "--slurm-init-seconds-before-status-checks",
    "1",
    "--seconds-between-status-checks",
    "1",
    "--latency-wait",
    "10",
]


def small(**changes) -> dict:
    numbers = {"epochs": 40, "batch_size": 32, "lr": 0.05, "weight_decay": 0.0005}
    evaluate = {"latency": {"batches": [1], "rounds": 10, "seconds": 0.2}}
    return TINY | {"variants": {"cnn": None}, "recipes": {"train": numbers}, "evaluate": evaluate} | changes


def rows(house: House, what: str) -> list:
    """Return the rows of a metrics file but those that a clock or the memory of the process made."""
    record = json.loads(house.results("metrics", "cnn", "seed0", f"{what}.json").read_text())
    assert record["status"] == "ok", record["reason"]
    clock = ("seconds", "per_second", "energy", "carbon", "peak_rss")
    return [row for row in record["rows"] if not any(word in row["metric"] for word in clock)]


def wait_for(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_study_through_slurm_survives_a_killed_job(slurm, tmp_path):
    """Same metrics as on this machine alone, though the training's job is killed as soon as it has saved its progress."""
    house = House.build(tmp_path / "slurm", small())
    house.write()
    environment = house.environment | {"PYTHONPATH": f"{house.root}{os.pathsep}{PLUGINS}", "CONVX_SAVE_SECONDS": "0.1"}
    command = [sys.executable, "-m", "snakemake", *TARGETS, TARGETS[0].replace("training", "cost"), *SUBMIT]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            [*command, "--cores", "2", "--configfile", "config/tiny.yaml"],
            cwd=house.root,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    state = house.root / "resources" / "progress"
    wait_for(lambda: any(state.glob("*/state.pt")) or process.poll() is not None)
    killed = slurm.job("rule_train", "RUNNING")
    slurm.ask("scancel", "--full", "--signal=KILL", killed["JobId"])
    assert process.wait(300) == 0, (tmp_path / "output").read_text()[-5000:]
    assert "continuing at epoch" in house.root.joinpath("logs/tiny/train/cnn.seed0.log").read_text()
    again = slurm.job("rule_train", "COMPLETED")
    assert again["JobId"] != killed["JobId"]
    # What the profile asks for: time, and at the second attempt more of it and more memory; the timing has its node alone.
    assert (killed["TimeLimit"], again["TimeLimit"]) == ("12:00:00", "1-00:00:00")
    assert (killed["MinMemoryNode"], again["MinMemoryNode"]) == ("3000M", "6000M")
    measure = slurm.job("rule_measure")
    assert measure["OverSubscribe"] == "NO" and measure["CPUs/Task"] == "2" and again["OverSubscribe"] == "OK"
    assert again["Partition"] == "main" and slurm.job("rule_evaluate")["TimeLimit"] == "02:00:00"
    assert len([job for job in slurm.jobs() if job["JobState"] != "COMPLETED"]) == 1

    local = House.build(tmp_path / "local", small())
    result = local.snakemake(*TARGETS)
    assert result.returncode == 0, result.stdout
    for what in ("training", "evaluation"):
        assert rows(house, what) == rows(local, what) != []
    weights = [h.results("runs", "cnn", "seed0", "model.safetensors").read_bytes() for h in (house, local)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_one_training_on_two_nodes(slurm, tmp_path):
    """`nodes: 2` in the profile: torchrun on both nodes of a Slurm job; the loss is that of one process."""
    (tmp_path / "network.py").write_text(NETWORK)
    host = {"name": f"{tmp_path}/network.py:network"}
    numbers = {"epochs": 5, "batch_size": 45, "lr": 0.02, "flip": True}
    study = small(host=host, recipes={"train": numbers})
    houses = [House.build(tmp_path / name, study) for name in ("slurm", "local")]
    nodes = ["--set-resources", "train:nodes=2", "train:tasks=2", "train:mpi=srun"]
    result = run(houses[0], TARGETS[0], *SUBMIT, *nodes)
    assert result.returncode == 0, result.stdout
    job = slurm.job("rule_train", "COMPLETED")
    assert job["NumNodes"] == "2" and job["NodeList"] in ("one,two", "two,one")
    shutil.copytree(houses[0].root / "resources" / "data", houses[1].root / "resources" / "data")
    assert houses[1].snakemake(TARGETS[0]).returncode == 0
    histories = [h.results("histories", "cnn", "seed0.csv").read_text().splitlines() for h in houses]
    place = histories[0][0].split(",").index("train_loss")
    losses = [[float(line.split(",")[place]) for line in lines[2:]] for lines in histories]
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    record = json.loads(houses[0].results("metrics", "cnn", "seed0", "training.json").read_text())
    assert record["environment"]["processes"] == 2
