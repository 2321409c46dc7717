"""DCLS in a study: what its runs report, preconditions of claims, what is counted, and a small study on CIFAR-10."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, mirrors

from convx import claims, config
from convx.evaluate import EvaluationData, cost, row
from convx.evaluate.payload import pack, unpack
from convx.manifest import read_json, write_json
from convx.papers.dcls import analysis, evaluate
from convx.runs import build_model
from convx.statistics import minimum_detectable_effect

STUDY = REPOSITORY / "config" / "cifar10_dcls.yaml"
META = {"num_classes": 10, "channels": 3, "image_size": 32}


@pytest.fixture(scope="module")
def study():
    return config.load_study(STUDY)


@pytest.fixture(scope="module")
def images():
    """Return four random images as an evaluation sees them."""
    rng = np.random.default_rng(0)
    return EvaluationData.from_arrays(
        rng.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8), [0, 1, 2, 3], [0.5] * 3, [0.2] * 3
    )


def of(rows, metric, **conditions):
    """Return the one value of a metric under conditions."""
    found = [r["value"] for r in rows if r["metric"] == metric and conditions.items() <= r["conditions"].items()]
    assert len(found) == 1, (metric, conditions, len(found))
    return found[0]


def move(model, by):
    """Push every tap ``by`` pixels along both axes, as far as the kernel goes."""
    with torch.no_grad():
        for layer in analysis.dcls_layers(model).values():
            layer.positions.add_(by)
            layer.after_step()
    return model


# ----------------------------------------------------------------------------------------------- what a run reports


def test_a_run_reports_its_taps_at_the_start_and_at_the_end(study, images):
    recipe = config.resolve(study, "dcls_bilinear", 1)
    model = build_model(recipe, META)
    before = analysis.rows(model)
    moved = move(model, 2.5).eval()
    state = torch.get_rng_state()
    result = evaluate.run(moved, recipe, images)
    assert torch.equal(torch.get_rng_state(), state)
    for metric in ("tap_radius_mean", "tap_radius_p10", "tap_radius_p50", "tap_radius_p90", "repulsive_loss"):
        assert of(result.rows, metric, state="start", layer="all") == of(before, metric, layer="all")
    assert of(result.rows, "tap_radius_mean", state="end", layer="all") == pytest.approx(
        3.6, abs=0.1
    )  # 2.5 sqrt 2, and some
    ends = {r["conditions"]["layer"] for r in result.rows if r["conditions"].get("state") == "end"}
    assert ends == {"stages.0.0.conv_dw", "stages.1.2.conv_dw", "all"}
    overlap = [of(result.rows, "tap_overlap", state="end", layer=layer) for layer in sorted(ends - {"all"})]
    assert of(result.rows, "repulsive_loss", state="end") == pytest.approx(np.mean(overlap) ** 2)
    assert result.arrays["positions/stages.0.0.conv_dw/start"].sum() == pytest.approx(100)
    kernel = result.arrays["kernels/stages.1.2.conv_dw/end"]
    torch.testing.assert_close(torch.from_numpy(kernel), moved.stages[1][2].conv_dw.effective_kernel()[:6, 0].detach())
    text = json.dumps({"rows": result.rows, "arrays": {k: pack(v) for k, v in result.arrays.items()}}, indent=1)
    assert len(text) < 40_000


def test_the_start_of_controls_and_of_other_networks(study, images):
    assert evaluate.run(build_model(config.resolve(study, "dense7", 0), META), {}, images).rows == []
    frozen = config.resolve(study, "dcls_uniform_frozen", 0)
    rows = evaluate.run(build_model(frozen, META), frozen, images).rows
    radii = [of(rows, "tap_radius_p90", state=state, layer="all") for state in ("start", "end")]
    assert radii[0] == radii[1] > 5
    assert not [r for r in rows if r["metric"] == "precondition"]  # a control claims nothing about learning
    # The positions of another run, kept: they are the start, though this recipe alone cannot draw them.
    again = config.resolve(study, "dcls_final_positions_frozen", 0)
    rows = evaluate.run(move(build_model(again, META), 3.0), again, images).rows
    assert (
        of(rows, "tap_radius_mean", state="start", layer="all")
        == of(rows, "tap_radius_mean", state="end", layer="all")
        > 4
    )
    # Learned positions that went on from another run: where they started is not known from the recipe.
    went_on = again | {"surgery": []}
    states = {r["conditions"].get("state") for r in evaluate.run(build_model(went_on, META), went_on, images).rows}
    assert states == {"end", None}


def test_taps_count_as_spread_beyond_the_kernel_that_they_replace(study, images):
    for name, size in (("dcls_bilinear", 7), ("dcls_resnet", 3)):
        own = study | {
            "variants": study["variants"] | {"dcls_resnet": {"model": {"name": "resnet8_8", "settings": {}}}}
        }
        recipe = config.resolve(own, name, 0)
        model = build_model(recipe, META)
        rows = evaluate.run(model, recipe, images).rows
        assert {r["conditions"]["dense_side"] for r in rows if r["metric"] == "tap_share_outside"} == {size}
        said = next(r for r in rows if r["metric"] == "precondition")
        assert (
            said["value"] == 0 and said["conditions"] == {"name": "taps_spread"} and "did not spread" in said["method"]
        )
        rows = evaluate.run(move(model, size / 2 + 0.5), recipe, images).rows
        assert of(rows, "precondition", name="taps_spread") == 1


def test_multiply_adds_do_not_depend_on_how_a_kernel_is_applied(study, images):
    """On a CPU the forward pass is an FFT, which no counter sees, and a product with a matrix of shifts."""
    found = {}
    for name in ("dcls_bilinear", "dcls_gauss", "dense_s"):
        model = build_model(config.resolve(study, name, 0), META)
        rows = [r for r in cost.run(model, images, {"batch_size": 1}).rows if r["metric"] == "macs"]
        found[name] = {r["conditions"]["folded"]: r["value"] for r in rows}
        if name != "dense_s":
            assert "counted as the convolution it builds: DCLSConv2d" in rows[0]["method"]
            assert "_fft" not in rows[0]["method"]
            assert cost.macs(model, torch.zeros(1, 3, 32, 32))[0] < found[name]["no"]
    dense = found["dense_s"]["no"]  # kernels as large, without taps
    assert found == {
        "dcls_bilinear": {"no": dense, "yes": dense},
        "dcls_gauss": {"no": dense, "yes": dense},
        "dense_s": {"no": dense},
    }
    layer = model_layer(build_model(config.resolve(study, "dcls_bilinear", 0), META))
    assert cost.macs(cost.countable(layer)[0], torch.zeros(1, 64, 16, 16))[0] == 64 * 256 * 225


def model_layer(model):
    return next(iter(analysis.dcls_layers(model).values()))


# -------------------------------------------------------------------------------------------------- preconditions


def verdicts(study, rows):
    """Return {claim: (verdict, reason, ours_mean)} of the DCLS ledger for made-up rows of a study."""
    frame = pd.DataFrame(
        [
            {"study": "s", "what": "evaluation", "status": "ok", "reason": "", "variant": variant, "seed": seed}
            | {k: v for k, v in entry.items() if k != "conditions"} | entry["conditions"]
            for variant, seed, entry in rows
        ]
    )  # fmt: skip
    ledger = [c for c in claims.load_ledgers() if c["paper"] == "dcls" and c["kind"] != "exact"]
    table = claims.evaluate(ledger, frame, {}, claims.study_facts(study))
    return {r["claim_id"]: r for r in table.to_dict("records")}


def made_up_rows(study, met):
    rng = np.random.default_rng(0)
    rows = []
    for variant, mean in (("dense7", 90.0), ("dcls_bilinear", 91.0), ("dcls_gauss", 92.0)):
        for seed in study["seeds"]:
            rows.append(
                (variant, seed, row("top1", mean + rng.normal(0, 0.1), "%", n=10000, split="test", method="made up"))
            )
            if variant in met:
                said = f"made up reason {seed}"
                rows.append(
                    (variant, seed, row("precondition", met[variant](seed), "1", method=said, name="taps_spread"))
                )
    for part, value in {"median": 1.5, "low": 1.45, "high": 1.55}.items():
        where = {"batch": 32, "reference": "dense7", "statistic": part, "folded": "no"}
        rows.append(("dcls_bilinear", 0, row("latency_ratio", value, "ratio", method="made up", **where)))
    return rows


def test_a_precondition_that_is_not_met_makes_claims_not_comparable(study):
    met = verdicts(study, made_up_rows(study, {"dcls_bilinear": lambda seed: 1, "dcls_gauss": lambda seed: 1}))
    bare = verdicts(study, made_up_rows(study, {}))
    for name in ("dcls.top1_gain", "dcls.gauss_over_bilinear", "dcls.gauss_over_dense", "dcls.slower_than_dense"):
        assert met[name]["verdict"] == bare[name]["verdict"] == "supported", name
    one = verdicts(
        study, made_up_rows(study, {"dcls_bilinear": lambda seed: int(seed != 3), "dcls_gauss": lambda seed: 1})
    )
    gain = one["dcls.top1_gain"]
    assert gain["verdict"] == "not comparable"
    assert gain["reason"] == "dcls_bilinear, 1 of 8 seeds: made up reason 3 (seed 3)"
    assert gain["ours_mean"] == pytest.approx(91, abs=0.2) and gain["ours_n"] == 8 and np.isnan(gain["delta"])
    over = one["dcls.gauss_over_bilinear"]  # the one that did not spread is the reference here
    assert over["verdict"] == "not comparable" and over["reference_mean"] == pytest.approx(91, abs=0.2)
    assert one["dcls.gauss_over_dense"]["verdict"] == "supported"  # of other variants
    assert one["dcls.slower_than_dense"]["verdict"] == "supported"  # a cost does not depend on what was learned


def test_any_paper_may_state_a_precondition(study):
    """The rule knows neither the paper nor the name: a row without a value, or with another name, is enough."""
    rows = made_up_rows(study, {})
    rows += [("dense7", seed, row("precondition", None, "1", method="", name="something")) for seed in study["seeds"]]
    found = verdicts(study, rows)["dcls.top1_gain"]
    assert found["verdict"] == "not comparable"
    assert found["reason"] == "dense7, 8 of 8 seeds: the precondition something is not met (seed 0)"


# ------------------------------------------------------------------------------------------------------- the study


def test_the_study_has_every_arm_and_states_its_power(study):
    arms = {"dense7", "dcls_bilinear", "dcls_gauss", "dilated_fixed", "dense_s", "dense3"}
    controls = {"dcls_frozen_positions", "dcls_uniform_frozen", "dcls_final_positions_frozen"}
    ablations = {"dcls_lr_factor_1", "dcls_unshared", "dcls_no_repulsion", "dcls_uniform", "dcls_wide_start"}
    assert (
        arms | controls | ablations <= set(study["variants"])
        and study["seeds"] == [0, 1, 2, 3, 4, 5, 6, 7]
        and study["reduced"]
    )
    assert all(config.seeds(study, name) == study["seeds"] for name in study["variants"])
    header = STUDY.read_text().split("study:")[0].replace("\n# ", " ")
    gain = next(c for c in claims.load_ledgers() if c["id"] == "dcls.top1_gain")
    for sd in (0.2, 0.3, 0.4):
        effect = minimum_detectable_effect(sd, len(study["seeds"]), margin=gain["margin"])
        assert re.search(rf"{effect:.2f}\b[^,;]*\bat [^,;]*\b{sd}\b", header), (sd, effect)
    updates = study["recipes"]["train"]["epochs"] * -(-50_000 // study["recipes"]["train"]["batch_size"])
    assert f"{updates:,} updates" in header and f"{len(study['variants']) * 8} runs" in header


def cifar10_mirror(target: Path) -> list[str]:
    """Return folders that hold the official files of CIFAR-10; a mirror that has a script to unpack them is unpacked."""
    from convx.data import SETS
    from convx.data.sources import Finder

    for folder in mirrors():
        if Finder([folder], target).official(SETS["cifar10"], addresses=False):
            return [folder]
        if (script := Path(folder) / "unpack_cifar.py").is_file() and (Path(folder) / "cifar10").is_dir():
            target.mkdir()
            subprocess.run([sys.executable, script, target, "cifar10"], check=True, capture_output=True)
            return [str(target)]
    pytest.skip("no mirror holds CIFAR-10; set CONVX_MIRROR")


@pytest.mark.slow
def test_a_small_study_on_cifar10_from_data_to_figures(tmp_path_factory):
    """One epoch of 256 images: every step of the engine, the claims, and figures from what it left."""
    from convx import steps
    from convx.data import prepare
    from convx.report.figures import paper_figures
    from convx.report.results import Results

    root = tmp_path_factory.mktemp("study")
    sources = cifar10_mirror(root / "cifar")
    given = config.load_study(STUDY)
    small = {"study": "tiny", "reduced": "one epoch of 256 images", "device": "cpu", "seeds": [0], "mirror": sources}
    small["data"] = {"name": "cifar10", "train_images": 256, "test_images": 100}
    small["variants"] = dict.fromkeys(["dense7", "dcls_bilinear", "dcls_final_positions_frozen"])
    recipe = given["recipes"]["train"] | {"epochs": 1, "batch_size": 32, "warmup_epochs": 0}
    latency = {"batches": [8], "rounds": 10, "seconds": 1}
    keep = {key: given[key] for key in ("host", "baseline", "description")}
    study = config.load_study(keep | small | {"recipes": {"train": recipe}, "evaluate": {"latency": latency}})
    folder, data = root / "results" / "tiny", root / "data"
    prepare(study["data"], data, mirrors=sources, progress=False)
    write_json(folder / "study.json", study)
    files = {}
    for name in study["variants"]:
        run = folder / "runs" / name / "seed0"
        files[name] = [str(run / "recipe.json"), str(run / "model.safetensors")]
        write_json(files[name][0], config.resolve(study, name, 0))
        start = config.variant_settings(study, name)["start_from"]
        meta = str(data / "meta.json")
        steps.train(
            files[name][0], meta, start and files[start][1], "source", {}, files[name][1], str(root / "progress")
        )
        out = str(folder / "metrics" / name / "seed0" / "evaluation.json")
        steps.evaluate(*files[name], meta, None, {"batch_size": 100}, "source", out)
    out = folder / "metrics" / "dcls_bilinear" / "seed0" / "cost.json"
    settings = {"latency": study["evaluate"]["latency"]}
    steps.measure(*files["dcls_bilinear"], files["dense7"], meta, settings, "source", str(out))

    results = Results(folder)
    record = read_json(folder / "metrics" / "dcls_bilinear" / "seed0" / "evaluation.json")
    assert (folder / "metrics" / "dcls_bilinear" / "seed0" / "evaluation.json").stat().st_size < 100_000
    history = results.history("dcls_bilinear", 0)
    for place, state in enumerate(("start", "end")):  # the evaluator and the training loop see the same taps
        radii = history.filter(like="tap_radius_mean").iloc[place]
        assert len(radii) == 2
        counts = np.array([64, 128])
        wanted = (radii.to_numpy() * counts).sum() / counts.sum()
        assert of(record["rows"], "tap_radius_mean", state=state, layer="all") == pytest.approx(wanted, rel=1e-4)
    key = "positions/stages.0.0.conv_dw/end"
    kept = read_json(folder / "metrics" / "dcls_final_positions_frozen" / "seed0" / "evaluation.json")
    np.testing.assert_array_equal(unpack(kept["arrays"][key]), unpack(record["arrays"][key]))
    gain = results.replication.set_index("claim_id").loc["dcls.top1_gain"]
    assert gain["verdict"] == "not comparable" and "did not spread" in gain["reason"]
    assert results.replication.set_index("claim_id").loc["dcls.slower_than_dense"]["verdict"] != "not comparable"
    drawn = paper_figures(results, root)
    assert drawn == [f"dcls_{n}" for n in ("positions", "kernels", "radius", "repulsion", "parameters", "throughput")]
