"""The objective ``bootstrap``: its losses by their formulas, whose gradient goes where, and runs through the engine."""

import copy
import math
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_recipe
from test_bootstrap_vit import make_vit
from test_training import assert_same_bits, fit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import convx
from convx import config
from convx.data.splits import training_rows
from convx.layers.agent_cnn import AgentCNN
from convx.objectives import bootstrap
from convx.objectives.bootstrap import align, distillation, feature_distances, initialise, matched
from convx.runs import RunData, build_model, build_teacher, load_weights, save_weights
from convx.training import Progress, Trainer

HOST = "vit36_2_h9_p4"
SMALL = {"agent_stem_width": 8}
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "batch_size": 32}


def recipe_of(mode="joint", variant="vit_joint", surgery=(), training=(), **settings):
    objective = {"name": "bootstrap", "mode": mode} | (SMALL if mode in ("joint", "shared") else {}) | settings
    return make_recipe(variant, model=HOST, surgery=surgery, objective=objective, **ADAMW | dict(training))


def objective_of(digits, mode="joint", model=None, training=(), dtype=torch.float64, **settings):
    """Return the objective around a model without dropout, in float64 and evaluation mode: gradients can be compared."""
    recipe = recipe_of(mode, training=training, **settings)
    data = RunData.open(digits, recipe, torch.device("cpu"))
    chosen = {k: v for k, v in recipe["objective"].items() if k != "name"}
    torch.manual_seed(0)
    model = model or make_vit(channels=1, dropout=0.0)
    objective = bootstrap.create(model, chosen, recipe["training"], data).to(dtype).eval()
    objective.normalise = lambda images: images.to(dtype) / 128 - 1
    return objective


def batch(count=8):
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 1, 32, 32), dtype=torch.uint8, generator=rng)
    return images, torch.randint(0, 10, (count,), generator=rng), rng


def gradients(loss, objective) -> dict[str, torch.Tensor]:
    names, parameters = zip(*objective.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


# -------------------------------------------------------------------------------------------------------------------- losses


def test_features_are_compared_by_cosine_after_layer_norm():
    """LN without affine, then the mean squared difference: the mean over tokens of 2 - 2 cos of mean-centred vectors."""
    torch.manual_seed(0)
    vit, agent = torch.randn(3, 16, 40), torch.randn(3, 40, 4, 4) * 5 + 2
    (found,) = feature_distances([vit], [agent], "seq1d", (4, 4))
    tokens = agent.flatten(2).transpose(1, 2)
    cosine = F.cosine_similarity(vit - vit.mean(2, keepdim=True), tokens - tokens.mean(2, keepdim=True), dim=2)
    torch.testing.assert_close(found, (2 - 2 * cosine).mean(), rtol=1e-5, atol=1e-5)
    two = feature_distances([vit, vit], [agent, agent], "seq1d", (4, 4))
    torch.testing.assert_close(sum(two), 2 * found)  # summed over layers, not averaged


def test_the_longer_sequence_is_pooled():
    torch.manual_seed(0)
    vit, large, small = torch.randn(2, 64, 6), torch.randn(2, 6, 16, 16), torch.randn(2, 6, 4, 4)
    same, pooled = matched(vit, large, "seq1d", (8, 8))
    assert same is vit
    torch.testing.assert_close(pooled, large.flatten(2).transpose(1, 2).reshape(2, 64, 4, 6).mean(2))
    torch.testing.assert_close(pooled[0, 1], large[0, :, 0, 4:8].mean(1))  # four neighbours of one row
    pooled, same = matched(vit, small, "seq1d", (8, 8))
    torch.testing.assert_close(pooled, vit.reshape(2, 16, 4, 6).mean(2))
    assert torch.equal(same, small.flatten(2).transpose(1, 2))
    _, two = matched(vit, large, "avg2d", (8, 8))
    torch.testing.assert_close(two, F.avg_pool2d(large, 2).flatten(2).transpose(1, 2))
    two, _ = matched(vit, small, "avg2d", (8, 8))
    torch.testing.assert_close(two, F.avg_pool2d(vit.transpose(1, 2).view(2, 6, 8, 8), 2).flatten(2).transpose(1, 2))
    for how in ("seq1d", "avg2d"):
        equal = matched(vit, torch.randn(2, 6, 8, 8), how, (8, 8))
        assert equal[0] is vit and equal[1].shape == (2, 64, 6)
    with pytest.raises(ValueError, match="64 and 49 tokens"):
        matched(vit, torch.randn(2, 6, 7, 7), "seq1d", (8, 8))
    with pytest.raises(ValueError, match="8x8 and 2x16 do not fit"):
        matched(torch.randn(2, 32, 6), torch.randn(2, 6, 8, 8), "avg2d", (2, 16))


def test_distillation_is_hintons_and_its_teacher_is_a_constant():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    loss = distillation(student, teacher, 4.0)
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    torch.testing.assert_close(loss, 16 * (p * (p / q).log()).sum(1).mean())
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_the_feature_weight_falls_by_epoch_and_nothing_else_does(digits):
    epochs = 8
    objective = objective_of(digits, training={"epochs": epochs})
    steps = 9
    for epoch in range(epochs):
        for step in (0, 4, 8):  # progress as the engine computes it
            found = objective.feature_weight((epoch + step / steps) / epochs)
            assert found == pytest.approx(10 * (1 - epoch / epochs), abs=1e-12), (epoch, step)
    assert objective.feature_weight(0.5) == 5 and objective.feature_weight((epochs - 1) / epochs) == 10 / epochs
    assert objective_of(digits, decay="none").feature_weight(0.9) == 10
    images, labels, rng = batch()
    early, late = (objective(images, labels, rng, p)[0] for p in (0.0, 0.5))
    feature = objective(images, labels, rng, 0.0)[1]["feature"] / len(labels)
    torch.testing.assert_close(early - late, 5 * feature)  # cross-entropy and distillation are constant


@pytest.mark.parametrize("mode", ["joint", "shared"])
def test_the_loss_is_the_papers(digits, mode):
    objective = objective_of(digits, mode, decay="none")
    images, labels, rng = batch()
    loss, sums = objective(images, labels, rng, 0.5)
    x = objective.normalise(images)
    logits = objective.vit(x)
    agent_logits, maps = objective.agent.forward_intermediates(x)
    last, tokens = objective.vit.forward_intermediates(x, output_fmt="NLC")
    feature = sum(feature_distances(tokens, maps, "seq1d", (8, 8)))
    expected = F.cross_entropy(logits, labels) + F.cross_entropy(agent_logits, labels) + 10 * feature
    expected = expected + distillation(logits, agent_logits, 4.0) + distillation(agent_logits, logits, 4.0)
    torch.testing.assert_close(loss, expected * (0.5 if mode == "shared" else 1))
    assert sums["correct"] == (logits.argmax(1) == labels).sum() and len(tokens) == len(maps) == 2
    assert tokens[0].shape == (8, 64, 36) and maps[0].shape == (8, 36, 16, 16)  # class token dropped; before pooling
    torch.testing.assert_close(objective.vit.forward_head(last), logits)


# ----------------------------------------------------------------------------------------------------------------- gradients


def test_each_gradient_goes_where_it_belongs(digits):
    """Shared tensors get the sum of both branches; the agent gives none to q, k, positions, class token and layer norms;
    features give none to the agent; a teacher gets none."""
    torch.manual_seed(0)
    objective = objective_of(digits, "shared", kd_weight=0.0, feature_weight=0.0)
    images, labels, _ = batch()
    x = objective.normalise(images)
    vit_loss, agent_loss = F.cross_entropy(objective.vit(x), labels), F.cross_entropy(objective.agent(x), labels)
    ours, theirs, both = (gradients(loss, objective) for loss in (vit_loss, agent_loss, vit_loss + agent_loss))
    for name in both:
        torch.testing.assert_close(both[name], ours[name] + theirs[name], rtol=1e-9, atol=1e-12)
    private = [n for n in both if n.startswith("agent.")]
    assert private and all(
        ours[n].abs().sum() == 0 and theirs[n].abs().sum() > 0 for n in private if "stem.0" in n or "head" in n
    )
    for block in range(2):
        qkv = theirs[f"vit.blocks.{block}.attn.qkv.weight"]
        assert qkv[:72].abs().max() == 0 and qkv[72:].abs().sum() > 0
        assert theirs[f"vit.blocks.{block}.attn.qkv.bias"].abs().max() == 0
        for part in ("attn.proj.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc2.bias"):
            name = f"vit.blocks.{block}.{part}"
            assert theirs[name].abs().sum() > 0 and ours[name].abs().sum() > 0
    untouched = [
        n
        for n in both
        if n.startswith("vit.") and ("norm" in n or "pos" in n or "cls" in n or "head" in n or "patch" in n)
    ]
    assert len(untouched) >= 10 and all(theirs[n].abs().max() == 0 for n in untouched)

    _, tokens = objective.vit.forward_intermediates(x, output_fmt="NLC")
    logits, maps = objective.agent.forward_intermediates(x)
    hint = gradients(sum(feature_distances(tokens, maps, "seq1d", (8, 8))), objective)
    assert all(hint[n].abs().max() == 0 for n in private) and hint["vit.blocks.0.mlp.fc1.weight"].abs().sum() > 0
    taught = gradients(distillation(objective.vit(x), logits, 4.0), objective)
    assert all(taught[n].abs().max() == 0 for n in private)


def test_one_step_moves_a_shared_tensor_once_with_the_summed_gradient(digits, monkeypatch):
    """AdamW by hand on g_V + g_A, weight decay once; the engine's optimiser holds every tensor in one group."""
    trainer = Trainer(recipe_of("shared", training={"epochs": 4, "precision": "fp32"}), digits)
    objective = trainer.objective
    owned = [p for g in trainer.optimizer.param_groups for p in g["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(objective.parameters()))
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    found = {}
    backward = objective.backward

    def keep(loss):
        backward(loss)
        found.update({n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None})

    monkeypatch.setattr(objective, "backward", keep)
    _, images, labels, rng = next(iter(trainer.batches.epoch(0)))
    trainer.train_step(images, labels, rng)
    for name, parameter in objective.named_parameters():
        g = found[name]
        expected = before[name] * (1 - 1e-3 * 0.05) - 1e-3 * g / (g.abs() + 1e-8)  # the first step of AdamW
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=2e-6, msg=name)


def test_projection_takes_away_the_conflict_alone():
    torch.manual_seed(0)
    vits = [torch.randn(4, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    agents = [-v + 0.3 * torch.randn_like(v) for v in vits]
    dot = lambda a, b: sum((x * y).sum() for x, y in zip(a, b))  # noqa: E731
    assert dot(agents, vits) < 0
    projected = align(agents, vits, "pcgrad_global")
    assert abs(dot(projected, vits)) < 1e-6 * dot(vits, vits)
    torch.testing.assert_close(projected[0], agents[0] - dot(agents, vits) / dot(vits, vits) * vits[0])
    friendly = [v + 0.3 * torch.randn_like(v) for v in vits]
    assert all(torch.equal(a, b) for a, b in zip(align(friendly, vits, "pcgrad_global"), friendly))
    mixed = [agents[0], friendly[1]]
    first, second = align(mixed, vits, "pcgrad_tensor")
    assert abs((first * vits[0]).sum()) < 1e-9 and torch.equal(second, friendly[1])
    assert all(torch.equal(a, z) for a, z in zip(align(agents, [0 * v for v in vits], "pcgrad_global"), agents))


def test_an_aligned_backward_pass_writes_algorithm_1(digits):
    """With the agent's loss turned over the branches conflict if they agreed before, and the other way round."""
    assert {check_algorithm_1(digits, flip) for flip in (1.0, -1.0)} == {True, False}


def check_algorithm_1(digits, flip) -> bool:
    """Shared: (g_V + Align(g_A | g_V)) / 2, of the qkv layer the value rows; private: the branch's own gradient, whole."""
    objective = objective_of(digits, "shared", align="pcgrad_global", kd_weight=0.0, feature_weight=0.0)
    images, labels, rng = batch()
    loss, _ = objective(images, labels, rng, 0.0)
    vit_loss, agent_loss, returned = objective._pair
    assert returned is loss
    agent_loss = flip * agent_loss
    objective._pair = vit_loss, agent_loss, returned
    ours, theirs = gradients(vit_loss, objective), gradients(agent_loss, objective)
    parts = objective.shared_parts()
    names = {id(p): n for n, p in objective.named_parameters()}
    flat_v, flat_a = (torch.cat([g[names[id(p)]][rows].flatten() for p, rows in parts]) for g in (ours, theirs))
    product = flat_v @ flat_a
    conflict = bool(product < 0)
    aligned = flat_a - product / (flat_v @ flat_v) * flat_v if conflict else flat_a
    objective.backward(loss)
    found = torch.cat([p.grad[rows].flatten() for p, rows in parts])
    torch.testing.assert_close(found, (flat_v + aligned) / 2, rtol=1e-9, atol=1e-12)
    if conflict:
        assert abs(aligned @ flat_v) < 1e-9
    shared = {names[id(p)] for p, _ in parts}
    for name, parameter in objective.named_parameters():
        if name.endswith("attn.qkv.weight"):
            torch.testing.assert_close(parameter.grad[:72], ours[name][:72])
        elif name not in shared:
            expected = theirs[name] if name.startswith("agent.") else ours[name]
            torch.testing.assert_close(parameter.grad, expected)
    return conflict


def test_auxiliary_losses_reach_an_aligned_backward_pass(digits):
    objective = objective_of(digits, "shared", align="pcgrad_global")
    images, labels, rng = batch()
    found = []
    for extra in (0.0, 1.0):
        loss, _ = objective(images, labels, rng, 0.0)
        objective.backward(loss + extra * objective.vit.pos_embed.sum() if extra else loss)
        found.append(objective.vit.pos_embed.grad.clone())
    torch.testing.assert_close(found[1], found[0] + 1, rtol=1e-9, atol=1e-9)


def test_joint_branches_are_clipped_each_by_its_own_norm(digits):
    for mode in ("joint", "shared"):
        objective = objective_of(digits, mode)
        for parameter in objective.parameters():
            parameter.grad = torch.ones_like(parameter)
        objective.clip_gradients(0.5)
        norm = lambda module: math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))  # noqa: E731
        if mode == "joint":
            assert norm(objective.vit) == pytest.approx(0.5, rel=1e-4) == norm(objective.agent)
        else:
            assert norm(objective) == pytest.approx(0.5, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ initialisation


def std(tensor) -> float:
    return tensor.detach().std().item()


def test_the_official_start_and_the_usual_one():
    """timm differs from both: see the docstring of ``initialise``."""
    vit = make_vit(width=72, depth=2)
    timm_own = copy.deepcopy(vit)
    initialise(vit, "official", 0)
    assert std(vit.patch_embed.proj.weight) == pytest.approx(1, abs=0.05)
    for block in vit.blocks:
        assert std(block.mlp.fc1.bias) == pytest.approx(1, abs=0.2) and std(block.mlp.fc2.bias) == pytest.approx(
            1, abs=0.3
        )
        assert block.attn.qkv.weight.abs().max() <= math.sqrt(6 / (4 * 72)) + 1e-6
        assert std(block.attn.qkv.weight) == pytest.approx(math.sqrt(2 / (4 * 72)), rel=0.03)
        assert (
            block.attn.qkv.bias.abs().max()
            == block.attn.proj.bias.abs().max()
            == vit.patch_embed.proj.bias.abs().max()
            == 0
        )
        assert bool((block.norm1.weight == 1).all())
    assert std(vit.cls_token) == pytest.approx(0.02, rel=0.4) and std(vit.pos_embed) == pytest.approx(0.02, rel=0.05)
    again, other = copy.deepcopy(vit), copy.deepcopy(vit)
    initialise(again, "official", 0)
    initialise(other, "official", 1)
    assert_same_bits(vit.state_dict(), again.state_dict())
    assert not torch.equal(vit.blocks[0].mlp.fc1.weight, other.blocks[0].mlp.fc1.weight)
    usual = copy.deepcopy(vit)
    initialise(usual, "trunc02", 0)
    for tensor in (usual.patch_embed.proj.weight, usual.blocks[0].mlp.fc1.weight, usual.head.weight, usual.pos_embed):
        assert std(tensor) == pytest.approx(0.02 * 0.88, rel=0.06) and tensor.abs().max() <= 0.04
    assert usual.blocks[0].mlp.fc1.bias.abs().max() == 0
    assert timm_own.cls_token.abs().max() < 1e-4 and std(timm_own.patch_embed.proj.weight) < 0.12
    assert std(timm_own.blocks[0].mlp.fc1.weight) == pytest.approx(0.02, rel=0.06)

    agent = AgentCNN(vit, "own")
    initialise(agent, "official", 0)
    assert std(agent.blocks[0].ffn[0].bias) == pytest.approx(1, abs=0.2) and std(agent.stem[4].bias) == pytest.approx(
        1, abs=0.3
    )
    assert std(agent.blocks[0].conv.weight) == pytest.approx(math.sqrt(2 / (2 * 72 * 9)), rel=0.03)
    assert agent.blocks[0].conv.bias.abs().max() == 0
    base = AgentCNN(vit, "own", style="base")
    initialise(base, "official", 0)
    assert std(base.stem[0].weight) == pytest.approx(1, abs=0.05) and base.stem[0].bias.abs().max() == 0


def test_arms_of_one_seed_start_with_the_same_vit(digits):
    states = [Trainer(recipe_of(mode, mode), digits).objective.vit.state_dict() for mode in ("vit", "joint", "shared")]
    assert_same_bits(states[0], states[1])
    assert_same_bits(states[0], states[2])
    other = Trainer(recipe_of("vit") | {"seed": 1}, digits).objective.vit.state_dict()
    assert not torch.equal(other["blocks.0.mlp.fc1.weight"], states[0]["blocks.0.mlp.fc1.weight"])
    host = Trainer(recipe_of("vit", init="host"), digits)
    assert_same_bits(build_model(host.recipe, host.data.meta).state_dict(), host.objective.vit.state_dict())


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
        img_size=32, patch_size=4, in_chans=1, num_classes=10, embed_dim=36, depth=2, num_heads=9,
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
