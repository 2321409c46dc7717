"""Real data sets from a local mirror: counts, labels, pixel statistics, memory. Skipped without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convx.data import SETS, open_set
from convx.data.pixels import pixel_statistics
from convx.data.sources import Finder
from convx.data.tiny_imagenet import find_containers

MIRRORS = [
    *(place for place in os.environ.get("CONVX_MIRROR", "").split() if "://" not in place),
    str(Path(__file__).resolve().parents[2] / "shared" / "data"),
]
MEMORY = 1500  # MiB
PREPARE = """
import json, re, sys
from convx.data import prepare
meta = prepare(json.loads(sys.argv[1]), sys.argv[2], progress=False)
# not getrusage: its maximum is inherited from the process that starts this one
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024
print(json.dumps([meta, peak]))
"""


@pytest.fixture(scope="session")
def mirrors(tmp_path_factory):
    """The mirror folders; one that brings a script to unpack CIFAR is unpacked first."""
    folders = list(MIRRORS)
    for folder in MIRRORS:
        script = Path(folder) / "unpack_cifar.py"
        if script.is_file() and not Finder(folders, Path("unused")).official(SETS["cifar100"], addresses=False):
            target = tmp_path_factory.mktemp("cifar")
            subprocess.run([sys.executable, script, target], check=True, capture_output=True)
            folders.insert(0, str(target))
    return folders


def prepared(mirrors, tmp_path, name: str, **settings):
    """Prepare a set from the mirrors in a process of its own, check its memory, open it."""
    if name == "tiny_imagenet":
        there = any(find_containers(Path(m), SETS[name].folder) for m in mirrors)
    else:
        there = Finder(mirrors, tmp_path).official(SETS[name], addresses=False)
    if not there:
        pytest.skip(f"no mirror in CONVX_MIRROR holds the official files of {name}")
    command = [sys.executable, "-c", PREPARE, json.dumps({"name": name, **settings}), str(tmp_path / "out")]
    run = subprocess.run(command, env=os.environ | {"CONVX_MIRROR": " ".join(mirrors)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    meta, peak = json.loads(run.stdout)
    assert peak < MEMORY, f"{name} took {peak:.0f} MiB"
    assert meta["source"]["kind"] == "mirror folder"
    return open_set(tmp_path / "out")


CASES = {
    "cifar10": (5000, 1000, [6, 9, 9, 4, 1, 1, 2, 7], [3, 8, 8, 0, 6, 6, 1, 6], ["airplane", "truck"]),
    "cifar100": (
        500,
        100,
        [19, 29, 0, 11, 1, 86, 90, 28],
        [49, 33, 72, 51, 71, 92, 15, 14],
        ["apple", "worm"],
    ),
    "fashion_mnist": (
        6000,
        1000,
        [9, 0, 0, 3, 0, 2, 7, 2],
        [9, 2, 1, 1, 6, 1, 4, 6],
        ["T-shirt/top", "Ankle boot"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_official_files_give_the_published_facts(mirrors, tmp_path, name):
    data = prepared(mirrors, tmp_path, name)
    each_train, each_test, first_train, first_test, ends = CASES[name]
    facts = SETS[name]
    assert data.train_images.shape == (facts.train, facts.image_size, facts.image_size, facts.channels)
    assert (np.bincount(data.train_labels) == each_train).all() and len(data.meta["class_names"]) == facts.classes
    assert (np.bincount(data.test_labels) == each_test).all()
    assert data.train_labels[:8].tolist() == first_train and data.test_labels[:8].tolist() == first_test
    assert [data.meta["class_names"][0], data.meta["class_names"][-1]] == ends
    mean, std = pixel_statistics([data.train_images])
    assert np.abs(mean - facts.mean).max() < 1e-4 and np.abs(std - facts.std).max() < 1e-4
    assert data.meta["source"]["checksums"] == "official MD5s matched" and not data.meta["lossy"]


@pytest.mark.slow
def test_fashion_mnist_at_32_pixels_with_a_validation_split(mirrors, tmp_path):
    data = prepared(mirrors, tmp_path, "fashion_mnist", image_size=32, train_images=9000, validation=0.1)
    assert data.split("train")[0].shape == (8100, 32, 32, 1)
    assert (np.bincount(data.split("validation")[1]) == 90).all()
    assert "resized from 28x28 to 32x32, bilinear" in data.meta["provenance"]


@pytest.mark.slow
def test_tiny_imagenet_validation_images_with_boxes(mirrors, tmp_path):
    data = prepared(mirrors, tmp_path, "tiny_imagenet", train_images=0)
    assert data.test_images.shape == (10_000, 64, 64, 3) and (np.bincount(data.test_labels) == 50).all()
    assert data.meta["class_ids"] == sorted(data.meta["class_ids"]) and len(data.meta["class_ids"]) == 200
    sides = data.test_boxes[:, 2:] - data.test_boxes[:, :2]
    assert sides.min() >= 1 and data.test_boxes.min() == 0 and data.test_boxes.max() == 64
    assert abs(sides.prod(1).mean() / 64**2 - 0.521) < 0.001
