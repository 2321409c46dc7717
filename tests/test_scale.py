"""The scale of a study: shorter everywhere, marked everywhere, mixed with the full study nowhere."""

import pytest
import yaml
from house import REPOSITORY, TINY, House
from made_up import STUDY, build

from convx import config, explain
from convx.config import ConfigError
from convx.evidence import differences, study_facts
from convx.ledger import load_ledgers
from convx.merge import made_by
from convx.papers.randconv.networks import network
from convx.report import tables

LONG = STUDY | {
    "recipes": {
        "train": {"epochs": 75, "warmup_epochs": 5, "decay_epochs": 30, "checkpoints": [10, 75]},
        "finetune": {"epochs": 50},
    },
    "variants": {
        "cnn": None,
        "tcnn": {"training": {"epochs": 20}},
        "half": {"base": "tcnn", "at_epoch": 0.5},
        "at_40": {"base": "tcnn", "at_epoch": 40},
        "rest": {"base": "tcnn", "at_epoch": 40, "budget": "epochs"},
    },
}


def both(scale: float, study: dict = LONG) -> tuple[dict, dict]:
    return config.load_study(study), config.load_study(study | {"scale": scale})


def test_every_length_is_shortened_and_nothing_else():
    full, short = both(0.2)
    a, b = config.training_settings(full, "cnn"), config.training_settings(short, "cnn")
    assert (a["epochs"], a["warmup_epochs"], a["decay_epochs"]) == (75, 5, 30)
    assert (b["epochs"], b["warmup_epochs"], b["decay_epochs"]) == (15, 1, 6)
    assert a["checkpoints"] == [10, 38, 40, 75] and b["checkpoints"] == [2, 8, 15]
    lengths = {"epochs", "warmup_epochs", "decay_epochs", "checkpoints"}
    assert {k: v for k, v in a.items() if k not in lengths} == {k: v for k, v in b.items() if k not in lengths}
    assert config.training_settings(short, "tcnn")["epochs"] == 4  # a variant's own number of epochs too
    assert [config.seeds(full, v) for v in full["variants"]] == [config.seeds(short, v) for v in short["variants"]]


def test_partial_starts_keep_their_share():
    full, short = both(0.2)
    assert [config.start_epoch(full, v) for v in ("half", "at_40", "rest")] == [38, 40, 40]
    assert [config.start_epoch(short, v) for v in ("half", "at_40", "rest")] == [8, 8, 8]
    assert (
        config.training_settings(full, "rest")["epochs"] == 35
        and config.training_settings(short, "rest")["epochs"] == 7
    )


@pytest.mark.parametrize("scale", [0.001, 0.1, 0.5, 0.9999])
def test_digests_differ_even_where_rounding_leaves_the_epochs_alone(scale):
    full, short = both(scale, STUDY)
    for variant in full["variants"]:
        a, b = config.resolve(full, variant, 0), config.resolve(short, variant, 0)
        assert a["digest"] != b["digest"] and "scale" not in a and b["scale"] == scale
        assert b["training"]["epochs"] >= 1  # nothing is shortened to nothing
        assert not made_by(
            short, {"run": {"study": "made_up", "variant": variant, "seed": 0}, "recipe_digest": a["digest"]}
        )
    assert config.load_study(STUDY | {"scale": 1}) == full


def test_networks_without_training_stay_without():
    short = config.load_study(STUDY | {"scale": 0.5, "recipes": {"train": {"epochs": 0}, "finetune": {"epochs": 1}}})
    assert config.training_settings(short, "cnn")["epochs"] == 0


def test_name_and_sentence_carry_it_once():
    short = config.load_study(LONG | {"scale": 0.125, "reduced": "few images"})
    assert short["study"] == "made_up_scale12p5"
    assert short["reduced"] == "few images; every schedule times 0.125 (train 9 of 75 epochs, finetune 6 of 50 epochs)"
    assert config.load_study(short) == short  # what is frozen can be read again
    assert config.load_study(LONG | {"scale": 0.125, "reduced": ""})["reduced"].startswith("every schedule times 0.125")


@pytest.mark.parametrize(("scale", "words"), [(0, "> 0"), (1.5, "<= 1"), ("short", "type number")])
def test_a_wrong_scale_is_one_line(scale, words):
    with pytest.raises(ConfigError, match=f"scale: .*{words}"):
        config.load_study(STUDY | {"scale": scale})


def test_absolute_claims_are_not_comparable():
    with open(REPOSITORY / "config" / "cifar10.yaml", encoding="utf-8") as file:
        study = yaml.safe_load(file)
    claim = next(c for c in load_ledgers(["randconv"]) if c["id"] == "randconv.table1_cifar10_baseline")
    full, short = (study_facts(config.load_study(study | change)) for change in ({}, {"scale": 0.2}))
    assert differences(claim, full) == []
    assert "epochs: 15 (paper: 75)" in differences(claim, short)
    assert any("every schedule times 0.2" in text for text in differences(claim, short))


def test_every_table_says_it(tmp_path):
    folder = build(tmp_path, images=30, variants={"cnn": None, "cnn_frozen": None}, scale=0.5)
    assert folder.name == "made_up_scale50"
    tables.write(folder)
    for name in ("comparison.md", "replication.md"):
        assert "every schedule times 0.5 (train 2 of 3 epochs" in (folder / "tables" / name).read_text()


def test_figures_still_know_the_networks_of_the_paper():
    own = {"variants": {"cnn": None, "lc_frozen_x8": None}, "host": {"name": "resnet20_16"}}
    for scale in (1, 0.5):
        study = config.load_study(LONG | own | {"scale": scale})
        assert network(study, "lc_frozen_x8").expansion == 8


def test_explain_names_it(tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text(yaml.safe_dump(LONG | {"scale": 0.2}))
    lines = explain.explain(file, "cnn").splitlines()
    assert any(line.startswith("training.epochs") and " 15 " in line and "scale 0.2" in line for line in lines)


def test_the_workflow_gives_it_a_folder_of_its_own(tmp_path):
    house = House.build(tmp_path / "house", TINY | {"variants": {"cnn": None}, "evaluate": {}})
    result = house.snakemake("--dry-run", "--config", "scale=0.5")
    assert result.returncode == 0, result.stdout
    assert "results/tiny_scale50/runs/cnn/seed0/model.safetensors" in result.stdout
    assert "results/tiny/" not in result.stdout
