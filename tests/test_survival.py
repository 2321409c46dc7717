"""Through every accident: kills, a full disk, workers that die, files that were cut off. The same command ends right."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import accidents
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_recipe
from house import House, clone
from made_up import STUDY

from convx import cli, config
from convx.data.corruptions import build, open_corrupted, store
from convx.manifest import Failure, MetricsFile, atomic, attempt, attempt_file, explained, read_json, write_json
from convx.records import found_record, weights_failure

MISSED = "it was over already"

REFUSED = "Traceback (most recent call last)"


def table(house: House) -> pd.DataFrame:
    return pd.read_csv(house.results("tables", "comparison.csv")).set_index("variant")


# ----------------------------------------------------------------------------------------------------- the workflow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> House:
    house = accidents.house_of(tmp_path_factory.mktemp("undisturbed") / "house")
    accidents.finish(house)
    return house


METRICS = "results/tiny/metrics/cnn/seed0/"


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, victim, target",
    [
        ("training", "everything", f"{METRICS}training.json"),
        ("weights", "snakemake", f"{METRICS}training.json"),
        ("evaluation", "a job", f"{METRICS}evaluation.json"),
        ("figures", "everything", "figures"),
    ],
)
def test_a_kill_and_the_same_command_end_in_the_same_bits(undisturbed, tmp_path, stage, victim, target):
    """Four of the kills of benchmarks/survival.py, drawn with a fixed seed, each on the part of the study that it is about."""
    kill, killed = accidents.draw(random.Random(f"{stage} {victim}"), stage, victim), MISSED
    for turn in range(5):  # a fast machine may be done before the blow falls: then it falls earlier, on a new house
        house = clone(undisturbed, tmp_path / f"house{turn}")
        shutil.rmtree(house.results("figures"))
        if stage == "evaluation":
            house.results("metrics", "cnn", "seed0", "evaluation.json").unlink()
        elif stage != "figures":
            for part in ("runs", "metrics", "histories"):
                shutil.rmtree(house.results(part, "cnn"))
        killed = accidents.strike(house, kill, target)
        if MISSED not in killed:
            break
        kill = replace(kill, delay=kill.delay / 3)
    assert MISSED not in killed
    accidents.finish(house, target)
    assert not accidents.wait_until_quiet(house), "an orphan lives on"
    expected, found = accidents.fingerprint(undisturbed), accidents.fingerprint(house)
    assert found == {name: expected[name] for name in found}, killed
    made = {"training": "model.safetensors", "weights": "epoch5.safetensors", "figures": "accuracy.svg"}
    assert any(name.endswith(made.get(stage, "cnn/seed0/evaluation.json")) for name in found)
    assert accidents.left_over(house) == []


@pytest.mark.slow
def test_damaged_files_fail_their_run_and_no_other(undisturbed, tmp_path):
    """Weights cut off and metrics of no bytes: their run is marked with the reason, the table builds, `retry` mends it."""
    house = clone(undisturbed, tmp_path / "house")
    weights = house.results("runs", "cnn_frozen", "seed0", "model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    house.results("metrics", "cnn_frozen", "seed0", "evaluation.json").unlink()
    house.results("metrics", "cnn", "seed0", "training.json").write_bytes(b"")
    result = house.snakemake()
    assert result.returncode == 0, result.stdout[-3000:]
    found = table(house)
    assert "the weights cannot be read" in found.loc["cnn_frozen", "reason"]
    assert "training.json cannot be used: is empty" in found.loc["cnn", "reason"]
    assert set(found["status"]) == {"failed"}
    command = [sys.executable, "-m", "convx", "retry", "results/tiny"]
    done = subprocess.run(command, cwd=house.root, env=house.environment, capture_output=True, text=True)
    assert "cnn_frozen seed0 training: forgotten (model.safetensors was cut off)" in done.stdout
    accidents.finish(house)
    assert accidents.fingerprint(house) == accidents.fingerprint(undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a file system of a few megabytes; only root may make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_and_space_is_all_that_is_needed(undisturbed, small_disk, tmp_path):
    house = clone(undisturbed, tmp_path / "house")
    for part in ("runs", "metrics", "histories"):
        shutil.rmtree(house.results(part, "cnn"))
    shutil.rmtree(house.root / "resources" / "progress")
    (house.root / "resources" / "progress").symlink_to(small_disk, target_is_directory=True)
    (small_disk / "ballast").write_bytes(bytes(4 * 2**20 - 200_000))
    result = house.snakemake(CONVX_SAVE_SECONDS="0")
    assert result.returncode != 0
    found = table(house)  # of `onerror`: partial, but there
    assert found.loc["cnn", "status"] == "failed"
    assert "no space left on the disk" in found.loc["cnn", "reason"]
    assert found.loc["cnn_frozen", "status"] == "ok"
    assert not [p for p in small_disk.rglob("*") if p.name.startswith(".")], "nothing half-written stays"
    (small_disk / "ballast").unlink()
    accidents.finish(house)
    assert accidents.fingerprint(house) == accidents.fingerprint(undisturbed)
    assert list(small_disk.iterdir()) == []


@pytest.mark.slow
def test_every_job_stays_under_three_gigabytes(undisturbed):
    peaks = {}
    for file in undisturbed.root.glob("logs/tiny/**/*.benchmark.tsv"):
        peaks[file.relative_to(undisturbed.root).as_posix()] = float(pd.read_csv(file, sep="\t")["max_rss"].max())
    assert len(peaks) >= 6 and 0 < max(peaks.values()) < 3000, peaks


# ------------------------------------------------------------------------------------------------- one step, in here


def train(folder: Path, digits: Path, recipe: dict, *more: str) -> Path:
    """Run the verb `train` in ``folder``; returns its metrics file."""
    write_json(folder / "recipe.json", recipe)
    out = folder / "results/s/runs/cnn/seed0/model.safetensors"
    words = ["train", str(folder / "recipe.json"), "--data", str(digits / "meta.json"), "--out", str(out)]
    assert cli.main([*words, "--progress", str(folder / "progress"), *more]) == 0
    return folder / "results/s/metrics/cnn/seed0/training.json"


def bits(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


class Mine:
    """A pickle that makes a folder when it is believed."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "pickle", "an epoch is gone"])
def test_a_damaged_state_costs_time_and_no_bits(digits, tmp_path, monkeypatch, damage, capfd):
    from convx import training

    recipe = make_recipe(checkpoints=[1])
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    train(tmp_path / "whole", digits, recipe)
    step, done = training.Trainer.train_step, []

    def stop(self, *batch):
        step(self, *batch)
        done.append(1)
        if len(done) == 7:  # in the second epoch
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(training.Trainer, "train_step", stop)
        train(tmp_path / "cut", digits, recipe)
    assert (
        attempt(tmp_path / "cut/results/s/metrics/cnn/seed0/training.json")
        == "stopped by a signal; the same command continues"
    )
    state = next((tmp_path / "cut").glob("progress/*/state.pt"))
    mark = tmp_path / "executed"
    if damage == "an epoch is gone":
        next(state.parent.glob("checkpoints/epoch1.safetensors")).unlink()
    elif damage == "pickle":
        torch.save({"epoch": 1, "mine": Mine(mark)}, state)
    else:
        state.write_bytes({"empty": b"", "cut": state.read_bytes()[:5000], "text": b"<html>"}[damage])
    assert read_json(train(tmp_path / "cut", digits, recipe))["status"] == "ok"
    assert "starting over: " in capfd.readouterr().out
    assert not mark.exists()
    assert bits(tmp_path / "cut" / "results") == bits(tmp_path / "whole" / "results")
    assert list((tmp_path / "cut" / "progress").iterdir()) == []
    if damage == "pickle":
        torch.save(Mine(mark), state.parents[1] / "x")
        torch.load(state.parents[1] / "x", weights_only=False)
        assert mark.exists(), "the pickle does work where it is believed"


def test_a_kill_between_the_results_and_their_record_loses_nothing(digits, tmp_path, monkeypatch):
    """The progress goes last: killed before that, the kept epochs and the state are still there."""
    from convx import steps

    recipe = make_recipe(checkpoints=[1])
    train(tmp_path / "whole", digits, recipe)
    with monkeypatch.context() as patched, pytest.raises(SystemError, match="pulled"):
        patched.setattr(steps, "environment", lambda **_: (_ for _ in ()).throw(SystemError("pulled the plug")))
        train(tmp_path / "cut", digits, recipe)
    assert list((tmp_path / "cut").glob("progress/*/checkpoints/epoch1.safetensors"))
    shutil.rmtree(tmp_path / "cut" / "results")  # Snakemake removes what an unfinished job has made
    train(tmp_path / "cut", digits, recipe)
    assert bits(tmp_path / "cut" / "results") == bits(tmp_path / "whole" / "results")


def test_who_waited_for_an_orphan_takes_over_what_it_has_finished(digits, tmp_path, monkeypatch):
    from convx import training

    first = read_json(train(tmp_path, digits, make_recipe()))
    made = bits(tmp_path / "results")
    enter = training.Progress.__enter__
    monkeypatch.setattr(training.Trainer, "fit", lambda *_: pytest.fail("it was trained already"))
    with monkeypatch.context() as patched:
        patched.setattr(training.Progress, "__enter__", lambda self: setattr(enter(self), "waited", True) or self)
        again = read_json(train(tmp_path, digits, make_recipe()))
    assert again["rows"] == first["rows"] and bits(tmp_path / "results") == made
    assert list((tmp_path / "progress").iterdir()) == []


def test_a_failed_run_leaves_no_progress(digits, tmp_path):
    record = read_json(train(tmp_path, digits, make_recipe(lr=1e30, optimizer="momentum")))
    assert record["status"] == "failed" and "not finite in epoch 1" in record["reason"]
    assert list((tmp_path / "progress").iterdir()) == []
    assert "not finite" in weights_failure(tmp_path / "results/s/runs/cnn/seed0/model.safetensors")


@pytest.mark.parametrize("start", ["failed", "lacks the epoch", "was cut off"])
def test_a_run_whose_start_is_none_fails_with_the_reason(digits, tmp_path, start):
    from convx.runs import save_failed

    weights = tmp_path / "start" / "model.safetensors"
    weights.parent.mkdir()
    save_failed(weights, "the training loss is not finite in epoch 3")
    if start != "failed":
        train(tmp_path / "first", digits, make_recipe(epochs=0))
        shutil.copy(tmp_path / "first/results/s/runs/cnn/seed0/model.safetensors", weights)
    at_epoch = None if start == "was cut off" else 1
    if start == "was cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    first = make_recipe(epochs=1)
    recipe = make_recipe("cnn_finetuned", start={"variant": "cnn", "at_epoch": at_epoch, "recipe": first})
    record = read_json(train(tmp_path, digits, recipe, "--start", str(weights)))
    assert record["status"] == "failed"
    words = {"failed": "not finite in epoch 3", "lacks the epoch": "epoch1.safetensors is missing"}
    assert words.get(start, "the weights cannot be read") in record["reason"]


def test_a_missing_gpu_is_recorded_and_keeps_the_progress(digits, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = make_recipe() | {"device": "cuda"}
    recipe |= {"digest": config.recipe_digest(recipe)}
    record = read_json(train(tmp_path, digits, recipe))
    assert record["status"] == "failed" and "set device: cpu or auto" in record["reason"]
    assert [p.name for p in (tmp_path / "progress").iterdir()]  # what a machine with a GPU would continue


# ------------------------------------------------------------------------------------------------------ workers


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)


BUILD = """
import sys, numpy as np
from convx.data.corruptions import build, store
store.CHUNK_BYTES = 4000
if __name__ == "__main__":
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    build(images, "cifar_c", ["elastic_transform", "fog"], [1, 5], sys.argv[1], 0, workers=2, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["a worker", "the builder"])
def test_corruption_goes_on_after_a_kill(images, tmp_path, victim):
    import psutil

    script, folder = tmp_path / "build.py", tmp_path / "set"
    script.write_text(BUILD)
    process = subprocess.Popen([sys.executable, str(script), str(folder)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(workers := psutil.Process(process.pid).children(recursive=True)) < 3:
        time.sleep(0.01)  # two workers and the tracker of resources
    while time.monotonic() < deadline and not list(folder.glob("*.part")):
        time.sleep(0.01)
    (workers[-1] if victim == "a worker" else psutil.Process(process.pid)).send_signal(signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and not (folder / "meta.json").exists()
    if victim == "a worker":
        assert "a worker that corrupts images died" in error
    _, left = psutil.wait_procs(workers, timeout=20)
    assert not left, "workers end with the process that started them"
    arguments = (images, "cifar_c", ["elastic_transform", "fog"], [1, 5])
    found = build(*arguments, folder, 0, progress=False)
    expected = build(*arguments, tmp_path / "whole", 0, progress=False)
    assert found.meta == expected.meta
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "built.json",
        "elastic_transform.npy",
        "fog.npy",
        "meta.json",
    ]
    assert all(isinstance(open_corrupted(folder)[name], np.memmap) for name in found)


def test_a_disk_that_fills_up_is_an_error_and_not_a_dead_worker(images, small_disk, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**12}))  # it lied
    many = np.tile(images, (20, 1, 1, 1))
    with pytest.raises(OSError, match="No space left") as error:
        build(many, "cifar_c", ["fog"], [1, 2, 3], small_disk, 0, progress=False)
    assert explained(error.value).startswith("no space left on the disk")
    assert {p.name for p in small_disk.iterdir()} <= {".lock", "built.json"}


DIES = """
import multiprocessing, os, signal, sys, torch
from convx import config
from convx.data import open_set
from convx.data.loader import FolderBatches
from convx.manifest import explained
files = open_set(sys.argv[1]).train_images
training = config.recipe_defaults() | {"batch_size": 1}
try:
    for _ in FolderBatches(files, torch.arange(8), training, 0, torch.device("cpu"), 1).epoch(0):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
except RuntimeError as error:
    print(explained(error))
"""


def test_a_loader_process_that_dies_is_told(tmp_path):
    from PIL import Image

    from convx.data import open_set, prepare
    from convx.data.loader import FolderBatches

    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "p" / place).mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (40, 40), (k, 0, 0)).save(tmp_path / "p" / place / f"{k}.png")
    prepare({"name": "folder", "path": str(tmp_path / "p"), "image_size": 32}, tmp_path / "d", progress=False)
    files = open_set(tmp_path / "d").train_images
    batches = FolderBatches(files, torch.arange(8), make_recipe(batch_size=2)["training"], 0, torch.device("cpu"), 1)
    (tmp_path / "p/train/b/2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError) as broken:
        list(batches.epoch(0))
    assert "2.png: cannot be read as an image" in explained(broken.value) and "\n" not in explained(broken.value)
    # A process that is killed is told by a signal, in the midst of anything: so not in this process.
    Image.new("RGB", (40, 40)).save(tmp_path / "p/train/b/2.png")
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(tmp_path / "d")], capture_output=True, text=True, timeout=120
    )
    words = "a loader process died (killed, or out of memory); fewer data.workers need less memory\n"
    assert done.stdout == words, done.stderr[-2000:]


def test_without_loader_processes_none_of_them_is_blamed():
    from convx.data.loader import _watched

    class Cut:
        num_workers = 0

        def __iter__(self):
            yield "batch"
            raise EOFError("a file that ends too early")

    with pytest.raises(EOFError, match="ends too early"):
        list(_watched(Cut()))


# ------------------------------------------------------------------------------------------- files and their notes


def test_a_killed_writer_leaves_what_the_next_one_removes(tmp_path):
    target = tmp_path / "model.safetensors"
    code = (
        "import os, sys, signal; from convx.manifest import atomic\n"
        "with atomic(sys.argv[1]) as path:\n"
        "    path.write_bytes(b'half'); path.with_name('.tmpAbC').write_bytes(b'of a library')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 1 and not target.exists()  # it does not grow
    other = tmp_path / ".model.safetensors.another-machine-77.abcd"
    other.mkdir()
    with atomic(target) as path:
        path.write_bytes(b"whole")
        with atomic(target) as inner:  # of this living process: left alone
            inner.write_bytes(b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "model.safetensors"]
    os.utime(other, (0, 0))
    with atomic(target) as path:
        path.write_bytes(b"again")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"] and target.read_bytes() == b"again"


def test_a_step_that_dies_has_told_why(tmp_path):
    recipe = make_recipe()
    path = tmp_path / "evaluation.json"
    with pytest.raises(SystemError), MetricsFile(path, "evaluation", recipe):
        assert attempt(path) is None or "without a word" in attempt(path)
        raise SystemError("a broken\nevaluator")
    assert attempt(path) == "SystemError: a broken evaluator"
    assert found_record(path, "cnn", 0, config.load_study(STUDY))["reason"] == "SystemError: a broken evaluator"
    with MetricsFile(path, "evaluation", recipe) as file:
        file.add("top1", 50.0, "%")
    assert not attempt_file(path).exists() and attempt(path) is None
    assert found_record(path, "cnn", 0, config.load_study(STUDY))["rows"][0]["value"] == 50.0
    path.unlink()
    code = (
        "import os, sys, signal; from convx.manifest import MetricsFile\n"
        "with MetricsFile(sys.argv[1], 'evaluation', {}):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)])
    assert (
        "ended without a word: killed, or out of memory"
        in found_record(path, "cnn", 0, config.load_study(STUDY))["reason"]
    )


def test_a_value_that_is_not_finite_fails_its_step_with_its_name(tmp_path):
    with MetricsFile(tmp_path / "evaluation.json", "evaluation", make_recipe()) as file:
        file.add("ece", float("nan"), "%")
    record = read_json(tmp_path / "evaluation.json")
    assert record["status"] == "failed" and record["reason"] == "ece is not finite" and record["rows"] == []
    with MetricsFile(tmp_path / "evaluation.json", "evaluation", make_recipe()):
        raise Failure("two\nlines")
    assert read_json(tmp_path / "evaluation.json")["reason"] == "two lines"


def test_a_lock_of_a_folder_that_was_removed_is_taken_anew(tmp_path):
    from convx.locking import acquire

    path = tmp_path / "f" / "lock"
    held = acquire(path)
    assert not held.waited
    code = (
        "import sys; from convx.locking import acquire; file = acquire(sys.argv[1], 'busy'); "
        "print('waited', file.waited, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(path)]
    second = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert second.stdout.readline() == "busy\n"
    shutil.rmtree(path.parent)
    held.close()
    assert second.stdout.readline() == "waited True\n"
    with open(path) as file, pytest.raises(BlockingIOError):  # the file that is there now is the one that is locked
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    second.communicate("\n")
    acquire(path).close()
