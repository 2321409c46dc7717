"""Runs of one study from several machines: they add up, and what does not fit is refused whole and named."""

import json
import os
from pathlib import Path

import pytest
from made_up import build

from convx import bundle, cli
from convx.config import ConfigError
from convx.manifest import read_json, write_json
from convx.report import tables
from convx.report.results import Results

VARIANTS = {"cnn": None, "cnn_frozen": None, "lc_frozen_x8": None}


def machine(
    root: Path, runs: list[tuple[str, int]], processor: str = "Made-up CPU", source: str = "s", **changes
) -> Path:
    """Return a bundle of the runs that one machine made of the study."""
    all_runs = [(variant, seed) for variant in VARIANTS for seed in range(3)]
    folder = build(root, images=60, missing=[run for run in all_runs if run not in runs], variants=VARIANTS, **changes)
    for file in folder.glob("metrics/*/seed*/*.json"):
        record = read_json(file)
        record["environment"] |= {"processor": processor}
        record |= {"source_digest": source, "started": processor, "wall_seconds": float(len(processor))}
        for row in record["rows"]:
            if row["unit"] in ("s", "kWh", "kgCO2e"):
                row["value"] *= 1 + 0.1 * len(processor)  # no machine repeats a time
        write_json(file, record)
    tables.write(folder)
    out = root / "bundle.convx.tar.gz"
    bundle.pack(folder, out)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    return machine(tmp_path_factory.mktemp("one"), [("cnn", 0), ("cnn", 1), ("cnn_frozen", 0)])


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    runs = [("cnn", 1), ("cnn", 2), ("cnn_frozen", 1), ("cnn_frozen", 2)]
    return machine(tmp_path_factory.mktemp("two"), runs, "Another CPU", "t")


def test_runs_of_two_machines_add_up(first, second, tmp_path):
    results = tmp_path / "results"
    assert bundle.unpack(first, results).endswith("3 runs added")
    before = content(results / "made_up")
    assert bundle.unpack(second, results).endswith("3 runs added, 1 there already with the same numbers and kept")
    after = content(results / "made_up")
    assert all(after[name] == data for name, data in before.items())  # what was here stays as it was, byte by byte
    study = Results(results / "made_up")
    assert list(study.values("cnn", "top1").index) == [0, 1, 2] == list(study.values("cnn_frozen", "top1").index)
    assert study.status("lc_frozen_x8")[0] == "not run"
    # In the other order the runs are the same, only the times of the one that both have are the other machine's.
    bundle.unpack(second, tmp_path / "other")
    bundle.unpack(first, tmp_path / "other")
    other = Results(tmp_path / "other" / "made_up")
    accuracy = study.runs[study.runs["what"] == "evaluation"]
    assert accuracy["value"].tolist() == other.runs[other.runs["what"] == "evaluation"]["value"].tolist()


def test_a_run_with_other_numbers_is_refused_and_named(first, second, tmp_path):
    results = tmp_path / "results"
    bundle.unpack(first, results)
    file = results / "made_up" / "metrics" / "cnn" / "seed1" / "evaluation.json"
    record = read_json(file)
    top1 = next(row for row in record["rows"] if row["metric"] == "top1")
    top1["value"] += 0.01
    write_json(file, record)
    before = content(results)
    with pytest.raises(
        ConfigError, match=r"cnn seed 1: .*evaluation\.json is there already with other numbers \(top1 \(test"
    ):
        bundle.unpack(second, results)
    assert content(results) == before and list(results.iterdir()) == [results / "made_up"]


def test_predictions_are_numbers_too(first, second, tmp_path):
    results = tmp_path / "results"
    bundle.unpack(first, results)
    file = results / "made_up" / "metrics" / "cnn" / "seed1" / "evaluation.json"
    record = read_json(file)
    record["per_image"]["correct"] = read_json(file.parents[1] / "seed0" / "evaluation.json")["per_image"]["correct"]
    write_json(file, record)
    with pytest.raises(ConfigError, match="correct per image"):
        bundle.unpack(second, results)


def test_a_history_is_a_number_but_its_seconds_are_not(first, second, tmp_path):
    results = tmp_path / "results"
    bundle.unpack(first, results)
    file = results / "made_up" / "histories" / "cnn" / "seed1.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0] + ",seconds", *(line + ",7" for line in lines[1:])]) + "\n")
    assert "1 there already" in bundle.unpack(second, results)
    file.write_text(file.read_text().replace("0.", "1.", 1))
    with pytest.raises(ConfigError, match=r"cnn seed 1: .*seed1\.csv is there already with other numbers \(epoch"):
        bundle.unpack(second, results)


def test_runs_of_another_recipe_do_not_add_up(first, tmp_path):
    recipes = {"train": {"epochs": 4, "batch_size": 32}, "finetune": {"epochs": 2}}
    other = machine(tmp_path / "other", [("cnn", 2)], recipes=recipes)
    results = tmp_path / "results"
    bundle.unpack(first, results)
    before = content(results)
    with pytest.raises(
        ConfigError, match=r"cnn seed 2 was made by the recipe [0-9a-f]{16}, the study here has [0-9a-f]{16}"
    ):
        bundle.unpack(other, results)
    assert content(results) == before


def test_a_shortened_study_never_mixes_with_the_full_one(first, tmp_path):
    short = machine(tmp_path / "short", [("cnn", 2)], scale=0.5)
    results = tmp_path / "results"
    bundle.unpack(first, results)
    bundle.unpack(short, results)
    assert sorted(p.name for p in results.iterdir()) == ["made_up", "made_up_scale50"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate": {"corruption": {"protocol": "imagenet_c", "severities": [5]}}}, "another `evaluate`"),
        ({"baseline": "cnn_frozen"}, "another `baseline`"),
        ({"data": {"name": "digits", "image_size": 32}}, "another `data`"),
        ({"seeds": [0, 1, 2, 3]}, r"cnn seed 3 is not in the study made_up here"),
    ],
)
def test_two_machines_agree_on_the_study(first, tmp_path, changes, words):
    runs = [("cnn", 3)] if "seeds" in changes else [("cnn", 2)]
    other = machine(tmp_path / "other", runs, **changes)
    bundle.unpack(first, tmp_path / "results")
    with pytest.raises(ConfigError, match=words):
        bundle.unpack(other, tmp_path / "results")


def test_a_failed_run_here_is_forgotten_by_hand(second, tmp_path):
    here = build(tmp_path / "results", images=60, failed=[("cnn", 2)], variants=VARIANTS)
    with pytest.raises(ConfigError, match=r"cnn seed 2: .*status: failed, the bundle's ok.*convx retry .*made_up cnn"):
        bundle.unpack(second, tmp_path / "results")
    for name in bundle.retry(here, "cnn"):
        assert "seed2" in name
    text = bundle.unpack(second, tmp_path / "results")
    assert text.endswith("1 run added, 3 there already with the same numbers and kept")


def test_steps_that_share_none_with_a_run_here_are_refused(first, second, tmp_path):
    results = tmp_path / "results"
    bundle.unpack(first, results)
    run = results / "made_up" / "metrics" / "cnn" / "seed1"
    (run / "training.json").rename(run / "other.json")
    (run / "evaluation.json").unlink()
    with pytest.raises(ConfigError, match=r"cnn seed 1: .* holds other steps of this run"):
        bundle.unpack(second, results)


def test_an_interrupted_merge_leaves_nothing_half_written(first, second, tmp_path, monkeypatch):
    results = tmp_path / "results"
    bundle.unpack(first, results)
    before, rename, count = content(results), os.rename, []

    def breaks(source, target):
        count.append(target)
        if len(count) == 5:
            raise OSError("no space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", breaks)
    with pytest.raises(ConfigError, match="not unpacked: no space left"):
        bundle.unpack(second, results)
    monkeypatch.undo()
    assert len(count) == 5 and content(results) == before
    assert bundle.unpack(second, results).endswith("kept")


def test_no_metrics_file_is_no_run(first, tmp_path, capsys):
    results = tmp_path / "results"
    bundle.unpack(first, results)
    (results / "made_up" / "metrics" / "cnn" / "seed0" / "evaluation.json").write_text(json.dumps({"rows": []}))
    assert cli.main(["unpack", str(first), "--results", str(results)]) == 2
    out = capsys.readouterr().err
    assert (
        out.startswith("convx: ") and "evaluation.json of cnn seed0 is no metrics file" in out and out.count("\n") == 1
    )
