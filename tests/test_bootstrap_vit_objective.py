"""The objective ``bootstrap``: its losses by their formulas, whose gradient goes where, and how everything starts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_recipe
from test_bootstrap_vit import make_vit
from test_training import assert_same_bits

from convx.layers.agent_cnn import AgentCNN
from convx.models import create_model
from convx.objectives import bootstrap
from convx.objectives.bootstrap import align, distillation, feature_distances, initialise, matched
from convx.runs import RunData, build_model
from convx.training import Trainer

HOST = "vit36_2_h9_p8"
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


def test_both_branches_see_the_enlarged_images(digits):
    torch.manual_seed(0)
    large = create_model("vit36_2_h9_p8", 10, 1, 32, input_size=64, dropout=0.0)
    objective = objective_of(digits, "joint", model=large)
    images, labels, rng = batch()
    loss, sums = objective(images, labels, rng, 0.0)
    x = F.interpolate(objective.normalise(images), (64, 64), mode="bilinear", align_corners=False)
    assert torch.isfinite(loss) and sums["correct"] == (objective.vit(x).argmax(1) == labels).sum()
    assert sums["agent_top1"] == 100 * (objective.agent.forward_intermediates(x)[0].argmax(1) == labels).sum()


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
