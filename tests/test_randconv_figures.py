"""The random-filters figures and the grid behind them, drawn from made-up results of the whole sweep study."""

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from made_up import head

from convx import config
from convx.evaluate import row
from convx.evaluate.payload import pack, unpack
from convx.papers.randconv import figures
from convx.papers.randconv.kernels import law
from convx.papers.randconv.networks import Network, network, networks, rank_thresholds
from convx.report import results as report_results

REPOSITORY = Path(__file__).resolve().parents[1]
STUDY = config.load_study(REPOSITORY / "config" / "cifar10_random.yaml")
ALL = [
    "accuracy_expansion",
    "accuracy_parameters",
    "fgsm_expansion",
    "entropy_expansion",
    "gap_kernel_size",
    "spatial_variance",
    "first_layer_filters",
    "accuracy_width",
    "accuracy_stored",
    "gap_to_training",
    "learning_rates",
    "random_combinations_law",
]


def rows_of(variant: str, seed: int) -> list[dict]:
    """Return made-up rows; the network's place decides them, so that every curve has a shape."""
    place = network(STUDY, variant) or Network(variant, 20, 16, 3, 8, True, 0.01)
    noise = np.random.default_rng(seed + sum(map(ord, variant))).normal(scale=0.15)
    reach = 1.0 if not place.frozen else min(1.0, (place.span if place.expansion else 0.02) ** 0.25)
    top1 = 90 - 25 * (1 - reach) - 0.2 * place.kernel + 0.8 * math.log2(place.width / 16) + noise
    entropy = 0.6 if not place.frozen else 1 - 0.05 * math.log2(place.expansion + 1)
    learned = 5_000 + 32_000 * (place.expansion or (0 if place.frozen else 8))
    return [
        row("top1", top1, "%", method="made up", n=10_000, split="test"),
        row("train_top1", top1 + 4 * reach, "%", method="made up", n=10_000, split="train"),
        row("generalisation_gap", 4 * reach + noise, "pp", method="made up", n=10_000),
        row("fgsm_accuracy", top1 - 30, "%", method="made up", n=10_000, split="test", epsilon="1/255"),
        row("filter_variance_entropy", entropy, "1", method="made up", layer="first"),
        row("filter_variance_entropy", entropy - 0.3, "1", method="made up", layer="last"),
        row("trainable_parameters", learned, "parameters", method="made up"),
        row("stored_bytes", 4 * learned, "B", method="made up"),
    ]


def pictures(variant: str, seed: int) -> dict:
    place = network(STUDY, variant)
    side = place.kernel if place else 3
    y, x = np.mgrid[:side, :side] - side // 2
    bump = np.exp(-(y**2 + x**2) / side) if place and not place.frozen else np.ones((side, side))
    kernels = np.random.default_rng(seed).normal(size=(16, 3, side, side)) * bump
    return {f"spatial_variance_{side}x{side}": pack(bump), "first_layer_kernels": pack(kernels)}


def write(folder: Path, study: dict, skip: str | None = None) -> Path:
    """Write a results folder; without the metrics that ``skip`` names."""
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study))
    for variant in study["variants"]:
        for seed in config.seeds(study, variant):
            begin = head(study, variant, seed)
            rows = [r for r in rows_of(variant, seed) if r["metric"] != skip]
            lr = config.training_settings(study, variant)["lr"]
            validation = 85 - 3 * abs(math.log10(lr / 0.03)) + seed / 10
            trained = [row("final_validation_top1", validation, "%", method="made up", n=5_000, split="validation")]
            files = {
                "evaluation": {"rows": rows, "arrays": {} if skip == "arrays" else pictures(variant, seed)},
                "training": {"rows": trained, "arrays": {}},
            }
            for what, content in files.items():
                file = folder / "metrics" / variant / f"seed{seed}" / f"{what}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(begin | {"what": what} | content))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("made_up") / "cifar10_random", STUDY)


def drawn(folder: Path, out: Path) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    return [name.removeprefix("randconv_") for name in figures.draw(report_results.Results(folder), out)]


def part(variants: list[str], **changes) -> dict:
    return STUDY | {"variants": {v: STUDY["variants"].get(v, {}) for v in variants}, "seeds": [0, 1]} | changes


def test_every_figure_is_drawn_from_the_sweep_study(folder, tmp_path):
    assert drawn(folder, tmp_path) == ALL
    for name in ALL:
        for kind in ("svg", "png"):
            assert (tmp_path / f"randconv_{name}.{kind}").stat().st_size > 5_000
        assert (name == "random_combinations_law") != (
            "Reduced study: 20 epochs" in (tmp_path / f"randconv_{name}.svg").read_text()
        )
    svg = (tmp_path / "randconv_accuracy_expansion.svg").read_text()
    assert svg.count("spans all kernels") == 3  # E = 2, 5 and 9
    assert "own prediction" in (tmp_path / "randconv_gap_kernel_size.svg").read_text()


def test_figures_are_the_same_bytes_when_drawn_twice(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", (figures.accuracy_width, figures.spatial_variance))
    assert drawn(folder, tmp_path / "a") == drawn(folder, tmp_path / "b")
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 4 and all(file.read_bytes() == (tmp_path / "b" / file.name).read_bytes() for file in files)


@pytest.mark.parametrize(
    ("skip", "missing"),
    [
        ("arrays", {"spatial_variance", "first_layer_filters"}),
        ("fgsm_accuracy", {"fgsm_expansion"}),
        ("filter_variance_entropy", {"entropy_expansion"}),
        ("generalisation_gap", {"gap_to_training"}),
        ("stored_bytes", {"accuracy_stored"}),
        ("trainable_parameters", {"accuracy_parameters"}),
    ],
)
def test_a_figure_without_its_data_is_left_out(skip, missing, tmp_path):
    names = ["cnn", *(f"lc_{kind}_x{e}{k}" for kind in ("frozen", "learned") for e in (1, 8) for k in ("", "_k9"))]
    study = part(names, seeds=[0])
    study["variants"] = {name: {} for name in names}
    results, complete = (report_results.Results(write(tmp_path / str(s), study, s)) for s in (skip, None))
    for function in figures.FIGURES:
        if function.__name__ in missing:
            assert function(results, networks(study)) is None
            figure = function(complete, networks(study))
            assert figure is not None
            plt.close(figure)


def test_nothing_is_drawn_where_nothing_ran_or_no_network_is_of_the_grid(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "study.json").write_text(json.dumps(part(["cnn", "mobile", "mobile_frozen"])))
    assert drawn(empty, tmp_path / "out") == []


def test_the_points_are_the_numbers_of_the_metrics(folder):
    results = report_results.Results(folder)
    by_hand = {v: np.array([rows_of(v, s)[0]["value"] for s in (0, 1, 2)]) for v in ("lc_frozen_x8", "lc_learned_x8")}
    estimate, low, high = figures.point(results, "lc_frozen_x8", "top1")
    assert estimate == pytest.approx(by_hand["lc_frozen_x8"].mean()) and low < estimate < high
    gap = figures.difference(results, "lc_learned_x8", "lc_frozen_x8")
    assert gap[0] == pytest.approx(by_hand["lc_learned_x8"].mean() - by_hand["lc_frozen_x8"].mean())
    assert gap[1] < gap[0] < gap[2]
    assert figures.point(results, "lc_frozen_x8", "no_such_metric") is None


def test_the_grid_is_read_from_what_variants_declare():
    grid = {n.variant: n for n in networks(STUDY)}
    assert grid["cnn"] == Network("cnn", 20, 16, 3, 0, False, 0.01)
    assert grid["cnn_frozen"] == Network("cnn_frozen", 20, 16, 3, 0, True, 0.01)
    assert grid["lc_frozen_x64_k9"] == Network("lc_frozen_x64_k9", 20, 16, 9, 64, True, 0.01)
    assert grid["lc_learned_x1_w128"] == Network("lc_learned_x1_w128", 20, 128, 3, 1, False, 0.01)
    assert grid["lc_frozen_x8_lr01"].lr == 0.1
    beside = [
        "lc_frozen_shared_x8",
        "lc_frozen_orthonormal_x16",
        "lc_frozen_covariance_x8",
        "lc_frozen_relu_x8",
        "edges_and_lines",
    ]
    assert not grid.keys() & set(beside) and set(beside) <= set(STUDY["variants"])
    own = part(["cnn"])
    own["variants"]["mine"] = {"base": "lc_frozen_x8", "training": {"epochs": 3}}
    assert network(own, "mine") is None  # another schedule is no point of a curve
    own["variants"]["mine"] = {"base": "lc_frozen_x8"}
    assert network(own, "mine") == Network("mine", 20, 16, 3, 8, True, 0.01)


def test_rank_thresholds_are_those_of_the_derivation():
    assert list(rank_thresholds(3, 3, 16).values()) == [2, 5, 9]
    assert [rank_thresholds(k, 3, 16)["layers of equal width"] for k in (5, 7, 9)] == [25, 49, 81]


def test_the_law_of_random_combinations_holds_within_3_percent():
    assert all(abs(r["measured"] - r["predicted"]) < 0.03 for r in law())


def test_pictures_survive_the_metrics_file():
    array = np.linspace(-2, 2, 30).reshape(2, 3, 5)
    again = unpack(json.loads(json.dumps(pack(array))))
    assert again.shape == array.shape and np.allclose(again, array, rtol=1e-3)
    with pytest.raises(ValueError, match="array of floats"):
        pack(np.arange(3))
