"""The studies of the repository: that they can decide what they are for, and that their headers state the power they have."""

import re

import pytest
import torch
from house import REPOSITORY

from convx import config, queue
from convx.evaluate.cost import macs
from convx.ledger import load_ledgers
from convx.models import create_model
from convx.slots import Slots
from convx.statistics import minimum_detectable_effect, tost_power
from convx.surgery import apply

CONFIG = REPOSITORY / "config"
CLAIMS = {claim["id"]: claim for claim in load_ledgers()}
PURPOSE = {
    "fashion_mnist": ["randconv.frozen_costs_basic_block", "randconv.frozen_lc_matches_baseline"],
    "cifar10": [
        *(
            "randconv.frozen_costs_basic_block",
            "randconv.frozen_lc_matches_baseline",
            "randconv.table1_cifar10_baseline",
        ),
        *("randconv.gap_bottleneck_cifar10", "randconv.gap_mobilenet_cifar10"),
    ],
    "cifar100": ["randconv.table1_cifar100_baseline", "randconv.delta_cifar100_frozen_learned"],
    "cifar10_random": ["randconv.width_break_even", "randconv.gap_at_k9", "randconv.bn_relu_learned_over_frozen"],
    "cifar10_tcnn": ["tcnn.top1_gain_controlled", "tcnn.corruption_gain_controlled"],
    "cifar10_tcnn_large": [
        "tcnn.top1_gain_controlled",
        "tcnn.corruption_gain_controlled",
        "tcnn.partial_50_beats_scratch",
    ],
    "cifar10_dcls": ["dcls.top1_gain", "dcls.gauss_over_dense"],
    "cifar10_dcls_small": ["dcls.top1_gain"],
    "cifar10_random_small": ["randconv.frozen_lc_matches_baseline", "randconv.frozen_costs_basic_block"],
    "cifar10_sere_small": ["sere.improves_knn", "sere.improves_linear"],
    "cifar100_vit_small": [
        *("bootstrap_vit.joint_gain", "bootstrap_vit.shared_gain", "bootstrap_vit.joint_over_shared"),
        *("bootstrap_vit.joint_over_its_agent", "bootstrap_vit.joint_converges_sooner"),
    ],
}


def header(name: str) -> str:
    return (CONFIG / f"{name}.yaml").read_text(encoding="utf-8").split("study:")[0].replace("\n# ", " ")


@pytest.mark.parametrize("name", PURPOSE)
def test_a_study_can_decide_what_it_is_for(name, tmp_path):
    slots = Slots(CONFIG / f"{name}.yaml", tmp_path)
    claims, rest = queue.claims_of(slots)
    reasons = {claim: reason for reason, ids in rest.items() for claim in ids}
    missing = set(PURPOSE[name]) - {claim["id"] for claim in claims}
    assert not missing, {claim: reasons.get(claim) for claim in missing}
    assert "Seeds:" in header(name) or (name == "cifar10_dcls" and "seeds" in header(name))
    assert "Cost" in header(name)


def test_the_small_study_of_tcnn_has_its_arms_and_states_its_power():
    study = config.load_study(CONFIG / "cifar10_tcnn.yaml")
    assert list(study["variants"]) == ["cnn", "cnn_finetuned", "tcnn", "tcnn_frozen_gates"]  # arms A to D
    recipes = [config.training_settings(study, name) for name in ("cnn_finetuned", "tcnn", "tcnn_frozen_gates")]
    assert recipes[0] == recipes[1] == recipes[2]  # the same fine-tuning in every arm
    claim = CLAIMS["tcnn.top1_gain_controlled"]
    assert claim["pairing"] == "by_design" and study["evaluate"]["corruption"]["protocol"] == "cifar_c"
    n, text = len(study["seeds"]), header("cifar10_tcnn")
    power = [f"{100 * tost_power(sd, n, claim['margin']):.0f}" for sd in (0.2, 0.25, 0.3)]
    assert re.search(rf"{power[0]} % where .* 0\.2 pp .*{power[1]} % at 0\.25, {power[2]} % at 0\.3", text)
    effects = [
        f"{minimum_detectable_effect(sd, n, margin=claim['margin'], design='paired'):.2f}" for sd in (0.2, 0.25, 0.3)
    ]
    assert f"{effects[0]}, {effects[1]} and {effects[2]} pp" in text
    corrupted = minimum_detectable_effect(
        0.4, n, margin=CLAIMS["tcnn.corruption_gain_controlled"]["margin"], design="paired"
    )
    assert f"a gain of {corrupted:.2f} pp at a deviation of 0.4" in text


def test_the_small_study_of_dcls_has_its_controls_and_states_its_power():
    study = config.load_study(CONFIG / "cifar10_dcls_small.yaml")
    assert list(study["variants"]) == ["dense7", "dcls_bilinear", "dcls_frozen_positions", "dcls_uniform_frozen"]
    learned, frozen = (
        config.variant_settings(study, name)["surgery"] for name in ("dcls_bilinear", "dcls_frozen_positions")
    )
    assert frozen == [step | {"learn_positions": False} for step in learned]
    declared = config.declared_variants()["dcls_bilinear"]["surgery"]
    assert [step | {"position_std": 0.5} for step in learned] == declared
    models = [config.variant_settings(study, name)["model"] for name in study["variants"]]
    assert all(model == models[0] for model in models)
    text = header("cifar10_dcls_small")
    for sd in (0.3, 0.5, 0.7):
        effect = minimum_detectable_effect(sd, len(study["seeds"]), margin=CLAIMS["dcls.top1_gain"]["margin"])
        assert re.search(rf"{effect:.2f}( pp)? at (a seed deviation of )?{sd}\b", text), (sd, effect)


def test_the_small_study_of_sere_has_equal_arms_and_states_its_power():
    study = config.load_study(CONFIG / "cifar10_sere_small.yaml")
    assert list(study["variants"]) == ["dino", "sere", "dino_spatial", "dino_channel"]
    recipes = [config.resolve(study, name, 0) for name in study["variants"]]
    weights = [tuple(made["objective"].pop(f"{kind}_weight") for kind in ("spatial", "channel")) for made in recipes]
    assert weights == [(0.0, 0.0), (0.2, 0.5), (0.2, 0.0), (0.0, 0.5)]
    for key in ("model", "training", "objective", "data", "start"):
        assert all(made[key] == recipes[0][key] for made in recipes), key
    n, text = len(study["seeds"]), header("cifar10_sere_small")
    for metric in ("knn", "linear"):
        claim = CLAIMS[f"sere.improves_{metric}"]
        assert claim["pairing"] == "by_design" and claim["role"] == "primary"
        effects = [
            f"{minimum_detectable_effect(sd, n, margin=claim['margin'], design='paired'):.2f}" for sd in (0.5, 0.7, 1.0)
        ]
        assert f"{effects[0]}, {effects[1]} and {effects[2]} pp at a deviation of 0.5, 0.7 and 1.0" in text
        power = [f"{100 * tost_power(sd, n, claim['margin']):.0f}" for sd in (0.3, 0.5)]
        assert f"a power of {power[0]} % at a deviation of 0.3 pp and {power[1]} % at 0.5" in text


def test_the_small_study_of_the_bootstrapped_vit_has_its_arms_and_states_its_power():
    study = config.load_study(CONFIG / "cifar100_vit_small.yaml")
    assert list(study["variants"]) == ["vit", "vit_joint", "vit_shared", "vit_equal_compute", "agent"]
    settings = {name: config.variant_settings(study, name) for name in study["variants"]}
    declared, narrow = config.declared_variants(), {"agent_stem_width": 16}
    for name in ("vit", "vit_joint", "vit_shared", "vit_equal_compute"):  # the declared losses, one start for all
        differs = dict(settings[name]["objective"].items() - declared[name]["objective"].items())
        assert differs == {"init": "trunc02"} | (narrow if name in ("vit_joint", "vit_shared") else {})
    assert settings["agent"]["objective"]["init"] == "trunc02"
    host = create_model(study["host"]["name"], 100, 3, 32)
    pair = (host.eval(), apply(host, settings["agent"]["surgery"], 0).eval())
    alone, agent = (macs(model, torch.zeros(1, 3, 32, 32))[0] for model in pair)
    both = alone + agent
    epochs = {name: config.training_settings(study, name)["epochs"] for name in study["variants"]}
    assert epochs["vit_equal_compute"] == round(epochs["vit"] * both / alone)
    assert {epochs[name] for name in epochs if name != "vit_equal_compute"} == {epochs["vit"]}
    margin, n, text = CLAIMS["bootstrap_vit.joint_gain"]["margin"], len(study["seeds"]), header("cifar100_vit_small")
    effects = [f"{minimum_detectable_effect(sd, n, margin=margin, design='paired'):.2f}" for sd in (0.3, 0.5, 0.7)]
    assert f"{effects[0]}, {effects[1]} and {effects[2]} pp" in text
    power = [f"{100 * tost_power(sd, n, margin):.0f}" for sd in (0.3, 0.5, 0.7)]
    assert f"{power[0]}, {power[1]} and {power[2]} %" in text


def test_the_ground_is_checked_with_three_seeds():
    study = config.load_study(CONFIG / "cifar10_he.yaml")
    assert study["seeds"] == [0, 1, 2] and "91.25 %" in study["description"] and "91.73 %" in study["description"]
