"""T-CNN's own evaluator and figures: on a network, on made-up results, and on a tiny real run."""

import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import head

from convx import config, steps
from convx.evaluate import EvaluationData
from convx.evaluate.payload import pack, unpack
from convx.manifest import write_json
from convx.models import create_model
from convx.papers.tcnn import analysis, evaluate, figures
from convx.papers.tcnn.locality import HEADS, distance_of_taps, epsilon
from convx.report.results import Results
from convx.surgery import apply

ALL = ["gates", "non_locality", "centres", "attention", "initial_error", "partial_starts", "arrows", "cka"]


def data(images: int = 90, side: int = 32, channels: int = 1) -> EvaluationData:
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (images, side, side, channels)).astype(np.uint8)
    return EvaluationData.from_arrays(
        pixels, np.arange(images) % 10, [0.5] * channels, [0.25] * channels, batch_size=25
    )


def recast(**settings) -> tuple[torch.nn.Module, dict]:
    """Return a small recast network and the part of its recipe that the evaluator reads."""
    torch.manual_seed(0)
    step = {"verb": "recast_attention", "layers": "{stage-1}"} | settings
    model = apply(create_model("resnet8_8", 10, 1), [step], 0)
    return model, {"surgery": [step], "start": None}


def values(result, metric: str) -> dict:
    return {row["conditions"]["layer"]: row["value"] for row in result.rows if row["metric"] == metric}


# ------------------------------------------------------------------------------------------------------- the evaluator


def test_a_network_as_it_was_recast():
    """Every head looks at its tap: 1.073 pixels away on average, no content, centres on the taps."""
    model, recipe = recast(locality=15.0)
    model.train()
    found = evaluate.run(model, recipe, data())
    assert model.training
    names = ["layer3.0.conv1", "layer3.0.conv2"]
    for metric, value in (
        ("non_locality", distance_of_taps(9)),
        ("content_share", 0),
        ("centre_drift", 0),
        ("span", 1 / 15),
    ):
        assert list(values(found, metric)) == names
        assert list(values(found, metric).values()) == pytest.approx([value] * 2, abs=1e-5)
    for error in values(found, "initial_error").values():
        assert 0.3 * epsilon(15) < error < 2 * epsilon(15)
    heads = found.arrays["heads/layer3.0.conv2"]
    assert heads.shape == (9, len(HEADS))
    taps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    assert heads[:, [HEADS.index("centre_y"), HEADS.index("centre_x")]] == pytest.approx(np.array(taps), abs=1e-6)
    assert heads[:, HEADS.index("non_locality")] == pytest.approx(np.hypot(*np.array(taps).T), abs=1e-4)
    # The last layer has maps of 8x8; the query in the middle sees nine pixels, all of them inside.
    maps, at = found.arrays["attention/layer3.0.conv2"], found.arrays["queries/layer3.0.conv2"]
    assert maps.shape == (3, 2, 8, 8) and at.tolist() == [[4, 4], [2, 2]]
    assert maps[:, 0].sum((1, 2)) == pytest.approx(1, abs=1e-4)
    assert maps[0, 0, 3:6, 3:6] == pytest.approx(1 / 9, abs=1e-4)
    assert found.arrays["pictures"].shape == (3, 32, 32, 1)


def test_open_gates_and_moved_heads_are_seen():
    model, recipe = recast(locality=5.0)
    layer = model.get_submodule("layer3.0.conv2")
    with torch.no_grad():
        layer.gate[4] = 1.0
        layer.positions[0, :2] += 2 * 5.0 * 0.5  # half a pixel in x and in y
        layer.positions[8, 2] = 1.0  # no longer local
    found = evaluate.run(model, recipe, data())
    name = "layer3.0.conv2"
    assert values(found, "content_share")[name] == pytest.approx(1 / 9)
    assert values(found, "content_share_max")[name] == pytest.approx(1)
    assert values(found, "centre_drift")[name] is None and values(found, "span")[name] is None
    heads = found.arrays[f"heads/{name}"]
    assert heads[0, HEADS.index("centre_y")] == pytest.approx(-0.5, abs=1e-6)
    assert np.isnan(heads[8, HEADS.index("span")]) and heads[4, HEADS.index("content_share")] == 1
    assert heads[4, HEADS.index("non_locality")] > 2  # content looks everywhere on a map of 8x8
    assert values(found, "non_locality")[name] > values(found, "non_locality")["layer3.0.conv1"] + 0.2


def test_rows_are_those_of_the_analysis():
    model, recipe = recast(locality=3.0, gate="sigmoid", gate_init=1.0)
    sample = data(16)
    found = evaluate.run(model, recipe, sample)
    x_BCHW = torch.cat([x for x, _ in sample.batches()])
    rows = pd.DataFrame([row | row["conditions"] for row in analysis.rows(model.eval(), x_BCHW)])
    means = rows.groupby(["metric", "layer"])["value"].mean()
    for metric in ("non_locality", "content_share", "span"):
        for layer, value in values(found, metric).items():
            assert value == pytest.approx(means[metric, layer], rel=1e-5)


def test_the_initial_error_is_that_of_the_variants_settings():
    """An open gate and a border that is replicated cost more than the locality; heads without one have no such error."""
    error = {}
    for name, settings in (
        ("local", {"locality": 15.0}),
        ("wide", {"locality": 2.0}),
        ("gate", {"locality": 15.0, "gate": "sigmoid", "gate_init": 1.0}),
        ("border", {"locality": 15.0, "border": "replicate"}),
        ("lost", {"positions": "random"}),
    ):
        error[name] = values(evaluate.run(*recast(**settings), data(20)), "initial_error").get("layer3.0.conv2")
    assert error["lost"] is None and error["local"] < 1e-5
    assert 0.1 < error["wide"] < 0.6 and 0.05 < error["gate"] < 0.6 and 0.1 < error["border"] < 1


def test_alignments_from_stored_matrices_are_the_linear_cka():
    """Half precision in the metrics file costs less than a thousandth."""
    torch.manual_seed(1)
    one, other = create_model("resnet8_8", 10, 1), create_model("resnet8_8", 10, 1)
    sample = data()
    grams = [evaluate.run(model, {"surgery": [], "start": None}, sample) for model in (one, other)]
    assert all(not found.rows and set(found.arrays) == {f"gram/layer{k}" for k in (1, 2, 3)} for found in grams)
    kept = [unpack(pack(found.arrays["gram/layer2"])) for found in grams]
    places = np.linspace(0, 89, evaluate.IMAGES).round().astype(int)
    x_BCHW = torch.cat([x for x, _ in sample.batches()])[places]
    exact = [analysis.activations(model.eval(), x_BCHW, ["layer2"])["layer2"] for model in (one, other)]
    assert figures._alignment(*kept) == pytest.approx(analysis.linear_cka(*exact), abs=1e-3)
    assert figures._alignment(kept[0], kept[0]) == pytest.approx(1, abs=1e-6)
    assert figures._alignment(*kept) < 0.999


def test_maps_that_are_too_large_are_left_out(monkeypatch):
    monkeypatch.setattr(evaluate, "LARGEST_MAP", 1000)
    found = evaluate.run(*recast(), data(8))
    assert set(values(found, "non_locality").values()) == {None} and not values(found, "initial_error")
    assert all("too large" in row["method"] for row in found.rows if row["metric"] == "non_locality")
    assert not any(key.startswith("attention") for key in found.arrays)


def test_two_stages_of_a_larger_host_are_quick_and_small():
    torch.manual_seed(0)
    step = {"verb": "recast_attention", "layers": ["{stage-1}", "{stage-2}"], "locality": 15.0}
    model = apply(create_model("resnet14_16", 10), [step], 0)
    sample = data(100, channels=3)
    started = time.process_time()
    found = evaluate.run(model, {"surgery": [step], "start": None}, sample)
    assert time.process_time() - started < 10  # about one second on a core of its own
    stored = {"rows": found.rows, "arrays": {name: pack(array) for name, array in found.arrays.items()}}
    assert len(json.dumps(stored, indent=1)) < 60_000


def test_closed_forms():
    assert distance_of_taps(9) == pytest.approx((4 + 4 * 2**0.5) / 9) and distance_of_taps(1) == 0
    assert distance_of_taps(4) is None and distance_of_taps(6) is None
    assert epsilon(12) == pytest.approx(4 * np.exp(-12), rel=1e-4)


# --------------------------------------------------------------------------------------------------------- the figures


def made_up(folder, variants: dict, drop: tuple = (), **study):
    """Write a results folder with plausible numbers for the variants; ``drop`` leaves metrics out."""
    given = {
        "study": "made_up",
        "data": {"name": "digits"},
        "host": {"name": "resnet8_8"},
        "recipes": {"train": {"epochs": 8}, "finetune": {"epochs": 4}},
        "baseline": "cnn",
        "seeds": [0, 1],
        "variants": variants,
    }
    found, draws = config.load_study(given | study), np.random.default_rng(0)
    write_json(folder / "study.json", found)
    for place, name in enumerate(found["variants"]):
        settings = config.variant_settings(found, name)
        for seed in (0, 1):
            recast_here = any(step["verb"] == "recast_attention" for step in settings["surgery"])
            values = {"top1": 90 + place + seed, "mean_corruption_accuracy": 60 + 2 * place + seed}
            rows = [
                {"metric": m, "value": v, "unit": "%", "n": 9, "split": "test", "conditions": {}, "method": "x"}
                for m, v in values.items()
                if m not in drop
            ]
            arrays = {f"gram/layer{k}": np.ones(10) + draws.normal(0, 0.3 + place, 10) for k in (1, 2, 3)}
            layers = ["layer3.0.conv1", "layer3.0.conv2"] if recast_here else []
            for layer in layers:
                taps = np.array([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)], float)
                heads = np.column_stack([np.hypot(*taps.T) + 0.1 * place, np.full(9, 0.1), taps + 0.1, np.full(9, 0.2)])
                arrays[f"heads/{layer}"] = heads
                conditions = {"layer": layer, "alpha": settings["surgery"][0].get("locality", 15.0)}
                row = {"metric": "initial_error", "value": 1e-3, "unit": "1", "n": 9, "split": "test", "method": "x"}
                rows.append(row | {"conditions": conditions})
            if layers:
                arrays |= {
                    "attention/layer3.0.conv2": draws.random((3, 2, 8, 8)),
                    "pictures": draws.random((3, 16, 16, 1)),
                }
                arrays["queries/layer3.0.conv2"] = np.array([[4.0, 4.0], [2.0, 2.0]])
            kept = {key: pack(array) for key, array in arrays.items() if key.split("/")[0] not in drop}
            record = head(found, name, seed) | {"what": "evaluation", "rows": rows, "arrays": kept}
            write_json(folder / "metrics" / name / f"seed{seed}" / "evaluation.json", record)
            epochs = np.arange(config.training_settings(found, name)["epochs"] + 1)
            history = {"epoch": epochs, "validation_top1": 50 + 5 * epochs + place, "seconds": 2.0 * epochs}
            for layer in layers:
                opened = 0.02 * epochs if settings["surgery"][0].get("frozen") != "gates" else 0 * epochs
                history |= {f"{layer}.content_share_{h}": opened * (1 + h) for h in range(9)}
            file = folder / "histories" / name / f"seed{seed}.csv"
            if "history" not in drop:
                file.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(history).to_csv(file, index=False)
    return Results(folder)


EVERYTHING = {
    "cnn": None,
    "cnn_finetuned": None,
    "tcnn": None,
    "tcnn_alpha_5": None,
    "tcnn_frozen_gates": None,
    "tcnn_partial_0": None,
    "tcnn_partial_50": None,
    "tcnn_partial_50_time": {"epoch_cost": 2.0},
}


def test_everything_is_drawn(tmp_path):
    results = made_up(tmp_path / "results", EVERYTHING, reduced="made up")
    names = figures.draw(results, tmp_path / "out")
    assert names == [f"tcnn_{name}" for name in ALL]
    for name in names:
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
        assert "made up" in (tmp_path / "out" / f"{name}.svg").read_text()


@pytest.mark.parametrize(
    "variants, drop, left",
    [
        ({"cnn": None, "cnn_finetuned": None}, (), {"arrows"}),
        ({"cnn": None, "tcnn": None}, ("mean_corruption_accuracy",), set(ALL) - {"arrows", "cka", "partial_starts"}),
        (
            {"cnn": None, "tcnn_frozen_gates": None},
            ("attention", "history"),
            {"non_locality", "centres", "initial_error", "arrows"},
        ),
        (
            {"cnn": None, "tcnn_partial_50": None},
            ("heads", "attention", "top1"),
            {"gates", "initial_error", "partial_starts"},
        ),
        ({"cnn": None, "tcnn_partial_50": None}, ("history", "heads", "pictures", "top1"), {"initial_error"}),
        ({"cnn": None}, (), set()),
    ],
)
def test_what_has_no_data_is_not_drawn(tmp_path, variants, drop, left):
    names = figures.draw(made_up(tmp_path / "results", variants, drop), tmp_path / "out")
    assert set(names) == {f"tcnn_{name}" for name in left}


def test_time_and_epochs_of_the_start_count(tmp_path):
    results = made_up(tmp_path / "results", EVERYTHING)
    assert figures._offset(results, "tcnn_partial_50", 0) == (4, 8.0)
    assert figures._offset(results, "tcnn", 1) == (8, 16.0)
    assert figures._offset(results, "tcnn_partial_0", 1) == (0, 0)
    figure = figures.partial_starts(results, list(EVERYTHING)[1:])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["tcnn_partial_50"].get_xdata()) == [4, 5, 6, 7, 8]
    assert list(lines["tcnn_partial_50_time"].get_xdata()) == [4, 5, 6, 7, 8, 9, 10]
    assert list({line.get_label(): line for line in figure.axes[1].lines}["tcnn_partial_50"].get_xdata()) == [
        8,
        10,
        12,
        14,
        16,
    ]


def test_arrows_go_from_the_start_to_what_it_became(tmp_path):
    """Not from what the CNN became in the end to a network that left it half-way."""
    results = made_up(tmp_path / "results", {"cnn": None, "cnn_finetuned": None, "tcnn": None, "tcnn_partial_50": None})
    figure = figures.arrows(results, ["cnn_finetuned", "tcnn", "tcnn_partial_50"])
    ends = [(tuple(text.xyann), tuple(text.xy)) for text in figure.axes[0].texts]
    assert ends == [((90.5, 60.5), (91.5, 62.5)), ((90.5, 60.5), (92.5, 64.5))]


@pytest.mark.slow
def test_a_tiny_real_run_is_drawn(tmp_path):
    """Trained, evaluated and drawn: every figure has its data in the files of a run."""
    study = config.load_study(
        {
            "study": "real",
            "data": {"name": "digits", "image_size": 32, "train_images": 128, "test_images": 40, "validation": 28},
            "host": {"name": "resnet8_8"},
            "recipes": {
                "train": {"epochs": 2, "batch_size": 50, "lr": 0.05},
                "finetune": {"epochs": 2, "batch_size": 50, "optimizer": "adamw", "lr": 0.002},
            },
            "baseline": "cnn",
            "seeds": [0],
            "variants": {"cnn": None, "cnn_finetuned": None, "tcnn": None, "tcnn_partial_50": None},
            "evaluate": {"corruption": {"protocol": "imagenet_c", "corruptions": ["contrast"], "severities": [3]}},
            "device": "cpu",
        }
    )
    meta, corrupted = (str(tmp_path / name / "meta.json") for name in ("data", "corrupted"))
    steps.data(study["data"], [], meta)
    steps.corrupt(study["evaluate"]["corruption"], meta, corrupted, 1)
    results = tmp_path / "results" / "real"
    write_json(results / "study.json", study)
    for name in study["variants"]:
        recipe, file = config.resolve(study, name, 0), tmp_path / f"{name}.json"
        write_json(file, recipe)
        weights = results / "runs" / name / "seed0" / "model.safetensors"
        start = str(results / "runs" / "cnn" / "seed0" / "model.safetensors") if recipe["start"] else None
        steps.train(str(file), meta, start, "s", study["carbon"], str(weights), str(tmp_path / "progress"))
        metrics = results / "metrics" / name / "seed0" / "evaluation.json"
        steps.evaluate(str(file), str(weights), meta, corrupted, study["evaluate"], "s", str(metrics))
        assert json.loads(metrics.read_text())["status"] == "ok" and metrics.stat().st_size < 100_000
    assert figures.draw(Results(results), tmp_path / "out") == [f"tcnn_{name}" for name in ALL]
    opened = Results(results).runs.query("metric == 'content_share' and variant == 'tcnn'")["value"]
    assert len(opened) == 2 and (opened > 0).all()
