"""Studies: defaults, digests, and one line for every mistake, with the place and the nearest valid word."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from house import REPOSITORY, TINY

from convx import config
from convx.config import ConfigError, load_study, resolve
from convx.explain import explain, keys_markdown, listing


def study(**changes) -> dict:
    """Return the tiny study with dotted-path changes; a value of ... removes the key."""
    new = copy.deepcopy(TINY)
    for path, value in changes.items():
        node, *rest = new, *path.split("__")
        for key in rest[:-1]:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        if value is ...:
            del node[rest[-1]]
        else:
            node[rest[-1]] = value
    return new


BROKEN = [
    ({"sedes": [1]}, "unknown key 'sedes'", "seeds"),
    ({"data__nmae": "digits"}, "data: unknown key 'nmae'", "name"),
    ({"data__name": "cifar01"}, "data.name", "cifar10"),
    ({"data__name": "fashion-mnist"}, "data.name", "fashion_mnist"),
    ({"data__name": ...}, "data: the key 'name' is missing", ""),
    ({"data__name": "folder"}, "data.path is missing", ""),
    ({"data__path": "somewhere"}, "data.path is for data.name: folder only", ""),
    ({"data__image_size": 4}, "data.image_size: 4 is out of range", ">= 8"),
    ({"data__image_size": "big"}, "data.image_size: 'big' should be of type", "integer"),
    ({"data__image_size": 16}, "corruptions need images of at least 32 px, these have 16", "data.image_size"),
    ({"data__validation": -0.5}, "data.validation: -0.5 is out of range", ">= 0"),
    ({"data__train_images": -1}, "data.train_images: -1 is out of range", ">= 0"),
    ({"study": "Tiny Study"}, "study: 'Tiny Study' is not valid", "a-z0-9_"),
    ({"study": ...}, "the key 'study' is missing", ""),
    ({"baseline": "cnnn"}, "baseline: 'cnnn' is not a variant of the study", "cnn"),
    ({"seeds": [0, 0]}, "seeds: [0, 0] holds a value twice", ""),
    ({"seeds": []}, "seeds: it is empty", "at least 1"),
    ({"seeds": [-1]}, "seeds.0: -1 is out of range", ">= 0"),
    ({"variants__tcnn": {"seeds": [1, 1]}}, "variants.tcnn.seeds: [1, 1] holds a value twice", ""),
    ({"variants__tcn": None}, "variant 'tcn' is unknown", "tcnn"),
    ({"variants": {}}, "variants: it is empty", ""),
    ({"variants__tcnn": {"trainin": {}}}, "variants.tcnn: unknown key 'trainin'", "training"),
    (
        {"variants__tcnn": {"training": {"learning_rate": 1}}},
        "variants.tcnn.training: unknown key 'learning_rate'",
        "",
    ),
    ({"variants__tcnn": {"training": {"lr": -1}}}, "variants.tcnn.training.lr: -1 is out of range", "> 0"),
    ({"variants__tcnn": {"recipe": "finetun"}}, "uses the recipe 'finetun'", "finetune"),
    (
        {"variants__tcnn": {"surgery": [{"verb": "recast_atention"}]}},
        "surgery[0].verb: 'recast_atention' is unknown",
        "recast_attention",
    ),
    ({"variants__tcnn": {"surgery": [{"layers": "*"}]}}, "surgery[0]: the key 'verb' is missing", ""),
    (
        {"variants__tcnn": {"surgery": [{"verb": "recast_attention", "localty": 3}]}},
        "has no argument 'localty'",
        "locality",
    ),
    (
        {"variants__tcnn": {"surgery": [{"verb": "recast_attention", "locality": -3}]}},
        "locality: -3 is out of range",
        "",
    ),
    (
        {"variants__tcnn": {"surgery": [{"verb": "recast_attention", "gate": "liner"}]}},
        "gate: 'liner' is not valid",
        "linear",
    ),
    (
        {"variants__lc_frozen_x8": {"surgery": [{"verb": "linear_combinations", "expansion": 0}]}},
        "expansion: 0 is out of range",
        "",
    ),
    (
        {"variants__lc_frozen_x8": {"surgery": [{"verb": "linear_combinations", "bank": "uniform"}]}},
        "bank: 'uniform' is not valid",
        "iid_uniform",
    ),
    ({"variants__cnn": {"start_from": "tcnn"}}, "start_from is a cycle", "cnn"),
    ({"variants__cnn": {"start_from": "cnn"}}, "start_from is a cycle", ""),
    (
        {"variants__cnn": ..., "baseline": "tcnn"},
        "starts from 'cnn', which is not a variant of the study",
        "add it",
    ),
    ({"variants__tcnn": {"start_from": "cn"}}, "variant 'cn' is unknown", "cnn"),
    ({"variants__tcnn": {"seeds": [7]}}, "starts from 'cnn', whose seeds lack 7", ""),
    ({"variants__tcnn": {"at_epoch": 1000}}, "at_epoch: 1000 is epoch 1000 of 'cnn', which trains for", "at most"),
    ({"variants__tcnn": {"model": {"name": "resnet20_16"}}}, "whose model is another one", ""),
    ({"host__name": "resnet20-16"}, "model 'resnet20-16' is unknown", "resnet20_16"),
    ({"host__name": "timm/resnet81"}, "model 'timm/resnet81' is unknown", "timm/resnet"),
    ({"host__size": 3}, "host: unknown key 'size'", ""),
    ({"recipes__train__optimizer": "sdg"}, "recipes.train.optimizer: 'sdg' is unknown", "sgd"),
    ({"recipes__train__schedule": "cosin"}, "schedule: 'cosin' is not valid", "cosine"),
    ({"recipes__train__epochs": 2.5}, "recipes.train.epochs: 2.5 should be of type integer", ""),
    ({"recipes__train__precision": "fp16"}, "precision: 'fp16' is not valid", ""),
    ({"recipes__train__label_smoothing": 1.0}, "label_smoothing: 1.0 is out of range", "< 1"),
    ({"recipes__train__flip": "yes"}, "recipes.train.flip: 'yes' should be of type boolean", ""),
    ({"evaluate__corruption__protocol": "cifar10_c"}, "protocol: 'cifar10_c' is not valid", "cifar_c"),
    ({"evaluate__corruption__corruptions": ["fogg"]}, "'fogg' is not in imagenet_c", "fog"),
    ({"evaluate__corruption__severities": [6]}, "severities.0: 6 is out of range", "<= 5"),
    ({"evaluate__corruption__protocol": "official"}, "evaluate.corruption.path is missing", ""),
    ({"evaluate__latency__batches": []}, "evaluate.latency.batches: it is empty", ""),
    ({"evaluate__latensy": {}}, "evaluate: unknown key 'latensy'", "latency"),
    ({"carbon": {"intensity_g_per_kwh": -3}}, "carbon.intensity_g_per_kwh: -3 is out of range", ">= 0"),
    ({"device": "gpu"}, "device: 'gpu' is not valid", "cpu"),
    ({"mirror": "folder"}, "mirror: 'folder' should be of type array", ""),
]


@pytest.mark.parametrize(
    ("changes", "place", "near"), BROKEN, ids=[next(iter(c)) + f"-{i}" for i, (c, _, _) in enumerate(BROKEN)]
)
def test_every_mistake_is_one_line_with_its_place(changes, place, near):
    with pytest.raises(ConfigError) as error:
        load_study(study(**changes), "config/tiny.yaml")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("config/tiny.yaml: ")
    assert place in message
    assert near in message


def test_there_are_forty_mistakes_at_least():
    assert len(BROKEN) >= 40


@pytest.mark.parametrize("index", [2, 25, 32])
def test_a_mistake_stops_snakemake_before_any_job(tmp_path, index):
    changes, place, _ = BROKEN[index]
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump(study(**changes)))
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "1",
        "--snakefile",
        str(REPOSITORY / "Snakefile"),
        "--configfile",
        str(file),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    lines = [line for line in result.stderr.splitlines() if line.startswith("convx:")]
    assert result.returncode != 0
    assert len(lines) == 1
    assert place in lines[0]
    assert str(file) in lines[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "results").exists()


def test_yaml_that_is_none_and_a_missing_file(tmp_path):
    (tmp_path / "a.yaml").write_text("study: [tiny\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: not valid YAML"):
        load_study(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="there is no such file"):
        load_study(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="a study is a mapping"):
        load_study(tmp_path / "c.yaml")


@pytest.mark.parametrize("file", sorted((REPOSITORY / "config").glob("*.yaml")), ids=lambda p: p.name)
def test_the_studies_of_the_house_are_valid(file):
    checked = load_study(file)
    for name in checked["variants"]:
        for seed in config.seeds(checked, name):
            assert resolve(checked, name, seed)["digest"]


def test_defaults_are_filled_in():
    checked = load_study(study(evaluate={"corruption": {}}))
    assert checked["evaluate"]["corruption"]["protocol"] == "cifar_c"
    assert checked["evaluate"]["corruption"]["severities"] == [1, 2, 3, 4, 5]
    assert checked["evaluate"]["latency"] is None
    assert checked["carbon"]["intensity_g_per_kwh"] == 475
    assert checked["variants"]["cnn"] == {}


def test_later_layers_of_a_recipe_win():
    checked = load_study(study(recipes__finetune__lr=0.3, variants__tcnn={"training": {"lr": 0.7}}))
    assert config.training_settings(checked, "cnn_finetuned")["lr"] == 0.3
    assert config.training_settings(checked, "tcnn")["lr"] == 0.7
    assert config.training_settings(checked, "cnn")["momentum"] == 0.9


def test_a_digest_moves_with_what_changes_numbers_alone():
    base = resolve(load_study(study()), "tcnn", 0)
    same = [
        {"data__workers": 7},
        {"recipes__train__checkpoints": [1]},
        {"description": "other"},
        {"seeds": [0, 1]},
    ]
    other = [
        {"recipes__finetune__lr": 0.1},
        {"recipes__train__lr": 0.1},
        {"data__validation": 0},
        {"host__name": "resnet14_8"},
        {"variants__tcnn": {"surgery": [{"verb": "recast_attention", "layers": "{stage-1}", "locality": 9.0}]}},
        {"recipes__finetune__threads": 2},
    ]
    for changes in same:
        assert resolve(load_study(study(**changes)), "tcnn", 0)["digest"] == base["digest"], changes
    for changes in other:
        assert resolve(load_study(study(**changes)), "tcnn", 0)["digest"] != base["digest"], changes
    assert resolve(load_study(study(seeds=[0, 1])), "tcnn", 1)["digest"] != base["digest"]


def test_every_value_of_every_variant_has_an_origin():
    missing = []
    for name, declaration in config.declared_variants().items():
        origins = declaration.get("origin", {})
        paths = [
            f"surgery.{i}.{key}"
            for i, step in enumerate(declaration.get("surgery", []))
            for key in step
            if key != "verb"
        ]
        paths += [f"training.{key}" for key in declaration.get("training", {})]
        paths += [key for key in ("start_from", "at_epoch") if declaration.get(key) is not None]
        for path in paths:
            parts = path.split(".")
            if not any(".".join(parts[:n]) in origins for n in range(1, len(parts) + 1)):
                missing.append(f"{name}: {path}")
        assert all(text.split(":")[0] in ("paper", "official code", "own choice") for text in origins.values()), name
    assert not missing


def test_explain_names_an_origin_for_every_number():
    text = explain(REPOSITORY / "config" / "config.yaml", "tcnn")
    lines = {line.split()[0]: line for line in text.splitlines()[4:]}
    assert "own choice" in lines["surgery.0.locality"]
    assert "recipes.finetune" in lines["training.lr"]
    assert "own choice: convx's default" in lines["training.momentum"]
    joint = explain(REPOSITORY / "config" / "config.yaml", "vit_joint").splitlines()
    lines = {line.split()[0]: line for line in joint[4:]}
    assert "paper: section 3.3" in lines["objective.mode"]  # as declared
    assert "variants.vit_joint" in lines["objective.agent_stem_width"]  # the study's
    with pytest.raises(ConfigError, match="did you mean 'tcnn'"):
        explain(REPOSITORY / "config" / "config.yaml", "tcn")


@pytest.mark.parametrize("what", ["variants", "models", "data", "verbs", "keys", "claims"])
def test_lists_are_not_empty(what):
    assert len(listing(what).splitlines()) > 5


def test_every_key_is_documented_and_the_readme_is_current():
    text = (REPOSITORY / "config" / "README.md").read_text()
    assert keys_markdown() in text


def walk(node, path=""):
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from walk(value, f"{path}.{key}")


def test_every_schema_property_has_a_description_and_a_default():
    for name in ("study", "variants"):
        for path, node in walk(config.schema(name)):
            for key, sub in node.get("properties", {}).items() if isinstance(node.get("properties"), dict) else ():
                assert sub.get("description"), f"{name}{path}.{key} has no description"
                needed = path == "" and key in ("data", "variants")  # required blocks
                assert "default" in sub or sub.get("properties") or needed, f"{name}{path}.{key} has no default"
            if node.get("type") == "object" and "properties" in node and path:
                assert node.get("additionalProperties") is False or "objective" in path, (
                    f"{name}{path} admits unknown keys"
                )


def test_parsing_imports_no_torch():
    code = (
        "import sys, yaml; from convx.plan import Plan; "
        "Plan(yaml.safe_load(open(sys.argv[1])), 'x'); print('torch' in sys.modules)"
    )
    file = str(Path(REPOSITORY) / "config" / "config.yaml")
    result = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "False", result.stderr
