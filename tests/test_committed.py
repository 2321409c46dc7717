"""Every study that is committed is drawn again from a bare clone: no data, no weights, no training."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from house import REPOSITORY, House
from made_up import STUDY, build

from convx.config import load_study, read_yaml
from convx.report import tables
from convx.report.published import Study, committed

pytestmark = pytest.mark.slow
STUDIES = committed(REPOSITORY)


def redraw(house: House, config: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "snakemake", "figures", *arguments, "--cores", "2", "--configfile", config]
    clean = {k: v for k, v in house.environment.items() if k != "CONVX_MIRROR"}
    result = subprocess.run(
        command, cwd=house.root, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def is_drawn_from_metrics_alone(house: House, name: str, config: str, *arguments: str) -> None:
    """Draw a study whose results are in the house, in two ways of asking, and compare its tables with the committed ones."""
    folder = house.root / "results" / name
    kept = {file.name: pd.read_csv(file) for file in (folder / "tables").glob("*.csv")}
    for part in ("tables", "figures", "report"):
        shutil.rmtree(folder / part, ignore_errors=True)
    planned = redraw(house, config, "--dry-run", *arguments)
    rules = {line.split()[-1].rstrip(":") for line in planned.splitlines() if line.startswith(("rule ", "localrule "))}
    assert rules <= {"study", "tables", "figures_drawn", "figures"} and {"tables", "figures_drawn"} <= rules
    redraw(house, config, *arguments)
    assert len(list((folder / "figures").glob("*.svg"))) >= 2 and not (house.root / "resources").exists()
    assert kept
    for file, before in kept.items():
        after = pd.read_csv(folder / "tables" / file)
        assert list(after.columns) == list(before.columns) and len(after) == len(before)
        for column in before:
            if pd.api.types.is_numeric_dtype(before[column]) and pd.api.types.is_numeric_dtype(after[column]):
                np.testing.assert_allclose(
                    after[column], before[column], rtol=1e-6, atol=1e-9, err_msg=f"{file}: {column}"
                )
            else:
                assert after[column].fillna("").tolist() == before[column].fillna("").tolist(), f"{file}: {column}"


@pytest.mark.parametrize("name", STUDIES)
def test_a_committed_study_is_drawn_from_a_bare_clone(name, tmp_path):
    house = House.build(tmp_path / "house")
    shutil.copytree(REPOSITORY / "results" / name, house.root / "results" / name)
    for part in ("runs", "recipes"):  # not in git
        shutil.rmtree(house.root / "results" / name / part, ignore_errors=True)
    study = Study(REPOSITORY, name)
    config, scale = study.file, study.manifest["scale"]
    assert (house.root / config).exists(), f"results/{name} is committed without its study file"
    assert load_study(read_yaml(house.root / config) | {"scale": scale})["study"] == name
    is_drawn_from_metrics_alone(house, name, config, *(["--config", f"scale={scale}"] if scale != 1 else []))


@pytest.mark.parametrize("name", STUDIES)
def test_a_committed_study_is_small_and_complete(name):
    folder = REPOSITORY / "results" / name
    assert {"metrics", "histories", "tables", "figures", "manifest.json", "exact.json"} <= set(os.listdir(folder))
    tracked = subprocess.run(
        ["git", "ls-files", f"results/{name}"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.split()
    sizes = {file: (REPOSITORY / file).stat().st_size for file in tracked}
    assert sum(sizes.values()) < 20e6 and not [file for file in sizes if file.endswith((".safetensors", ".pt"))]


@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_made_up_study_is_drawn_from_a_bare_clone(scale, tmp_path):
    """The same on numbers out of a hat, so that the test has a subject before anything is committed."""
    house = House.build(tmp_path / "house")
    study = STUDY | {"variants": {"cnn": None, "cnn_frozen": None, "lc_frozen_x8": None}}
    (house.root / "config" / "made_up.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    folder = build(house.root / "results", images=60, missing=[("cnn", 2)], variants=study["variants"], scale=scale)
    (folder / "exact.json").write_text("{}\n")
    tables.write(folder)
    own = ["--config", f"scale={scale}"] if scale != 1 else []
    is_drawn_from_metrics_alone(house, folder.name, "config/made_up.yaml", *own)
