"""The studies of the bootstrapped ViT: their arms and costs, the ledger, rows that follow from several runs, the figures."""

import csv
import re

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from made_up import build

from convx import claims, config
from convx.evaluate import row
from convx.evaluate.payload import pack
from convx.manifest import read_json, write_json
from convx.papers.bootstrap_vit import exact, figures
from convx.papers.bootstrap_vit.derived import _reached
from convx.report.figures import paper_figures
from convx.report.results import Results
from convx.runs import build_model
from convx.statistics import minimum_detectable_effect

STUDY = REPOSITORY / "config" / "cifar100_vit.yaml"
PAPER = REPOSITORY / "config" / "cifar100_bootstrap_paper.yaml"
ARMS = {"vit", "vit_trunc02", "vit_equal_compute", "agent", "cnn", "vit_joint", "vit_shared"}
CONTROLS = {"vit_kd_agent", "vit_kd_only", "vit_feature_only", "vit_joint_no_decay", "vit_feature_only_avg2d"}
CONTROLS |= {
    "agent_plain",
    "vit_joint_plain_agent",
    "vit_feature_only_no_decay",
    "vit_shared_pcgrad",
    "vit_joint_trunc02",
}


def training_macs(settings: dict, classes: int, size: int) -> float:
    """Three forward passes of what a variant trains, counted without memory."""
    from convx.evaluate.cost import macs
    from convx.papers.bootstrap_vit.evaluate import agent_like

    recipe = {"start": None, "seed": 0, "model": settings["model"], "surgery": settings["surgery"]}
    with torch.device("meta"):
        model = build_model(recipe, {"num_classes": classes, "channels": 3, "image_size": size})
        x = torch.empty(1, 3, size, size)
        total = macs(model, x)[0]
        if settings["objective"].get("mode") in ("joint", "shared"):
            total += macs(agent_like(model, settings["objective"]), x)[0]
    return 3 * total


def test_the_study_has_every_arm_and_states_its_cost():
    study = config.load_study(STUDY)
    fractions = {f"{name}_{share}pct" for name in ("vit", "vit_joint", "agent") for share in (10, 20, 50)}
    assert (
        ARMS | CONTROLS | fractions <= set(study["variants"]) and study["reduced"] and study["seeds"] == [0, 1, 2, 3, 4]
    )
    cost = {
        name: training_macs(config.variant_settings(study, name), 100, 32) for name in ("vit", "agent", "vit_joint")
    }
    ratio = cost["vit_joint"] / cost["vit"]
    epochs = {
        name: config.training_settings(study, name)["epochs"] for name in ("vit", "vit_joint", "vit_equal_compute")
    }
    assert epochs["vit"] == epochs["vit_joint"] and epochs["vit_equal_compute"] == round(ratio * epochs["vit"])
    header = STUDY.read_text().split("study:")[0].replace("\n# ", " ")
    assert "{:.1f} G multiply-adds to train in the ViT alone, {:.1f} in the agent, {:.1f} jointly".format(
        *(cost[name] / 1e9 for name in ("vit", "agent", "vit_joint"))
    ) in header  # fmt: skip
    assert f"{len(study['variants']) * 5} runs" in header
    gain = next(c for c in claims.load_ledgers() if c["id"] == "bootstrap_vit.joint_gain")
    for sd in (0.3, 0.5):
        effect = minimum_detectable_effect(sd, 5, margin=gain["margin"], design="one_sample")
        assert re.search(rf"{effect:.2f}\b[^,;]*\b{sd}\b", header), (sd, effect)


def test_the_papers_protocol_is_the_ledgers():
    """Every claim of Tables 1, 4 and 5 on CIFAR-100 that convx has variants for is comparable there, in data and protocol."""
    from convx.evidence import differences

    study = config.load_study(PAPER)
    facts, found = claims.study_facts(study), []
    for claim in claims.load_ledgers(["bootstrap_vit"]):
        if claim["data"] == "cifar100" and claim["kind"] == "absolute" and claim["variant"] in study["variants"]:
            assert differences(claim, facts) == [], claim["id"]
            found.append(claim["id"].split("_")[1])
    assert len(found) >= 20 and {"vit.table1"} | set(found)
    header = PAPER.read_text().split("study:")[0].replace("\n# ", " ")
    assert f"{240 * -(-50_000 // 64):,} updates" in header and f"{len(study['variants']) * 3} runs" in header
    names = ("vit", "vit_joint", "vit_base", "vit_base_joint", "resnet50")
    cost = [training_macs(config.variant_settings(study, name), 100, 32) / 1e9 for name in names]
    words = "{:.1f} G multiply-adds to train in ViT-S alone, {:.1f} jointly, {:.1f} in ViT-B alone, {:.0f} jointly ({:.1f} in"
    assert words.format(*cost) in header, words.format(*cost)


def test_sizes_are_exact():
    counted = {
        name: getattr(exact, f"parameters_{name}")() * 1e6
        for name in ("vit_s_10", "vit_s_100", "vit_b_10", "vit_b_100")
    }
    counted |= {name: getattr(exact, f"parameters_{name}")() * 1e6 for name in ("agent_s_10", "agent_b_10")}
    wanted = [6_276_394, 6_302_404, 21_669_514, 21_704_164, 8_656_746, 25_054_410]
    assert [round(value) for value in counted.values()] == wanted
    ledger = claims.load_ledgers(["bootstrap_vit"])
    numbers = claims.run_exact(ledger)
    assert not [check for check, found in numbers.items() if "error" in found]
    differ = {
        c["id"].split(".")[1]
        for c in ledger
        if c["kind"] == "exact" and abs(numbers[c["check"]]["value"] - c["paper_value"]) > c["margin"]
    }
    agents = {"parameters_agent_s_cifar100", "parameters_agent_b_cifar100", "macs_agent_s", "macs_agent_b"}
    assert agents <= differ and not {name for name in differ if name.startswith("parameters") and name not in agents}


def test_every_variant_builds(digits):
    study = config.load_study(STUDY)
    meta = {"num_classes": 100, "channels": 3, "image_size": 32}
    for name in study["variants"]:
        recipe = config.resolve(study, name, 0)
        with torch.device("meta"):
            build_model(recipe, meta)
    vit, joint = (config.resolve(study, name, 0) for name in ("vit", "vit_joint"))
    assert vit["training"]["clip_grad"] == 0.1 and joint["training"]["clip_grad"] is None


# -------------------------------------------------------------------------------------------------------- made-up results

MADE_UP = {
    "study": "made_up_vit",
    "host": {"name": "vit36_2_h9_p4"},
    "baseline": "vit",
    "seeds": [0, 1, 2],
    "recipes": {"train": {"epochs": 12, "optimizer": "adamw", "lr": 0.001}},
    "variants": dict.fromkeys(
        ("vit", "agent", "vit_joint", "vit_shared", "vit_kd_only", "vit_10pct", "vit_joint_10pct", "agent_10pct")
    ),
}
FINAL = {"vit": 50, "agent": 66, "vit_joint": 70, "vit_shared": 68, "vit_kd_only": 49}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return made-up results with what the runs of this paper leave: curves, distances, attention, training cost."""
    folder = build(tmp_path_factory.mktemp("made_up"), **MADE_UP)
    for place, name in enumerate(MADE_UP["variants"]):
        for seed in MADE_UP["seeds"]:
            rng = np.random.default_rng([place, seed])
            final = FINAL.get(name, 30 + place)
            file = folder / "histories" / name / f"seed{seed}.csv"
            with open(file, "w", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow(
                    ["epoch", "validation_top1", *(f"feature_distance_{i}" for i in range(3) if "joint" in name)]
                )
                for epoch in range(13):
                    top1 = 10 + (final - 10) * (1 - np.exp(-epoch / 3)) / (1 - np.exp(-4)) + rng.normal() * 0.2
                    distances = [1.9 * np.exp(-epoch / (4 + i)) + 0.1 for i in range(3) if "joint" in name]
                    writer.writerow([epoch, top1, *distances])
            file = folder / "metrics" / name / f"seed{seed}" / "evaluation.json"
            record = read_json(file)
            macs = 3e6 * (2.5 if "joint" in name or "shared" in name else 1)
            record["rows"].append(row("training_macs", macs, "MAC per image", method="made up"))
            if name in ("vit_joint", "vit_shared"):
                record["rows"].append(row("top1", 61.0, "%", n=400, split="test", method="made up", branch="agent"))
            if not name.startswith("agent"):
                heads = 8 + 6 * rng.random((4, 9)) + np.arange(4)[:, None] * (1 + place)
                record["arrays"] = {"attention_distance": pack(heads)}
            write_json(file, record)
            file = file.with_name("training.json")
            record = read_json(file)
            record["rows"].append(row("train_images_per_second", 500, "images/s", method="made up"))
            write_json(file, record)
    return Results(folder)


def test_convergence_is_the_share_of_epochs_to_the_plain_vits_end(results):
    rows = results.runs[results.runs["metric"] == "convergence"]
    assert set(rows["variant"]) == set(MADE_UP["variants"]) and (rows["status"] == "ok").all()
    values = {name: rows[rows["variant"] == name] for name in FINAL}
    joint = values["vit_joint"]["value"].astype(float)
    assert len(joint) == 3 and (joint < 50).all() and (values["vit"]["value"].astype(float) <= 100).all()
    never = values["vit_kd_only"][values["vit_kd_only"]["method"].str.contains("never reached")]
    assert len(never) and (never["value"] == 100).all()
    assert _reached(np.array([1.0, 5.0, 4.0]), np.array([1.0, 3.0, 6.0]))[0] == 100
    assert _reached(np.array([1.0, 5.0, 4.0]), np.array([1.0, 5.0, 4.0]))[0] == 50
    assert _reached(None, np.array([1.0])) is None
    verdicts = results.replication.set_index("claim_id")
    found = verdicts.loc["bootstrap_vit.joint_converges_sooner"]
    assert found["verdict"] == "supported" and found["unit"] == "% of epochs" and found["ours_n"] == 3


def test_claims_take_the_branch_that_they_name_and_pairs_of_seeds(results):
    verdicts = results.replication.set_index("claim_id")
    gain = verdicts.loc["bootstrap_vit.joint_gain"]
    assert gain["verdict"] in claims.DECIDED or gain["reason"]
    assert "paired" in gain["method"] or "seeds" in gain["method"]
    agent = verdicts.loc["bootstrap_vit.table5_base_agent"]
    assert agent["verdict"] == "not run"
    agent = verdicts.loc["bootstrap_vit.table1_cifar100_joint_agent_s"]
    assert agent["ours_mean"] == 61.0 and agent["verdict"] == "not comparable"
    vit = verdicts.loc["bootstrap_vit.table1_cifar100_joint_vit_s"]
    assert vit["ours_mean"] != 61.0


def test_figures_are_drawn_from_what_there_is(results, tmp_path):
    drawn = paper_figures(results, tmp_path)
    assert drawn == [f"bootstrap_vit_{name}" for name in ("convergence", "features", "attention", "fractions")]
    for name in drawn:
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        text = (tmp_path / f"{name}.svg").read_text()
        assert "vit_joint" in text and "Reduced study" in text
    assert figures._compute(results, "vit_joint") == pytest.approx(2.5 * figures._compute(results, "vit"), rel=0.5)


def test_figures_without_data_are_left_out(tmp_path):
    bare = Results(build(tmp_path, **MADE_UP | {"variants": {"vit": None, "agent": None}}))
    assert figures.draw(bare, tmp_path) == ["bootstrap_vit_convergence"]
