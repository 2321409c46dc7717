"""The bootstrapped ViT through the engine: killed and resumed, what is saved, teachers, shares of the data, mistakes."""

import copy
import math
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_bootstrap_vit import make_vit
from test_bootstrap_vit_objective import HOST, batch, objective_of, recipe_of
from test_training import assert_same_bits, fit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import convx
from convx import config
from convx.data.splits import training_rows
from convx.layers.agent_cnn import AgentCNN
from convx.objectives import bootstrap
from convx.objectives.bootstrap import distillation
from convx.runs import RunData, build_model, build_teacher, load_weights, save_weights
from convx.training import Progress, Trainer

# ---------------------------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize(("mode", "settings"), [("joint", {}), ("shared", {}), ("shared", {"align": "pcgrad_global"})])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(digits, tmp_path, monkeypatch, mode, settings):
    recipe = recipe_of(mode, training={"clip_grad": 1.0}, **settings)
    whole = fit(recipe, digits, tmp_path / "whole")
    step, done = Trainer.train_step, []

    def stop(self, *given):
        step(self, *given)
        done.append(1)
        if len(done) == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(SystemExit):
        fit(recipe, digits, tmp_path / "cut")
    cut = fit(recipe, digits, tmp_path / "cut")
    assert_same_bits(whole.objective.state_dict(), cut.objective.state_dict())  # the agent's too
    assert len(done) == 2 * cut.batches.steps
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert drop(whole.history) == drop(cut.history)
    assert {"validation_top1", "validation_agent_top1", "feature_distance_1", "train_agent_top1"} <= whole.history[
        -1
    ].keys()
    if mode == "shared":  # tied after it was restored
        before = cut.objective.agent.blocks[0].conv.taps().clone()
        with torch.no_grad():
            cut.objective.vit.blocks[0].attn.proj.weight.mul_(2)
        assert torch.allclose(cut.objective.agent.blocks[0].conv.taps(), 2 * before)


@pytest.mark.parametrize("mode", ["vit", "joint", "shared"])
def test_what_is_saved_is_the_plain_vit(digits, tmp_path, mode):
    trainer = fit(recipe_of(mode, training={"epochs": 1}), digits, tmp_path)
    file = tmp_path / "model.safetensors"
    save_weights(trainer.exported(), file)
    meta = trainer.data.meta
    plain = VisionTransformer(
        img_size=32, patch_size=8, in_chans=1, num_classes=10, embed_dim=36, depth=2, num_heads=9,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip
    load_weights(plain, file)
    images = trainer.data.normalise(trainer.validation[0])
    branch = trainer.objective.eval().vit
    assert torch.equal(plain.eval()(images), branch(images))
    trainer.objective.agent = None  # the ViT runs without it
    assert torch.equal(load_weights(build_model(trainer.recipe, meta), file).eval()(images), branch(images))
    assert not any("agent" in name for name in plain.state_dict())
    assert sum(p.numel() for p in branch.parameters()) == sum(p.numel() for p in plain.parameters())


def test_an_agent_alone_is_saved_whole(digits, tmp_path):
    recipe = recipe_of("agent", "agent", [{"verb": "agent_of", "weights": "own", "stem_width": 8}], {"epochs": 1})
    trainer = fit(recipe, digits, tmp_path)
    save_weights(trainer.exported(), tmp_path / "model.safetensors")
    again = load_weights(build_model(recipe, trainer.data.meta), tmp_path / "model.safetensors")
    assert isinstance(again, AgentCNN)
    images = trainer.data.normalise(trainer.validation[0])
    assert torch.equal(again.eval()(images), trainer.objective.eval().agent(images))


@pytest.mark.parametrize("mode", ["joint", "shared"])
def test_the_agent_is_kept_beside_the_vit(digits, tmp_path, mode):
    trainer = fit(recipe_of(mode, training={"epochs": 1}), digits, tmp_path)
    (agent,) = trainer.objective.companions().values()
    images = trainer.data.normalise(trainer.validation[0])
    branch = trainer.objective.eval().agent
    torch.testing.assert_close(agent.eval()(images), branch(images), rtol=1e-4, atol=1e-4)
    assert not fit(recipe_of("vit", training={"epochs": 0}), digits, tmp_path).objective.companions()


def test_joint_training_drives_the_loss_down(digits):
    """30 steps on 64 images; also under bfloat16 autocast, where nothing becomes NaN."""
    for precision in ("fp32", "bf16"):
        recipe = recipe_of(
            "joint", training={"epochs": 15, "precision": precision, "lr": 2e-3}, init="trunc02", feature_weight=1.0
        )
        trainer = Trainer(recipe, digits)
        trainer.batches.images, trainer.batches.labels = trainer.batches.images[:64], trainer.batches.labels[:64]
        trainer.batches.steps = 2
        trainer.objective.train()
        losses = []
        for epoch in range(15):
            trainer.epoch, trainer.sums = epoch, {}
            for step, images, labels, rng in trainer.batches.epoch(epoch):
                trainer.step = step
                trainer.train_step(images, labels, rng)
            assert all(torch.isfinite(torch.as_tensor(v)).all() for v in trainer.sums.values())
            trainer.objective.eval()
            with torch.no_grad():
                logits = trainer.objective.vit(trainer.data.normalise(trainer.batches.images))
            trainer.objective.train()
            losses.append(F.cross_entropy(logits, trainer.batches.labels).item())
        assert losses[-1] < losses[0] - 0.1 and all(map(math.isfinite, losses)), (precision, losses)


# ------------------------------------------------------------------------------------------------- teachers, shares, mistakes


def agent_recipe():
    return recipe_of("agent", "agent", [{"verb": "agent_of", "weights": "own", "stem_width": 8}], {"epochs": 1})


def test_a_vit_learns_from_an_agent_that_was_trained_before(digits, tmp_path):
    first = agent_recipe()
    trainer = fit(first, digits, tmp_path / "a")
    save_weights(trainer.exported(), tmp_path / "model.safetensors")
    recipe = recipe_of("vit", "vit_kd_agent", training={"epochs": 1})
    recipe |= {"teacher": {"variant": "agent", "recipe": first}}
    recipe["digest"] = config.recipe_digest(recipe)
    student = fit(recipe, digits, tmp_path / "b", teacher_weights=tmp_path / "model.safetensors")
    assert_same_bits(trainer.exported().state_dict(), student.objective.teacher.state_dict())  # batch norm's means too
    assert not student.objective.train().teacher.training
    assert not any(
        p is q
        for g in student.optimizer.param_groups
        for p in g["params"]
        for q in student.objective.teacher.parameters()
    )
    alone = fit(recipe_of("vit", "vit_kd_agent", training={"epochs": 1}), digits, tmp_path / "c")
    assert student.history[-1]["train_loss"] > alone.history[-1]["train_loss"]  # distillation is added
    assert "teacher" not in " ".join(student.exported().state_dict())
    images, labels, rng = batch()
    objective = student.objective.eval()
    x = objective.normalise(objective.augment(images, rng))
    expected = F.cross_entropy(objective.vit(x), labels) + distillation(objective.vit(x), objective.teacher(x), 4.0)
    torch.testing.assert_close(objective(images, labels, rng, 0.0)[0], expected)
    keys = {
        Progress(tmp_path, recipe, "s", "d", None, file).key
        for file in (None, tmp_path / "model.safetensors", __file__)
    }
    assert len(keys) == 3
    assert build_teacher(first, trainer.data.meta) is None


STUDY = {
    "study": "tiny",
    "data": {"name": "digits", "image_size": 32},
    "host": {"name": HOST},
    "baseline": "vit",
    "seeds": [0, 1],
    "recipes": {"train": {"epochs": 1, "optimizer": "adamw", "lr": 0.001}},
    "variants": {"vit": None, "agent": None, "vit_kd_agent": None, "vit_joint": None},
}


def study_of(**changes):
    return config.load_study(copy.deepcopy(STUDY) | {"variants": STUDY["variants"] | changes})


def test_a_teacher_is_an_edge_of_the_study():
    from convx.plan import Plan

    study = study_of()
    recipe = config.resolve(study, "vit_kd_agent", 1)
    assert recipe["teacher"]["variant"] == "agent" and recipe["teacher"]["recipe"]["seed"] == 1
    assert "teacher" not in config.resolve(study, "vit", 1)
    changed = study_of(agent={"training": {"lr": 0.002}})
    assert config.resolve(changed, "vit_kd_agent", 1)["digest"] != recipe["digest"]
    assert config.resolve(changed, "vit", 1)["digest"] == config.resolve(study, "vit", 1)["digest"]
    plan, at = Plan(study, "here"), type("Wildcards", (), {"variant": "vit_kd_agent", "seed": "1"})
    assert plan.teacher(at) == ["results/tiny/runs/agent/seed1/model.safetensors"] and plan.start(at) == []
    at.variant = "vit"
    assert plan.teacher(at) == []
    wrong = {
        "it learns from 'agent', which is not a variant of the study": {
            "variants": {"vit": None, "vit_kd_agent": None}
        },
        "whose seeds lack 1": {"variants": STUDY["variants"] | {"agent": {"seeds": [0]}}},
        "'vit_kd_agent' is unknown; did you mean": None,
        "teacher: 'vit_kd_agent' itself needs 'agent'": {
            "variants": STUDY["variants"] | {"agent": {"teacher": "vit_kd_agent"}}
        },
        "the objective supervised learns from no teacher": {
            "variants": STUDY["variants"] | {"vit": {"teacher": "agent", "objective": {"name": "supervised"}}}
        },
    }
    for words, change in wrong.items():
        if change is not None:
            with pytest.raises(config.ConfigError, match=words):
                config.load_study(copy.deepcopy(STUDY) | change)


def test_a_share_of_the_training_images(digits):
    whole, half, tenth = (
        Trainer(recipe_of("vit", training={"train_share": s}), digits).batches for s in (1.0, 0.5, 0.1)
    )
    assert len(whole.images) == 288 and len(half.images) == 144 and len(tenth.images) == 29
    counts = torch.bincount(half.labels, minlength=10)
    assert (counts - torch.bincount(whole.labels, minlength=10) / 2).abs().max() <= 1
    rows = [set(training_rows(whole.labels.numpy(), share).tolist()) for share in (0.1, 0.5)]
    assert rows[0] < rows[1] and training_rows(whole.labels.numpy(), 1.0) is None
    assert torch.equal(half.images, whole.images[torch.tensor(sorted(rows[1]))])
    other = Trainer(recipe_of("vit", training={"train_share": 0.5}) | {"seed": 5}, digits).batches
    assert torch.equal(other.images, half.images)  # the choice is the same for every seed
    study = study_of(vit={"training": {"train_share": 0.5}})
    assert config.training_settings(study, "vit")["train_share"] == 0.5
    with pytest.raises(config.ConfigError, match=r"train_share: 1\.5 is out of range"):
        study_of(vit={"training": {"train_share": 1.5}})


def test_mistakes_are_told_before_anything_runs(digits):
    for objective, words in (
        (
            {"name": "bootstrap", "mode": "jiont"},
            "objective.mode: 'jiont' is not valid; choose one of vit, agent, joint",
        ),
        (
            {"name": "bootstrap", "feature_wieght": 1},
            "objective.feature_wieght: unknown setting; did you mean 'feature_weight'",
        ),
        ({"name": "bootstrap", "kd_temperature": 0}, "objective.kd_temperature: 0 is out of range"),
        (
            {"name": "bootstrap", "agent_down_after": [0, "b"]},
            "objective.agent_down_after: 'b' should be a whole number",
        ),
        ({"name": "bootsrap"}, "objective.name: 'bootsrap' is unknown; choose one of bootstrap"),
    ):
        with pytest.raises(config.ConfigError, match=words):
            study_of(vit={"objective": objective})
    study_of(vit={"objective": {"name": "bootstrap", "mode": "joint", "agent_down_after": [0]}})
    for settings, words in (
        ({"mode": "agent"}, r"add \{verb: agent_of, weights: own\} to the surgery"),
        ({"mode": "joint", "align": "pcgrad_global"}, "pcgrad_global is for mode: shared, this is joint"),
    ):
        with pytest.raises(ValueError, match=words):
            objective_of(digits, **settings)
    with pytest.raises(ValueError, match="one of timm's VisionTransformer, this is AgentCNN"):
        objective_of(digits, "vit", model=convx.agent_of(make_vit(channels=1), weights="own", stem_width=8))
    recipe = recipe_of("joint")
    data = RunData.open(digits, recipe, torch.device("cpu"))
    with pytest.raises(ValueError, match="teacher: it is for mode: vit"):
        bootstrap.create(make_vit(channels=1), {"mode": "joint"}, recipe["training"], data, nn.Identity())


def test_an_evaluator_sees_the_training_images_that_the_run_saw(digits, monkeypatch):
    from convx.evaluate import Result, run

    seen = []
    monkeypatch.setattr(
        run, "paper_evaluator", lambda paper: lambda model, recipe, data: seen.append(data.train) or Result([])
    )
    for share in (1.0, 0.5):
        recipe = recipe_of("vit", training={"train_share": share})
        trainer = Trainer(recipe, digits)
        run.evaluate_run(trainer.exported(), recipe, digits, None, {}, torch.device("cpu"))
        assert len(seen[-1]) == len(trainer.batches.images)
        assert torch.equal(seen[-1].labels, trainer.batches.labels)


def test_evaluation_of_a_joint_run(digits, tmp_path):
    """The agent's accuracy has its branch; distances and training cost stand beside; the per-image payload is the ViT's."""
    from convx.evaluate.run import evaluate_run

    recipe = recipe_of("joint", training={"epochs": 1, "train_share": 0.5}) | {"paper": "bootstrap_vit"}
    trainer = fit(recipe, digits, tmp_path)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    save_weights(trainer.objective.companions()["agent"], checkpoints / "agent.safetensors")
    model = trainer.exported()
    found = evaluate_run(model, recipe, digits, None, {"checkpoints": str(checkpoints)}, torch.device("cpu"))
    by = {}
    for entry in found.rows:
        by.setdefault(entry["metric"], []).append(entry)
    own, agent = by["top1"]
    assert own["conditions"] == {} and agent["conditions"] == {"branch": "agent"} and agent["n"] == own["n"] == 100
    images, labels = trainer.data.split("test")
    with torch.no_grad():
        right = trainer.objective.eval().agent(trainer.data.normalise(images)).argmax(1) == labels
    assert agent["value"] == pytest.approx(100 * right.float().mean().item())
    distances = [entry["value"] for entry in by["attention_distance"]]
    assert len(distances) == 2 and all(4 < d < 32 for d in distances)
    assert by["training_macs"][0]["value"] > 3 * by["macs"][0]["value"]
    assert by["generalisation_gap"][0]["n"] == 144
    assert next(iter(found.per_image)) == "correct"
    lost = evaluate_run(model, recipe, digits, None, {"checkpoints": str(tmp_path)}, torch.device("cpu")).rows
    assert [r["value"] for r in lost if r["conditions"].get("branch") == "agent"] == [None]


def test_attention_distance_by_hand():
    """Uniform attention: the mean distance of all pairs of patches; attention to itself alone: zero."""
    from convx.papers.bootstrap_vit.evaluate import attention_distance

    attention = make_vit().blocks[0].attn
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.zero_()
        uniform = attention_distance(attention, torch.randn(2, 65, 36), 1, (8, 8))
    places = np.stack(np.meshgrid(range(8), range(8), indexing="ij"), -1).reshape(-1, 2)
    expected = np.sqrt(((places[:, None] - places[None]) ** 2).sum(-1)).mean()
    torch.testing.assert_close(uniform, torch.full((9,), float(expected)), rtol=1e-4, atol=1e-4)
    x = torch.zeros(1, 5, 36)
    x[0, 1:, :4] = 100 * torch.eye(4)
    with torch.no_grad():
        for part in (0, 36):
            attention.qkv.weight[part : part + 36] = torch.eye(36)
        alone = attention_distance(attention, x, 1, (2, 2))
    assert alone[0] < 1e-4
