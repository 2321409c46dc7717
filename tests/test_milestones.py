"""Steps at given epochs: He et al.'s schedule, to the update."""

import pytest
import torch
from house import REPOSITORY
from made_up import STUDY

from convx import config
from convx.checks import LATER
from convx.config import ConfigError
from convx.training import make_scheduler

HE = REPOSITORY / "config" / "cifar10_he.yaml"


def rates(training: dict, steps: int) -> dict[float, int]:
    """Return {learning rate: first update that has it} of a whole training."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr_scale": 1.0}], lr=training["lr"])
    scheduler, seen = make_scheduler(optimizer, training, steps), {}
    for update in range(training["epochs"] * steps + 1):
        scheduler.step_update(update)
        seen.setdefault(round(optimizer.param_groups[0]["lr"], 9), update)
    return seen


def test_the_recipe_of_he_et_al_steps_after_32000_and_48000_updates():
    training = config.training_settings(config.load_study(HE), "cnn")
    steps = -(-50_000 // training["batch_size"])
    assert rates(training, steps) == {0.1: 0, 0.01: 32_000, 0.001: 48_000}
    assert (training["optimizer"], training["weight_decay"], training["label_smoothing"]) == ("momentum", 1e-4, 0)
    assert training["epochs"] * steps == pytest.approx(64_000, abs=steps)


def test_equal_steps_are_what_they_were_and_a_short_study_steps_sooner():
    base = config.training_settings(config.load_study(HE), "cnn")
    equal = base | {"decay_milestones": [], "decay_epochs": 2, "epochs": 5}
    assert list(rates(equal, 10).values()) == [0, 20, 40]
    short = config.training_settings(config.load_study(config.read_yaml(HE) | {"scale": 0.25}), "cnn")
    assert short["epochs"] == 41 and list(rates(short, 391).values()) == [0, 8_000, 12_000]


def test_a_recipe_keeps_its_digest_when_keys_are_added():
    """A run that was made before a key existed is one of the same recipe, as long as the key is at its default."""
    recipe = config.resolve(config.load_study(STUDY), "cnn", 0)
    older = recipe | {"training": {k: v for k, v in recipe["training"].items() if k not in LATER}}
    assert config.recipe_digest(older) == recipe["digest"]
    stepped = recipe | {"training": recipe["training"] | {"decay_milestones": [1]}}
    assert config.recipe_digest(stepped) != recipe["digest"]
    # A key that changes these must go into checks.LATER: results/ holds runs that are known by them.
    known = {("fashion_mnist", "cnn"): "9c1a2e0714880322"}
    for (name, variant), digest in known.items():
        assert config.resolve(config.load_study(REPOSITORY / "config" / f"{name}.yaml"), variant, 0)["digest"] == digest


@pytest.mark.parametrize("schedule", [{"schedule": "poly"}, {}])
def test_milestones_are_for_steps(schedule):
    wrong = {"decay_milestones": [1], **schedule}
    words = rf"decay_milestones: they are for schedule: step, this one's is {schedule.get('schedule', 'cosine')}"
    with pytest.raises(ConfigError, match=rf"recipes\.train\.{words}"):
        config.load_study(STUDY | {"recipes": {"train": wrong, "finetune": {}}})
    with pytest.raises(ConfigError, match=rf"variants\.cnn\.training\.{words}"):
        config.load_study(STUDY | {"variants": {"cnn": {"training": wrong}}})
