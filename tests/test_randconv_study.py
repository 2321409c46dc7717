"""The random-filters studies through the engine: evaluators, what their digests cover, short runs of the real sets, verdicts."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_recipe, mirrors
from torch import nn

from convx import claims, config, source, steps
from convx.evaluate import EvaluationData, Result, kernels, row
from convx.evaluate import run as evaluate_run_module
from convx.evaluate.payload import unpack
from convx.evaluate.run import evaluate_run, paper_evaluator, training_gap
from convx.models import create_model
from convx.papers.randconv import evaluate as own_evaluator
from convx.papers.randconv import figures as own_figures
from convx.report import figures, tables
from convx.report.results import Results
from convx.surgery import linear_combinations

CONFIG = Path(__file__).resolve().parents[1] / "config"
TABLE1 = ["cnn", "lc_frozen_x128", "lc_learned_x128"]


# -------------------------------------------------------------------------------------------------------------- evaluators


def test_the_metrics_of_filters_and_their_pictures():
    conv = nn.Conv2d(4, 20, 5, bias=False)
    result = kernels.run(nn.Sequential(conv, nn.Conv2d(20, 8, 1)))
    assert result.arrays["first_layer_kernels"].shape == (kernels.FIRST_FILTERS, 4, 5, 5)
    assert np.allclose(result.arrays["first_layer_kernels"], conv.weight.detach()[: kernels.FIRST_FILTERS])
    by_hand = (conv.weight.detach().double() / conv.weight.detach().double().std()).flatten(0, 1).var(0, correction=0)
    assert np.allclose(result.arrays["spatial_variance_5x5"], by_hand)
    raw = [r["value"] for r in result.rows if r["metric"] == "filter_variance_entropy_raw"]
    assert raw == [kernels.filter_variance_entropy(conv.weight)] * 2  # the only spatial layer is the first and the last
    assert "filter_variance_entropy" not in [r["metric"] for r in result.rows]  # normalised for 3x3 alone


def test_filters_that_do_not_vary_are_rows_without_a_failure():
    conv = nn.Conv2d(3, 4, 3, bias=False)
    nn.init.zeros_(conv.weight)
    rows = {r["metric"]: r for r in kernels.run(conv).rows}
    assert rows["filter_variance_entropy_raw"]["value"] == 0 and rows["spatial_variance_ratio"]["value"] == 1
    with torch.no_grad():
        conv.weight[:, :, 1, 1] = torch.randn(4, 3)
    row_ = next(r for r in kernels.run(conv).rows if r["metric"] == "spatial_variance_ratio")
    assert row_["value"] is None and "not measured" in row_["method"]
    assert [r["value"] for r in kernels.run(nn.Linear(3, 2)).rows] == [None, None]


def test_the_span_of_random_filters():
    model = create_model("resnet8_8", num_classes=10, in_channels=3, image_size=16)
    assert own_evaluator.run(model, {}, None).rows == []
    ratios = own_evaluator.span_ratios(linear_combinations(model, expansion=8))
    assert len(ratios) == 7
    assert sorted(set(ratios.values())) == pytest.approx([8 / 9, 16 / 9, 64 / 27])  # equal width, doubling, stem
    deep = own_evaluator.span_ratios(
        linear_combinations(nn.Sequential(nn.Conv2d(6, 12, 3)), expansion=3, form="depthwise")
    )
    assert list(deep.values()) == pytest.approx([3 / 9])
    rows = own_evaluator.run(linear_combinations(model, expansion=8), {}, None).rows
    assert [(r["metric"], r["n"]) for r in rows] == [("span_ratio", 7), ("span_ratio", 7), ("spanned_layers", 7)]
    assert rows[0]["value"] == pytest.approx(8 / 9) and rows[2]["value"] == pytest.approx(300 / 7)


def test_the_gap_to_training_images_is_of_a_fixed_sample_without_augmentation(digits, monkeypatch):
    from convx.data import open_set

    monkeypatch.setattr(evaluate_run_module, "TRAINING_SAMPLE", 50)
    data_set = open_set(digits)
    images, labels = data_set.split("train")
    places = np.linspace(0, len(labels) - 1, 50).round().astype(int)
    model = create_model("resnet8_8", num_classes=10, in_channels=1, image_size=32).eval()
    test = EvaluationData.from_arrays(*data_set.split("test"), data_set.meta["mean"], data_set.meta["std"])
    rows = training_gap(model, test, data_set, Result([row("top1", 12.5, "%", method="")])).rows
    with torch.no_grad():
        x = test.normalise(torch.from_numpy(np.array(images[places])).permute(0, 3, 1, 2))
        right = (model(x).argmax(1).numpy() == np.asarray(labels)[places]).mean() * 100
    assert [(r["metric"], r["n"]) for r in rows] == [("train_top1", 50), ("generalisation_gap", 50)]
    assert rows[0]["value"] == pytest.approx(right) and rows[1]["value"] == pytest.approx(right - 12.5)
    assert rows[0]["split"] == "train"  # so that no claim about the test images takes it


def test_a_papers_evaluator_is_called_for_its_variants_alone(digits):
    assert paper_evaluator("randconv") is own_evaluator.run
    assert paper_evaluator("baseline") is None and paper_evaluator(None) is None
    model = create_model("resnet8_8", num_classes=10, in_channels=1, image_size=32)
    model = linear_combinations(model, expansion=4)
    found = {}
    for paper in ("randconv", "baseline"):
        recipe = make_recipe() | {"paper": paper}
        result = evaluate_run(model, recipe, digits, None, {"batch_size": 100}, torch.device("cpu"))
        found[paper] = {r["metric"] for r in result.rows}
        assert unpack(result.arrays["spatial_variance_3x3"]).shape == (3, 3)
    assert found["randconv"] - found["baseline"] == {"span_ratio", "spanned_layers"}
    assert {"train_top1", "generalisation_gap", "filter_variance_entropy", "spatial_variance_ratio"} <= found[
        "baseline"
    ]


# ----------------------------------------------------------------------------------------------------------- source digests


def test_the_recipe_names_the_paper_and_its_digest_does_not():
    study = config.load_study(CONFIG / "cifar10.yaml")
    recipe = config.resolve(study, "lc_frozen_x8", 0)
    assert recipe["paper"] == "randconv" and config.resolve(study, "cnn", 0)["paper"] == "baseline"
    assert config.recipe_digest(recipe | {"paper": "another"}) == recipe["digest"]
    study["variants"]["mine"] = {"base": "lc_frozen_x8"}
    assert config.resolve(study, "mine", 0)["paper"] == "randconv"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package whose files may be edited, read by convx.source without its caches."""
    root = tmp_path / "convx"
    shutil.copytree(source.PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source, "PACKAGE", root)
    cached = [f for f in vars(source).values() if hasattr(f, "cache_clear")]

    def edit(file: str, text: str = "\nEDITED = 1\n") -> None:
        (root / file).write_text((root / file).read_text() + text if (root / file).exists() else text)
        for function in cached:
            function.cache_clear()

    edit("seeds.py", "")
    yield edit
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


def test_an_evaluator_of_a_paper_counts_for_the_evaluation_of_its_variants_alone(package):
    content = config.read_yaml(CONFIG / "cifar10.yaml")
    content["recipes"]["finetune"] = {}
    content["variants"] |= {"tcnn_two_stages": None}
    study = config.load_study(content)
    recipes = {name: config.resolve(study, name, 0) for name in ("cnn", "lc_frozen_x8", "tcnn_two_stages")}

    def digests(verb):
        return {name: source.source_digest(verb, recipe) for name, recipe in recipes.items()}

    def changed(*edits, verb="evaluate"):
        before = digests(verb)
        for arguments in edits:
            package(*arguments)
        after = digests(verb)
        return {name for name in recipes if before[name] != after[name]}

    assert changed(("papers/randconv/evaluate.py",)) == {"lc_frozen_x8"}
    assert changed(("papers/randconv/figures.py",)) == set()  # not imported by the evaluator
    assert changed(("papers/randconv/evaluate.py",), verb="train") == set()
    assert changed(
        ("papers/randconv/helper.py", "VALUE = 1\n"), ("papers/randconv/evaluate.py", "\nfrom .helper import VALUE\n")
    ) == {"lc_frozen_x8"}
    assert changed(("papers/randconv/helper.py",)) == {"lc_frozen_x8"}  # through the evaluator
    package("papers/randconv/helper.py", "\nfrom convx.papers.randconv import deeper\n")
    package("papers/randconv/deeper.py", "VALUE = 1\n")
    assert changed(("papers/randconv/deeper.py",)) == {"lc_frozen_x8"}  # and further
    package("papers/randconv/deeper.py", "\nfrom convx.seeds import derive\nfrom convx.config import digest\n")
    assert changed(("seeds.py",)) == {"lc_frozen_x8"}
    assert changed(("config.py",)) == set()  # it decides no number of an evaluation
    assert changed(("evaluate/kernels.py",)) == set(recipes)


# ------------------------------------------------------------------------------------------------------------------- claims


def made_up(study: dict, means: dict[str, float], spread: float = 0.05) -> pd.DataFrame:
    """Return runs whose accuracies are ``means`` with a small spread over the study's seeds."""
    rows = []
    for name, mean in means.items():
        for place, seed in enumerate(config.seeds(study, name)):
            shift = spread * (1 if place % 2 else -1)
            head = {"study": study["study"], "variant": name, "seed": seed, "status": "ok", "reason": ""}
            rows.append(head | row("top1", mean + shift, "%", method="made up", n=10_000, split="test"))
    return pd.DataFrame(rows).drop(columns="conditions")


def verdicts(study: dict, means: dict[str, float]) -> pd.DataFrame:
    frame = claims.evaluate(claims.load_ledgers(), made_up(study, means), {}, claims.study_facts(study))
    return frame.set_index("claim_id")


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_table_1_is_comparable_under_the_study_that_repeats_it(name):
    study = config.load_study(CONFIG / f"{name}.yaml")
    ledger = {c["id"]: c for c in claims.load_ledgers()}
    ids = [f"randconv.table1_{name}_{kind}" for kind in ("baseline", "lc_frozen", "lc_learned")]
    means = {ledger[i]["variant"]: ledger[i]["paper_value"] for i in ids}
    assert sorted(means) == sorted(TABLE1)
    found = verdicts(study, means)
    assert found.loc[ids, "verdict"].tolist() == ["replicated"] * 3, found.loc[ids, "reason"].tolist()
    assert found.loc[ids, "protocol"].tolist() == ["as in the paper"] * 3
    lower = verdicts(study, {v: m - 5 for v, m in means.items()})
    assert lower.loc[ids, "verdict"].tolist() == ["lower"] * 3
    others = [i for i in ledger if i.startswith("randconv.table1_") and i not in ids]
    assert set(found.loc[others, "verdict"]) == {"not comparable"}


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_the_recipe_of_the_paper_to_the_letter(name):
    study = config.load_study(CONFIG / f"{name}.yaml")
    augmented = {"crop_padding": 4, "flip": True} if name != "fashion_mnist" else {"crop_padding": 0, "flip": False}
    paper = {
        "epochs": 75, "batch_size": 256, "drop_last": False, "optimizer": "sgd", "lr": 0.01, "momentum": 0.9,
        "weight_decay": 0.01, "decay_norm_and_bias": True, "schedule": "cosine", "warmup_epochs": 0, "min_lr": 0,
        "label_smoothing": 0.1, "ema": None, "clip_grad": None, "mixup": 0, "cutmix": 0,
        "randaugment": None, **augmented,
    }  # fmt: skip
    for variant in TABLE1:
        training = config.training_settings(study, variant)
        assert {key: training[key] for key in paper} == paper and training["precision"] == "bf16"
        assert config.variant_settings(study, variant)["model"] == {"name": "resnet20_16", "settings": {}}
    from convx.data.sets import SETS

    published = {
        "fashion_mnist": ((0.2860,), (0.3530,)),
        "cifar10": ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
        "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
    }
    assert (SETS[name].mean, SETS[name].std) == published[name]
    assert not study["reduced"] and not study["data"]["validation"] and (study["data"]["image_size"] or 32) == 32
    assert [len(config.seeds(study, v)) for v in TABLE1] == [6 if name == "cifar10" else 4] * 3


# --------------------------------------------------------------------------------------------------------------- real data


def shortened(name: str, variants: list[str]) -> dict:
    """Return a study of config/ with 512 training images, two epochs and one seed."""
    study = config.read_yaml(CONFIG / f"{name}.yaml")
    study |= {"study": f"short_{name}", "reduced": "512 training images, 2 epochs", "seeds": [0], "device": "cpu"}
    study["data"] |= {"train_images": 512, "test_images": 100}
    study["recipes"]["train"] |= {"epochs": 2, "batch_size": 64}
    study["variants"] = {variant: {} for variant in variants}
    study["evaluate"] = {"attacks": {"epsilons": [1]}}
    return config.load_study(study)


def official_files(name: str, tmp_path: Path) -> list[str]:
    """Return mirrors that hold a set's official files, unpacked first where a mirror brings a script for that, or skip."""
    from convx.data.sets import SETS
    from convx.data.sources import Finder

    folders = mirrors()
    for folder in list(folders):
        script = Path(folder) / "unpack_cifar.py"
        if script.is_file() and name in ("cifar10", "cifar100"):
            subprocess.run(
                [sys.executable, str(script), str(tmp_path / "unpacked"), name], check=True, capture_output=True
            )
            folders.append(str(tmp_path / "unpacked"))
    if Finder(folders, tmp_path / "cache").official(SETS[name], addresses=False) is None:
        pytest.skip(f"no mirror of {name} here; set CONVX_MIRROR to a folder that holds its official files")
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_a_short_version_of_the_study_runs_to_tables_and_figures(name, tmp_path, monkeypatch):
    """Every variant of Table 1 trains on real images; nothing of it is comparable with the paper's absolute values."""
    where = official_files(name, tmp_path)
    variants = [*TABLE1, "cnn_frozen", "lc_frozen_x8"]
    study = shortened(name, variants)
    folder, data = tmp_path / "results" / study["study"], tmp_path / "data" / "meta.json"
    steps.data(study["data"], where, str(data))
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study))
    for variant in variants:
        recipe = config.resolve(study, variant, 0)
        recipe_file = tmp_path / f"{variant}.json"
        recipe_file.write_text(json.dumps(recipe))
        model = folder / "runs" / variant / "seed0" / "model.safetensors"
        digests = {verb: source.source_digest(verb, recipe) for verb in ("train", "evaluate")}
        model.parent.mkdir(parents=True)
        steps.train(
            str(recipe_file), str(data), None, digests["train"], study["carbon"], str(model), str(tmp_path / "progress")
        )
        out = folder / "metrics" / variant / "seed0" / "evaluation.json"
        settings = {"batch_size": 200, "attacks": study["evaluate"]["attacks"]}
        steps.evaluate(str(recipe_file), str(model), str(data), None, settings, digests["evaluate"], str(out))

    results = Results(folder)
    assert [results.status(variant) for variant in variants] == [("ok", "")] * len(variants)
    for variant in variants:
        for metric in ("top1", "fgsm_accuracy", "generalisation_gap"):
            assert len(results.values(variant, metric)) == 1, (variant, metric)
        loss = results.history(variant, 0)["train_loss"].dropna()
        assert len(loss) == 2 and loss.iloc[1] < loss.iloc[0]
    assert (
        results.values("lc_frozen_x8", "trainable_parameters")[0]
        < results.values("lc_learned_x128", "trainable_parameters")[0]
    )
    entropy = results.values("cnn_frozen", "filter_variance_entropy", layer="last")[0]
    assert entropy == pytest.approx(1, abs=0.05)  # frozen filters are as random as they were

    tables.write(folder)
    replication = pd.read_csv(folder / "tables" / "replication.csv").set_index("claim_id")
    table1 = [claim for claim in replication.index if claim.startswith(f"randconv.table1_{name}_")]
    assert len(table1) == 3 and set(replication.loc[table1, "verdict"]) == {"not comparable"}
    assert replication.loc[table1, "reason"].str.contains("reduced study").all()
    ordering = replication.loc["randconv.frozen_rises_to_x128"]
    assert (ordering["verdict"], ordering["reason"]) == ("inconclusive", "one run: its spread is unknown")
    assert "top-1" in (folder / "tables" / "comparison.md").read_text()
    monkeypatch.setattr(own_figures, "FIGURES", (own_figures.accuracy_expansion, own_figures.spatial_variance))
    (folder / "figures").mkdir()
    drawn = figures.paper_figures(results, folder / "figures")
    assert drawn == ["randconv_accuracy_expansion", "randconv_spatial_variance"]


def test_a_result_keeps_its_arrays_when_added():
    both = Result([], arrays={"a": np.ones(2)}) + Result([], arrays={"b": np.ones(3)})
    assert both.arrays.keys() == {"a", "b"} and {f.name for f in dataclasses.fields(both)} >= {"rows", "arrays"}
