"""The training loop: against a plain loop, across interruptions, with hooks, and when it fails."""

import copy
import math
import signal

import pytest
import torch
from conftest import make_recipe
from torch import nn

from convx import training
from convx.data.batches import Augment, Batches, Normalise, random_crop, random_flip
from convx.manifest import Failure
from convx.runs import build_model, load_weights, save_failed, save_weights
from convx.seeds import generator
from convx.training import Progress, Trainer, parameter_groups, write_history


def fit(recipe, digits, root, **changes):
    """Train a recipe to its end and return the trainer."""
    with Progress(root, recipe, "source", "data", None) as progress:
        trainer = Trainer(recipe, digits, **changes)
        trainer.fit(progress)
        progress.done()
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.exported().state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def plain_losses(recipe, digits, steps, dtype):
    """Twenty lines that anyone would write: torch's SGD, a cosine by hand, the same batches."""
    settings = recipe["training"]
    trainer = Trainer(recipe, digits)  # for its data and initial weights only
    model = copy.deepcopy(trainer.objective.exported()).to(dtype)
    normalise = Normalise(
        trainer.data.meta["mean"],
        trainer.data.meta["std"],
        torch.device("cpu"),
        settings["channels_last"],
        dtype,
    )
    optimizer = torch.optim.SGD(
        model.parameters(),
        settings["lr"],
        momentum=0.9,
        nesterov=True,
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    total, losses, done = settings["epochs"] * trainer.batches.steps, [], 0
    for epoch in range(settings["epochs"]):
        for _, images, labels, rng in trainer.batches.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * settings["lr"] * (1 + math.cos(math.pi * done / total))
            x = normalise(random_flip(random_crop(images, 2, rng), rng))
            loss = nn.functional.cross_entropy(model(x), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            done += 1
            if done == steps:
                return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_engine_equals_a_plain_loop(digits, dtype, tolerance):
    recipe = make_recipe(epochs=4, label_smoothing=0.1, crop_padding=2, flip=True, channels_last=True)
    trainer = Trainer(recipe, digits)
    trainer.objective.to(dtype)
    meta = trainer.data.meta
    trainer.objective.normalise = Normalise(meta["mean"], meta["std"], trainer.device, True, dtype)
    losses = []
    for epoch in range(4):
        trainer.epoch = epoch
        for step, images, labels, rng in trainer.batches.epoch(epoch):
            trainer.sums = {}
            trainer.step = step
            trainer.train_step(images, labels, rng)
            trainer.scheduler.step_update(epoch * trainer.batches.steps + step + 1)
            losses.append(trainer.sums["loss"].item() / len(labels))
    assert len(losses) >= 20
    expected = plain_losses(recipe, digits, 20, dtype)
    assert max(abs(a - b) / abs(b) for a, b in zip(losses, expected)) < tolerance


def test_same_seed_same_bits_other_seed_others(digits, tmp_path):
    first, again = (weights(fit(make_recipe(epochs=1), digits, tmp_path)) for _ in range(2))
    assert_same_bits(first, again)
    other = weights(fit(make_recipe(epochs=1, seed=1), digits, tmp_path))
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_an_interrupted_run_ends_with_the_bits_of_an_undisturbed_one(digits, tmp_path, monkeypatch, stop_at, ema):
    recipe = make_recipe(optimizer="adamw", lr=1e-3, mixup=0.2, ema=ema, checkpoints=[1])
    whole = weights(fit(recipe, digits, tmp_path / "whole"))
    step, done = Trainer.train_step, []

    def stop(self, *batch):
        step(self, *batch)
        done.append(1)
        if len(done) == stop_at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(SystemExit) as error:
        fit(recipe, digits, tmp_path / "cut")
    assert error.value.code == 143
    assert len(done) == stop_at
    trainer = fit(recipe, digits, tmp_path / "cut")
    assert_same_bits(whole, weights(trainer))
    assert len(done) == 2 * trainer.batches.steps  # no step was done twice
    assert [row["epoch"] for row in trainer.history] == [0, 1, 2]


def test_a_state_is_written_while_training(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    saved = []
    monkeypatch.setattr(Progress, "save", lambda self, state: saved.append((state["epoch"], state["step"])))
    fit(make_recipe(epochs=1), digits, tmp_path)
    assert saved[0] == (0, 1)
    assert len(saved) == len(set(saved)) >= 5


def test_progress_of_another_recipe_source_data_or_start_is_not_taken(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    recipe, other = make_recipe(), make_recipe(lr=0.02)
    keys = {
        Progress(tmp_path, *arguments).key
        for arguments in [
            (recipe, "s", "d", None),
            (other, "s", "d", None),
            (recipe, "s2", "d", None),
            (recipe, "s", "d2", None),
            (recipe, "s", "d", tmp_path / "a"),
            (recipe, "s", "d", tmp_path / "b"),
        ]
    }
    assert len(keys) == 6
    assert (
        Progress(tmp_path, make_recipe(checkpoints=[1]), "s", "d", None).key
        == Progress(tmp_path, recipe, "s", "d", None).key
    )


def test_a_loss_that_is_not_finite_fails_with_the_epoch(digits, tmp_path):
    with pytest.raises(Failure, match="not finite in epoch 1"):
        fit(make_recipe(lr=1e30, optimizer="momentum"), digits, tmp_path)


def test_history_and_learning_rate(digits, tmp_path):
    trainer = fit(make_recipe(epochs=4, warmup_epochs=1, lr=0.1, min_lr=0.01), digits, tmp_path)
    rows = trainer.history
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    assert "train_loss" not in rows[0]
    assert rows[0]["lr"] == pytest.approx(1e-6)
    assert rows[-1]["lr"] == pytest.approx(0.01)
    assert all(0 <= row["validation_top1"] <= 100 for row in rows)
    assert rows[-1]["validation_top1"] > rows[0]["validation_top1"]
    write_history(tmp_path / "h.csv", rows)
    lines = (tmp_path / "h.csv").read_text().splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("epoch,lr,validation_top1")


class Hooked(nn.Module):
    """A layer with every hook, sharing a parameter with another one."""

    def __init__(self, shared):
        super().__init__()
        self.gate, self.shared = nn.Parameter(torch.ones(3)), shared
        self.stepped, self.seen = 0, []

    def param_groups(self):
        return [{"params": [self.gate, self.shared], "lr_factor": 5.0, "weight_decay": 0.0}]

    def after_step(self):
        self.stepped += 1
        self.gate.clamp_(max=1.0)

    def auxiliary_loss(self, progress):
        self.seen.append(progress)
        return -self.gate.sum() if progress >= 0 else None

    def diagnostics(self):
        return {"gate": self.gate.mean().item()}

    def forward(self, x):
        return x * self.gate.mean()


def test_hooks_are_found_by_the_loop(digits, tmp_path, monkeypatch):
    shared = nn.Parameter(torch.ones(2))
    layers = [Hooked(shared), Hooked(shared)]
    build = training.build_model

    def hooked(*arguments):
        model = build(*arguments)
        return nn.Sequential(layers[0], model, layers[1])

    monkeypatch.setattr(training, "build_model", hooked)
    trainer = fit(make_recipe(epochs=1, weight_decay=0.1), digits, tmp_path)
    steps = trainer.batches.steps
    assert [layer.stepped for layer in layers] == [steps, steps]
    assert layers[0].seen == pytest.approx([i / steps for i in range(steps)])
    assert float(layers[0].gate.detach().max()) <= 1.0
    assert "0.gate" in trainer.history[-1]
    groups = trainer.optimizer.param_groups
    special = next(g for g in groups if g["lr_scale"] == 5.0)
    assert special["weight_decay"] == 0.0
    assert sum(p is shared for g in groups for p in g["params"]) == 1


def test_parameter_groups_cover_every_learnable_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    model[2].weight.requires_grad_(False)
    everything = make_recipe(weight_decay=0.1)["training"]
    assert {g["weight_decay"] for g in parameter_groups(model, everything)} == {0.1}
    groups = parameter_groups(model, everything | {"decay_norm_and_bias": False})
    found = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert found == {
        id(model[0].weight): 0.1,
        id(model[0].bias): 0.0,
        id(model[1].weight): 0.0,
        id(model[1].bias): 0.0,
        id(model[2].bias): 0.0,
    }


def test_nothing_to_train_is_a_failure(digits, monkeypatch):
    build = training.build_model
    monkeypatch.setattr(training, "build_model", lambda *a: build(*a).requires_grad_(False))
    with pytest.raises(Failure, match="nothing to train"):
        Trainer(make_recipe(), digits)


def test_a_run_starts_from_the_weights_of_another(digits, tmp_path):
    first = make_recipe(epochs=1, checkpoints=[1])
    trainer = fit(first, digits, tmp_path / "p")
    save_weights(trainer.exported(), tmp_path / "model.safetensors")
    second = make_recipe("cnn_finetuned", start={"variant": "cnn", "at_epoch": None, "recipe": first}, epochs=0)
    started = fit(second, digits, tmp_path / "p", start_weights=tmp_path / "model.safetensors")
    assert_same_bits(weights(trainer), weights(started))
    assert started.history[0]["validation_top1"] == trainer.history[-1]["validation_top1"]
    again = load_weights(build_model(second, started.data.meta), tmp_path / "model.safetensors")
    assert_same_bits(weights(trainer), again.state_dict())


def test_a_failed_start_carries_its_reason(digits, tmp_path):
    save_failed(tmp_path / "model.safetensors", "the training loss is not finite in epoch 3")
    with pytest.raises(Failure, match="not finite in epoch 3"):
        load_weights(
            build_model(make_recipe(), {"num_classes": 10, "channels": 1, "image_size": 32}),
            tmp_path / "model.safetensors",
        )


def test_a_missing_gpu_is_a_failure(digits):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Failure, match="device: cpu or auto"):
        Trainer(make_recipe() | {"device": "cuda"}, digits)


def test_batches_hold_each_image_once_an_epoch_in_a_new_order():
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 2, 2)
    batches = Batches(images, torch.arange(50), 16, False, seed=3)
    orders = [[int(i) for _, _, labels, _ in batches.epoch(e) for i in labels] for e in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1]
    rest = [int(i) for _, _, labels, _ in batches.epoch(0, first=2) for i in labels]
    assert rest == orders[0][32:]
    assert Batches(images, torch.arange(50), 16, True, seed=3).steps == 3
    with pytest.raises(ValueError, match="leaves no batch"):
        Batches(images, torch.arange(50), 64, True, seed=3)


def test_crop_and_flip_against_loops():
    images = torch.randint(0, 256, (40, 3, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rng = generator(0, "augment", "0.0")
    offsets = torch.randint(0, 5, (2, 40), generator=generator(0, "augment", "0.0"))
    cropped = random_crop(images, 2, rng)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    for i in range(40):
        y, x = offsets[:, i]
        assert torch.equal(cropped[i], padded[i, :, y : y + 7, x : x + 5])
    flips = torch.rand(40, generator=generator(1, "augment", "0.0")) < 0.5
    flipped = random_flip(images, generator(1, "augment", "0.0"))
    for i in range(40):
        assert torch.equal(flipped[i], images[i].flip(2) if flips[i] else images[i])
    assert 0 < flips.sum() < 40


def test_mixup_makes_distributions_and_randaugment_keeps_bytes():
    settings = make_recipe(mixup=0.3, cutmix=1.0, randaugment=9)["training"]
    augment = Augment(settings, 10)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    rng = generator(0, "augment", "0.0")
    out = augment(images, rng)
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    _, target = augment.mix(out.float(), torch.arange(8), rng)
    assert target.shape == (8, 10)
    assert torch.allclose(target.sum(1), torch.ones(8))


def test_normalise_is_the_published_formula():
    images = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
    mean, std = (0.49, 0.48, 0.44), (0.24, 0.25, 0.26)
    out = Normalise(mean, std, torch.device("cpu"), channels_last=True)(images)
    expected = (images.double() / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert (out - expected).abs().max() < 1e-6
    assert out.is_contiguous(memory_format=torch.channels_last)
