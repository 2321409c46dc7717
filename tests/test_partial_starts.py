"""Partial starts: an epoch or a share of the start's epochs, budgets of epochs and of time, checkpoints kept by themselves."""

import pandas as pd
import pytest
from house import House

from convx.config import ConfigError, load_study, recipe_digest, resolve, training_settings, variant_settings
from convx.evidence import study_facts
from convx.explain import explain


def study(epochs: int = 10, **variants) -> dict:
    return load_study(
        {
            "study": "partial",
            "data": {"name": "digits"},
            "host": {"name": "resnet8_8"},
            "recipes": {"train": {"epochs": epochs}, "finetune": {"epochs": 4}},
            "baseline": "cnn",
            "variants": {"cnn": None, **variants},
        }
    )


def planned(found: dict, name: str) -> tuple:
    """Return (epoch of the start, epochs) of a variant, from its frozen recipe."""
    recipe = resolve(found, name, 0)
    return recipe["start"]["at_epoch"], recipe["training"]["epochs"]


@pytest.mark.parametrize(
    "epochs, expected",
    [(200, (50, 150)), (10, (3, 7)), (9, (2, 7)), (2, (1, 1))],  # 2.5 is rounded up, 2.25 down
)
def test_a_share_is_of_the_starts_epochs_and_the_rest_is_trained(epochs, expected):
    assert planned(study(epochs, tcnn_partial_25=None), "tcnn_partial_25") == expected


def test_both_parts_take_as_many_epochs_as_the_start():
    for percent in (25, 50, 75):
        for epochs in (4, 7, 75, 200):
            name = f"tcnn_partial_{percent}"
            first, rest = planned(study(epochs, **{name: None}), name)
            assert first + rest == epochs and 0 < first < epochs


def test_a_whole_epoch_keeps_the_recipes_epochs():
    assert planned(study(tcnn={"at_epoch": 6}), "tcnn") == (6, 4)
    assert planned(study(tcnn={"at_epoch": 0}), "tcnn") == (0, 4)
    assert planned(study(tcnn={"at_epoch": 10}), "tcnn") == (10, 4)
    assert planned(study(tcnn=None), "tcnn") == (None, 4)


@pytest.mark.parametrize("cost, rest", [(1.0, 5), (2.0, 8), (1.25, 6), (0.5, 1)])
def test_a_budget_of_time_gives_the_hours_of_the_hybrid_from_scratch(cost, rest):
    """E epochs of the hybrid cost E c; e of the CNN cost e: c (E - e / c) + e = E c, up to half an epoch and at least one."""
    found = study(tcnn_partial_50_time={"epoch_cost": cost})
    assert planned(found, "tcnn_partial_50_time") == (5, rest)
    if cost >= 1:
        assert abs(rest * cost + 5 - 10 * cost) <= 0.5 * cost


def test_the_start_keeps_what_others_start_from_and_its_digest_does_not_move():
    alone = study()
    found = study(tcnn_partial_25=None, tcnn_partial_50=None, mine={"base": "tcnn", "at_epoch": 7}, tcnn=None)
    found["recipes"]["train"]["checkpoints"] = [1, 5]
    assert training_settings(alone, "cnn")["checkpoints"] == []
    assert training_settings(found, "cnn")["checkpoints"] == [1, 3, 5, 7]
    found["recipes"]["train"]["checkpoints"] = []
    assert training_settings(found, "tcnn")["checkpoints"] == []
    assert resolve(found, "cnn", 0)["digest"] == resolve(alone, "cnn", 0)["digest"]
    one, other = (resolve(found, name, 0) for name in ("tcnn_partial_25", "tcnn_partial_50"))
    assert one["digest"] != other["digest"] and recipe_digest(one) == one["digest"]
    assert one["start"]["recipe"]["training"]["checkpoints"] == [3, 5, 7]


def test_partial_starts_of_partial_starts():
    second = {"base": "tcnn", "start_from": "tcnn_partial_50", "at_epoch": 0.4, "budget": "epochs"}
    found = study(20, tcnn_partial_50=None, second=second)
    assert planned(found, "second") == (4, 6)
    assert training_settings(found, "tcnn_partial_50")["checkpoints"] == [4]
    assert training_settings(found, "cnn")["checkpoints"] == [10]


def test_settings_and_facts_are_whole_epochs():
    found = study(tcnn_partial_25=None)
    assert variant_settings(found, "tcnn_partial_25")["at_epoch"] == 3
    facts = study_facts(found)["variants"]["tcnn_partial_25"]
    assert facts["start_share"] == 0.3 and facts["epochs"] == 7


@pytest.mark.parametrize(
    "epochs, variants, message",
    [
        (
            10,
            {"tcnn": {"at_epoch": 11}},
            "at_epoch: 11 is epoch 11 of 'cnn', which trains for 10; it must be at most 10",
        ),
        (10, {"tcnn": {"at_epoch": 1.5}}, "at_epoch: 1.5 is neither a whole epoch nor a share below 1"),
        (10, {"tcnn": {"at_epoch": -1}}, "at_epoch: -1 is out of range"),
        (10, {"tcnn": {"at_epoch": "half"}}, "at_epoch: 'half' should be of type number or null"),
        (
            1,
            {"tcnn_partial_25": None},
            "at_epoch: 0.25 is epoch 0 of 'cnn', which trains for 1; it must be below 1 and above 0",
        ),
        (10, {"tcnn": {"at_epoch": 10, "budget": "epochs"}}, "it must be below 10"),
        (10, {"tcnn": {"budget": "epochs"}}, "budget: 'epochs' needs at_epoch"),
        (10, {"tcnn_partial_25": {"training": {"epochs": 3}}}, "training.epochs: its budget (epochs) gives them"),
        (10, {"tcnn_partial_25_time": None}, "epoch_cost is missing: the time of one of its epochs"),
        (10, {"tcnn_partial_25": {"epoch_cost": 2}}, "epoch_cost: it is for budget: time, this one's is epochs"),
        (10, {"tcnn_partial_25_time": {"epoch_cost": 0}}, "epoch_cost: 0 is out of range"),
        (10, {"tcnn_partial_25": {"budget": "epoch"}}, "budget: 'epoch' is not valid; did you mean 'epochs'?"),
        (10, {"tcnn_partial_0": {"at_epoch": 3}}, "at_epoch: it needs start_from"),
        (10, {"tcnn_partial_25": None, "cnn": {"start_from": "tcnn_partial_25"}}, "start_from is a cycle"),
    ],
)
def test_mistakes_are_one_line(epochs, variants, message):
    with pytest.raises(ConfigError) as error:
        study(epochs, **variants)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_explain_says_where_the_epochs_come_from(tmp_path):
    house = House.build(tmp_path / "house")
    house.study["variants"] = {"cnn": None, "tcnn_partial_50_time": {"epoch_cost": 2.0}}
    house.write()
    text = explain(house.root / "config" / "tiny.yaml", "tcnn_partial_50_time")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines()[4:]}
    assert lines["at_epoch"].startswith("1 own choice: which epochs the paper takes")
    assert lines["budget"].startswith("time own choice: the time of the hybrid")
    assert (
        lines["epoch_cost"]
        == "2.0 own choice [" + str(house.root / "config" / "tiny.yaml") + ": variants.tcnn_partial_50_time]"
    )
    assert lines["training.epochs"] == "2 own choice: what budget (time) leaves"


@pytest.mark.slow
def test_a_share_is_trained_end_to_end(tmp_path):
    """No checkpoint is named anywhere: the CNN keeps its first epoch, the T-CNN starts from it and trains for the second."""
    house = House.build(tmp_path / "house")
    house.study["variants"] = {"cnn": None, "tcnn_partial_50": None}
    house.study["evaluate"] = {}
    result = house.snakemake()
    assert result.returncode == 0, result.stdout
    cnn, partial = (
        pd.read_csv(house.results("histories", name, "seed0.csv")).set_index("epoch")
        for name in ("cnn", "tcnn_partial_50")
    )
    assert list(cnn.index) == [0, 1, 2] and list(partial.index) == [0, 1]
    # The locality of the variant leaves 1e-6 a layer.
    assert partial.loc[0, "validation_loss"] == pytest.approx(cnn.loc[1, "validation_loss"], rel=1e-4)
    assert any("content_share_mean" in c for c in partial.columns)
