"""Shared fixtures: a prepared digits set, recipes, and the mirror of real data where there is one."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from convx import config

REPOSITORY = Path(__file__).resolve().parents[1]


def mirrors() -> list[str]:
    """Return the folders that may hold official files: CONVX_MIRROR, and a shared/data folder beside the checkout."""
    folders = os.environ.get("CONVX_MIRROR", "").split()
    beside = REPOSITORY.parent / "shared" / "data"
    return [*folders, *([str(beside)] if beside.is_dir() else [])]


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Return the folder of 320 prepared digits at 32x32 (a tenth set aside for validation) and 100 test images."""
    from convx.data import prepare

    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare(data_settings(), folder, mirrors=[], progress=False)
    return folder


def data_settings(**changes) -> dict:
    """Return data settings with every default filled in."""
    root = config.schema("study")
    given = {
        "name": "digits",
        "image_size": 32,
        "validation": 0.1,
        "train_images": 320,
        "test_images": 100,
    } | changes
    return config.fill(given, root["properties"]["data"], root)


def make_recipe(variant="cnn", seed=0, model="resnet8_8", surgery=(), start=None, objective=None, **training) -> dict:
    """Return a frozen recipe on digits; small and short unless told otherwise."""
    defaults = {"epochs": 2, "batch_size": 64, "lr": 0.05, "weight_decay": 5e-4, "threads": 1}
    data = data_settings()
    recipe = {
        "schema_version": config.SCHEMA_VERSION,
        "study": "test",
        "variant": variant,
        "seed": seed,
        "data": data,
        "data_key": config.data_key(data),
        "model": {"name": model, "settings": {}},
        "surgery": list(surgery),
        "objective": objective or {"name": "supervised"},
        "training": config.recipe_defaults() | defaults | training,
        "device": "cpu",
        "start": start,
    }
    return recipe | {"digest": config.recipe_digest(recipe)}
