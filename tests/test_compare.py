"""A user's own model or operator as a variant: names, errors, and the model that comes out."""

import pytest
import torch
import yaml
from conftest import make_recipe
from house import TINY

from convx import config, source
from convx.compare import derive_study
from convx.config import ConfigError
from convx.models import create_model
from convx.runs import build_model

META = {"num_classes": 10, "channels": 1, "image_size": 32}
CODE = """
from torch import nn


def net(num_classes, in_channels, image_size, width=4):
    return nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def headless(model):
    model.fc = nn.Identity()
    return model
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


def test_a_model_of_ones_own(mine):
    model = create_model(f"{mine}/mine.py:net", num_classes=7, in_channels=3, image_size=32, width=6)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    study = derive_study(mine / "study.yaml", "mine", f"{mine}/mine.py:net", None, "finetune")
    recipe = config.resolve(config.load_study(study), "mine", 0)
    assert recipe["training"]["optimizer"] == "adamw"
    assert build_model(recipe, META)(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_an_operator_of_ones_own_is_applied_to_the_host(mine):
    study = derive_study(mine / "study.yaml", "mine", None, f"{mine}/mine.py:headless", None)
    recipe = config.resolve(config.load_study(study), "mine", 0)
    assert build_model(recipe, META)(torch.zeros(2, 1, 32, 32)).shape == (2, 32)
    assert recipe["training"] == config.resolve(config.load_study(study), "cnn", 0)["training"]


def test_the_users_file_is_part_of_the_source_digest(mine):
    step = {"verb": "custom", "function": f"{mine}/mine.py:headless"}
    recipe, plain = make_recipe(surgery=[step]), make_recipe()
    before = source.source_digest("train", recipe), source.source_digest("train", plain)
    (mine / "mine.py").write_text(CODE + "\n# edited\n")
    after = source.source_digest("train", recipe), source.source_digest("train", plain)
    assert before[0] != after[0]
    assert before[1] == after[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mine", None, None, None), "give one of --model"),
        (("mine", "a.py:f", "b.py:g", None), "give one of --model"),
        (("cnn", "{}/mine.py:net", None, None), "is a variant of"),
        (("mine", "{}/mine.py:nett", None, None), "defines no nett, only net, headless"),
        (("mine", "{}/none.py:net", None, None), "there is no file"),
        (("mine", None, "{}/mine.py", None), "should be file.py:function"),
        (("mine", "{}/mine.py:net", None, "tain"), "did you mean 'train'"),
    ],
)
def test_mistakes_are_one_line(mine, arguments, message):
    name, model, surgery, recipe = (a.format(mine) if a else a for a in arguments)
    with pytest.raises(ConfigError, match=message) as error:
        derive_study(mine / "study.yaml", name, model, surgery, recipe)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_python(mine):
    (mine / "broken.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=r"not valid Python \(line 1"):
        derive_study(mine / "study.yaml", "mine", f"{mine}/broken.py:f", None, None)
