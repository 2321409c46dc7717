"""Several processes train one run as one process does: the same batches, shared; the same curve; the same accidents survived."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_recipe
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn

from convx import config, distributed, steps
from convx.manifest import Failure, write_json
from convx.objectives import Objective
from convx.training import Progress, Trainer

NETWORK = """
import torch
from torch import nn

def network(num_classes, in_channels, image_size, norm="group"):
    made = nn.BatchNorm2d if norm == "batch" else lambda width: nn.GroupNorm(2, width)
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), made(8), nn.SiLU(), nn.Conv2d(8, 16, 3, stride=4, padding=1), made(16),
        nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, num_classes),
    )
"""
# 288 images to train on: six batches of 45, which two processes share as 22 and 23, and one of 18.
NUMBERS = {"epochs": 4, "batch_size": 45, "crop_padding": 2, "flip": True, "lr": 0.02, "ema": 0.9, "checkpoints": [2]}


@pytest.fixture
def network(tmp_path):
    file = tmp_path / "network.py"
    file.write_text(NETWORK)
    return f"{file}:network"


def recipe_of(network, settings=None, **training) -> dict:
    recipe = make_recipe(model=network, **(NUMBERS | training))
    recipe["model"]["settings"] = settings or {}
    return recipe | {"digest": config.recipe_digest(recipe)}


class Run:
    """One run of a recipe on the digits, in a folder of its own."""

    def __init__(self, root, recipe, digits):
        self.recipe, self.data = root / "recipe.json", digits / "meta.json"
        write_json(self.recipe, recipe)
        self.results, self.progress = root / "results" / "test", root / "progress"
        self.model = self.results / "runs" / "cnn" / "seed0" / "model.safetensors"

    def train(self, processes=1):
        steps.train(str(self.recipe), str(self.data), None, "s", {}, str(self.model), str(self.progress), processes)
        return self

    def start(self, processes: int, **environment) -> subprocess.Popen:
        words = ["train", self.recipe, "--data", self.data, "--source", "s", "--out", self.model]
        words += ["--progress", self.progress, "--processes", processes]
        return subprocess.Popen([sys.executable, "-m", "convx", *map(str, words)], env=os.environ | environment)

    @property
    def metrics(self) -> dict:
        return json.loads((self.results / "metrics" / "cnn" / "seed0" / "training.json").read_text())

    def curve(self, column="train_loss") -> list[float]:
        with open(self.results / "histories" / "cnn" / "seed0.csv", encoding="utf-8") as file:
            return [float(row[column]) for row in csv.DictReader(file) if row[column]]

    def weights(self) -> torch.Tensor:
        from safetensors.torch import load_file

        return torch.cat([tensor.flatten() for tensor in load_file(self.model).values()])


def same(ours: Run, other: Run) -> None:
    """Assert the same curves to 1e-5 and the same weights to 1e-4 of their norm."""
    epochs = json.loads(ours.recipe.read_text())["training"]["epochs"]
    for column, count in (("train_loss", epochs), ("validation_loss", epochs + 1), ("train_top1", epochs)):
        assert len(ours.curve(column)) == count
        assert ours.curve(column) == pytest.approx(other.curve(column), rel=1e-5, abs=1e-5)
    assert float((ours.weights() - other.weights()).norm() / other.weights().norm()) < 1e-4


@pytest.mark.parametrize(("count", "parts"), [(45, 2), (3, 3), (50, 4), (7, 1)])
def test_shares_are_the_whole_in_order(count, parts):
    rows = [distributed.share(count, parts, part) for part in range(parts)]
    assert [i for first, behind in rows for i in range(first, behind)] == list(range(count))
    assert {behind - first for first, behind in rows} <= {count // parts, count // parts + 1}


def test_draws_of_a_part_are_those_of_the_whole():
    def numbers(n):
        return torch.rand((2, n), generator=torch.Generator().manual_seed(1))

    whole = distributed.draw(numbers, 9, 1)
    with distributed._at_work((3, 7, 9)):
        assert distributed.draw(numbers, 4, 1).equal(whole[:, 3:7])
        with pytest.raises(AssertionError, match="draws for 5 images"):
            distributed.draw(numbers, 5, 1)
    assert distributed.draw(numbers, 9, 1).equal(whole)


def test_accumulated_gradients_are_those_of_the_whole_batch(network, digits, tmp_path):
    plain = Run(tmp_path / "plain", recipe_of(network), digits).train()
    parts = Run(tmp_path / "parts", recipe_of(network, accumulate=4), digits).train()
    same(parts, plain)
    assert not parts.weights().equal(plain.weights())  # else it was not done in parts
    assert json.loads(parts.recipe.read_text())["digest"] != json.loads(plain.recipe.read_text())["digest"]


def test_batch_normalisation_sees_the_parts(network, digits, tmp_path):
    curves = []
    for parts in (1, 3):
        recipe = recipe_of(network, {"norm": "batch"}, accumulate=parts, epochs=1, ema=None, checkpoints=[])
        trainer = Trainer(recipe, digits)
        with Progress(tmp_path, recipe, str(parts), "d", None) as progress:
            trainer.fit(progress)
        curves.append(trainer.history[-1]["train_loss"])
        norm = next(m for m in trainer.objective.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert int(norm.num_batches_tracked) == parts * 7
    assert abs(curves[0] - curves[1]) > 1e-4


def test_accumulation_is_checked_before_anything_runs():
    study = {
        "study": "x",
        "data": {"name": "digits"},
        "host": {"name": "resnet8_8"},
        "baseline": "cnn",
        "recipes": {"train": {}},
    }
    for variants, message in (
        ({"cnn": {"training": {"accumulate": 257}}}, r"variants.cnn.training: accumulate: 257 parts of a batch of 256"),
        ({"cnn": {"training": {"accumulate": 0}}}, "accumulate: 0 is out of range"),
        (
            {"cnn": {"objective": {"name": "bootstrap"}, "training": {"accumulate": 2}}},
            "accumulate: the objective bootstrap cannot split a batch",
        ),
    ):
        with pytest.raises(config.ConfigError, match=message):
            config.load_study(study | {"variants": variants})


@pytest.fixture(scope="module")
def two(tmp_path_factory, digits):
    """Return an unbroken run by two processes."""
    root = tmp_path_factory.mktemp("two")
    (root / "network.py").write_text(NETWORK)
    return Run(root, recipe_of(f"{root}/network.py:network", epochs=12), digits).train(2)


@pytest.mark.slow
def test_two_processes_train_as_one(two, digits, tmp_path):
    one = Run(tmp_path / "one", json.loads(two.recipe.read_text()), digits).train()
    same(two, one)
    assert not two.weights().equal(one.weights())  # sums in another order: two processes it was
    assert two.metrics["status"] == "ok" and two.metrics["environment"]["processes"] == 2
    assert "processes" not in one.metrics["environment"]
    assert two.metrics["recipe_digest"] == one.metrics["recipe_digest"]
    rows = {row["metric"]: row for row in two.metrics["rows"]}
    assert rows.keys() == {row["metric"] for row in one.metrics["rows"]} and rows["training_energy"]["value"] > 0
    assert [path.name for path in (two.model.parent / "checkpoints").iterdir()] == ["epoch2.safetensors"]
    assert not list(two.progress.iterdir()) and not (two.model.parent / ".failure").exists()


def children(process: subprocess.Popen) -> list:
    """Return the training processes below a launcher."""
    import psutil

    found = psutil.Process(process.pid).children(recursive=True)
    return [p for p in found if "RANK" in p.environ()]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_broken_training_goes_on(two, digits, tmp_path):
    """SIGTERM to the launcher, then kill -9 of one process, then the same command: the bits of the unbroken run."""
    recipe = json.loads(two.recipe.read_text())
    run = Run(tmp_path, recipe, digits)
    done = []
    for accident, seconds in (
        (signal.SIGTERM, "1000"),
        (signal.SIGKILL, "0"),
    ):  # told to end it saves before it is time
        process = run.start(2, CONVX_SAVE_SECONDS=seconds)
        if accident == signal.SIGTERM:
            wait_for(lambda: any(run.progress.glob("*/checkpoints/epoch2.safetensors")))
            process.send_signal(signal.SIGTERM)
        else:
            before = next(run.progress.glob("*/state.pt")).stat().st_mtime_ns
            wait_for(lambda before=before: next(run.progress.glob("*/state.pt")).stat().st_mtime_ns > before)
            next(p for p in children(process) if p.environ()["RANK"] == "1").send_signal(accident)
        assert process.wait(60) != 0
        assert not run.model.exists() and not list(run.results.glob("metrics/**/*.json"))
        state = torch.load(next(run.progress.glob("*/state.pt")), weights_only=True)
        done.append(7 * state["epoch"] + state["step"])
    assert 0 < done[0] < done[1] < 7 * 12
    run.train(2)
    assert run.weights().equal(two.weights())
    for column in ("train_loss", "validation_loss", "train_top1"):
        assert run.curve(column) == two.curve(column)


@pytest.mark.slow
def test_a_failure_of_the_processes_is_recorded(network, digits, tmp_path):
    run = Run(tmp_path, recipe_of(network, {"norm": "batch"}), digits).train(2)
    assert run.metrics["status"] == "failed"
    assert run.metrics["reason"].startswith("batch normalisation over 2 processes needs GPUs")
    assert run.model.exists() and (run.results / "histories" / "cnn" / "seed0.csv").exists()
    assert not (run.model.parent / ".failure").exists()


def test_what_cannot_be_shared(network):
    world = distributed.World()
    world.size, world.device = 2, torch.device("cpu")
    with pytest.raises(Failure, match="a batch of 1 images cannot be shared by 2 processes; set drop_last: true"):
        world.rows(torch.arange(1))
    assert world.rows(torch.arange(5)).tolist() == [0, 1]
    objective = Objective()
    with pytest.raises(Failure, match="objective objectives cannot share a batch among 2 processes"):
        world.prepare(objective, objective.splits_batch)
    world.device = torch.device("cuda")
    made = world.prepare(nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), BatchNormAct2d(3)), True)
    assert [type(layer) for layer in made] == [nn.SyncBatchNorm, nn.GroupNorm, SyncBatchNormAct]
    assert isinstance(made[2].act, nn.ReLU)  # timm's layer keeps its activation
    with pytest.raises(ValueError, match="several nodes are those of a Slurm job"):
        distributed.launch([], 1, 2)
