"""The figures of the SERE folder, drawn from made-up results; what has no data is not drawn."""

import re

import numpy as np
import pandas as pd
import pytest

from convx import config
from convx.evaluate import row
from convx.evaluate.payload import encode, pack
from convx.manifest import MetricsFile, write_json
from convx.papers.sere import figures
from convx.report.comparison import comparison
from convx.report.figures import accuracy, paper_figures
from convx.report.results import Results
from convx.report.tables import comparison_markdown

NAMES = ["sere_neighbours", "sere_relations", "sere_relation_losses", "sere_collapse_watch", "sere_attention"]
ARMS = ["dino", "dino_spatial", "sere"]
EPOCHS = 6


def made_up_study() -> dict:
    return config.load_study(
        {
            "study": "made_up",
            "reduced": "numbers that were made up for a test",
            "data": {"name": "cifar10", "validation": 5000},
            "host": {"name": "resnet8_8"},
            "baseline": "cnn",
            "seeds": [0, 1],
            "recipes": {"pretrain": {"epochs": EPOCHS}, "train": {"epochs": EPOCHS}},
            "variants": dict.fromkeys(["cnn", *ARMS]),
        }
    )


def evaluation_rows(place: int, correct, rng) -> list[dict]:
    said = "weighted votes of the 20 nearest training images (T = 0.07) in the frozen encoder's features, float32"
    rows = [row("top1", 100 * correct.mean(), "%", n=len(correct), split="test", method=said)]
    rows.append(row("knn_top1", 100 * correct.mean(), "%", n=len(correct), split="test", method="made up"))
    for encoder, scale in (("trained", 1.0), ("untrained", 0.6)):
        for pair, size in (("matched", 0.2), ("unmatched", 0.9)):
            value = scale * size * (1 - 0.1 * place) + 0.02 * rng.random()
            for relation in ("spatial", "channel"):
                where = {"encoder": encoder, "pair": pair, "relation": relation}
                rows.append(row("relation_divergence", value, "nats", split="test", method="made up", **where))
            where = {"encoder": encoder, "pair": pair}
            rows.append(row("relation_agreement", 60 - 40 * value, "%", split="test", method="made up", **where))
    return rows


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """Return the results folder of a study whose every number is made up."""
    folder = tmp_path_factory.mktemp("results") / "made_up"
    study = made_up_study()
    write_json(folder / "study.json", study)
    rng = np.random.default_rng(0)
    for place, name in enumerate(study["variants"]):
        for seed in study["seeds"]:
            correct = rng.random(2000) < 0.7 + 0.03 * place
            target = folder / "metrics" / name / f"seed{seed}" / "evaluation.json"
            recipe = config.resolve(study, name, seed)
            with MetricsFile(target, "evaluation", recipe, source_digest="s", data_digest="d") as file:
                file.per_image = {"correct": encode(correct)}
                if name == "cnn":
                    said = "argmax of the logits"
                    file.rows = [row("top1", 100 * correct.mean(), "%", n=2000, split="test", method=said)]
                else:
                    y, x = np.mgrid[:8, :8]
                    blob = np.exp(-((x - 3 - place) ** 2 + (y - 4) ** 2) / 6)
                    file.rows = evaluation_rows(place, correct, rng)
                    file.arrays = {
                        "pictures": pack(rng.random((4, 32, 32, 3))),
                        "attention": pack(np.broadcast_to(blob, (4, 3, 8, 8)).copy()),
                    }
            epochs = np.arange(EPOCHS + 1)
            history = {"epoch": epochs, "knn_top1": 90 - (50 - 3 * place) / (1 + epochs) + seed}
            for column, value in (("teacher_entropy", 4.0), ("teacher_information", 1.0), ("centre_norm", 0.5)):
                history[f"train_{column}"] = np.where(epochs, value + 0.1 * seed + 0.05 * epochs, np.nan)
            for kind in ("spatial", "channel"):
                if name == "sere" or name.endswith(kind):
                    history[f"train_{kind}_kl"] = np.where(epochs, 0.3 + 0.5 / (1 + epochs) + 0.02 * seed, np.nan)
            if name == "cnn":
                history = {"epoch": epochs, "validation_top1": 95 - 40 / (1 + epochs)}
            file = folder / "histories" / name / f"seed{seed}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(history).to_csv(file, index=False)
    return folder


def text_of(svg) -> str:
    """Return the words of a figure; its text is text in the SVG."""
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text(encoding="utf-8")))


def test_every_figure_is_drawn_and_says_what_it_shows(made_up, tmp_path):
    drawn = paper_figures(Results(made_up), tmp_path)
    assert [name for name in drawn if name.startswith("sere")] == NAMES
    for name in NAMES:
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        words = text_of(tmp_path / f"{name}.svg")
        assert "made up for a test" in words, name
        shown = {variant for variant in ARMS if variant in words or variant.replace("_", " ", 1) in words}
        assert shown == set(ARMS) and "cnn" not in words.split(), name  # "dino" is in "dino_spatial" too
    assert "nats" in text_of(tmp_path / "sere_relations.svg")
    assert "validation top-1 of the neighbours (%)" in text_of(tmp_path / "sere_neighbours.svg")


def test_curves_are_the_histories(made_up):
    results = Results(made_up)
    frame = figures.curve(results, "sere", "knn_top1")
    assert list(frame.columns) == [0, 1] and frame.loc[1].tolist() == pytest.approx([90 - 41 / 2, 91 - 41 / 2])
    assert figures.curve(results, "dino", "train_spatial_kl") is None
    panels = figures.relation_losses(results, ARMS).axes
    for axes, names in zip(panels, (["dino_spatial", "sere"], ["sere"])):
        drawn = [line for line in axes.lines if len(line.get_xdata()) > 1]
        assert len(drawn) == len(names)
    labels = {text.get_text() for text in panels[-1].get_legend().get_texts()}
    assert labels == {"dino_spatial", "sere"}


def test_the_comparison_says_that_neighbours_decided(made_up):
    results = Results(made_up)
    table = comparison(results)
    assert table.set_index("variant").loc["cnn", "top1_method"] == "argmax of the logits"
    text = comparison_markdown(results, table)
    line = next(line for line in text.splitlines() if line.startswith("Trained without labels"))
    assert "`dino`, `dino_spatial`, `sere`" in line and "20 nearest training images (T = 0.07)" in line
    words = accuracy(results, table).get_supxlabel()
    assert "without training labels: dino, dino_spatial, sere" in " ".join(words.split())


def test_what_has_no_data_is_not_drawn(tmp_path):
    write_json(tmp_path / "bare" / "study.json", made_up_study())
    assert figures.draw(Results(tmp_path / "bare"), tmp_path) == []
