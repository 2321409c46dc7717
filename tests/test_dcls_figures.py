"""The figures of the DCLS folder, drawn from made-up results; what has no data is not drawn."""

import re

import numpy as np
import pandas as pd
import pytest
from made_up import head

from convx import config
from convx.evaluate import row
from convx.evaluate.payload import encode, pack
from convx.manifest import write_json
from convx.papers.dcls import figures
from convx.report.figures import paper_figures
from convx.report.results import Results

NAMES = ["dcls_positions", "dcls_kernels", "dcls_radius", "dcls_repulsion", "dcls_parameters", "dcls_throughput"]
SETS = {"stages.0.0.conv_dw": 15, "stages.1.2.conv_dw": 13}
MILLIONS = {"dense7": 0.5605, "dense_s": 0.63, "dcls_bilinear": 0.5601, "dcls_uniform_frozen": 0.5601}
TAPS = ("dcls_bilinear", "dcls_uniform_frozen")
EPOCHS = 8


def made_up_study(variants=MILLIONS) -> dict:
    return config.load_study(
        {
            "study": "made_up",
            "reduced": "numbers that were made up for a test",
            "data": {"name": "cifar10"},
            "host": {"name": "convnext_cifar"},
            "baseline": "dense7",
            "seeds": [0, 1],
            "recipes": {"train": {"epochs": EPOCHS}},
            "variants": dict.fromkeys(variants),
        }
    )


def heat(side: int, width: float, rng) -> np.ndarray:
    """Return the shares [side, side] of normally placed taps in percent."""
    at = np.clip(np.rint(rng.normal(0, width, (2, 3000))), -(side // 2), side // 2).astype(int) + side // 2
    counts = np.zeros((side, side))
    np.add.at(counts, tuple(at), 1)
    return 100 * counts / counts.sum()


def arrays_of(name: str, rng) -> dict:
    found = {}
    for layer, side in SETS.items():
        for state, width in {"start": 0.5, "end": 3.0}.items():
            width = 4.0 if name == "dcls_uniform_frozen" else width
            found[f"positions/{layer}/{state}"] = pack(heat(side, width, rng))
            found[f"kernels/{layer}/{state}"] = pack(rng.normal(size=(6, side, side)) * heat(side, width, rng))
    return found


def cost_rows(name: str) -> list[dict]:
    """Return rows of two batch sizes; DCLS is half as fast as dense kernels until it is folded."""
    rows = []
    for batch in (1, 32):
        for form in ("no", "yes") if name in TAPS else ("no",):
            where = {"batch": batch, "threads": 1, "dtype": "float32", "device": "cpu", "folded": form}
            slow = 2.0 if name in TAPS and form == "no" else 1.1
            rows.append(row("throughput", 400 / slow, "images/s", method="made up", **where))
            for part, value in (
                {"median": slow, "low": 0.95 * slow, "high": 1.05 * slow}.items() if name != "dense7" else ()
            ):
                given = where | {"statistic": part, "reference": "dense7"}
                rows.append(row("latency_ratio", value, "ratio", method="made up", **given))
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
            correct = rng.random(2000) < 0.8 + 0.02 * place
            rows = [
                row("top1", 100 * correct.mean(), "%", n=2000, split="test", method="made up"),
                row("parameters", 1e6 * MILLIONS[name], "parameters", method="made up"),
            ]
            for layer in SETS if name in TAPS else ():
                where = {"layer": layer, "dense_side": 7, "state": "end"}
                rows.append(row("tap_share_outside", 20.0, "%", method="made up", **where))
            record = head(study, name, seed) | {
                "what": "evaluation",
                "rows": rows,
                "per_image": {"correct": encode(correct)},
            }
            record["arrays"] = {"first_layer": pack(np.zeros((4, 2, 2)))} | (
                arrays_of(name, rng) if name in TAPS else {}
            )
            write_json(folder / "metrics" / name / f"seed{seed}" / "evaluation.json", record)
            if name not in TAPS:
                continue
            epochs = np.arange(EPOCHS + 1)
            history = {"epoch": epochs, "train_loss": 2.0 / (1 + epochs)}
            for layer in SETS:
                history[f"{layer}.tap_radius_mean"] = 0.6 + (0.3 + 0.05 * seed) * epochs
                history[f"{layer}.tap_radius_p90"] = 1.1 + 0.6 * epochs
                history[f"{layer}.tap_overlap"] = 0.25 / (1 + epochs)
            file = folder / "histories" / name / f"seed{seed}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(history).to_csv(file, index=False)
        cost = head(study, name, 0) | {"what": "cost", "rows": cost_rows(name)}
        write_json(folder / "metrics" / name / "seed0" / "cost.json", cost)
    return folder


def text_of(svg) -> str:
    """Return the words of a figure; its text is text in the SVG."""
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text(encoding="utf-8")))


def test_every_figure_is_drawn_and_says_what_it_shows(made_up, tmp_path):
    assert paper_figures(Results(made_up), tmp_path) == NAMES  # as a study's report calls them
    for name in NAMES:
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        words = text_of(tmp_path / f"{name}.svg")
        assert "made up for a test" in words, name
        shown = {variant for variant in MILLIONS if variant in words or variant.replace("_", " ", 1) in words}
        assert shown == (set(TAPS) if name in NAMES[:4] else set(MILLIONS)), name
    words = text_of(tmp_path / "dcls_throughput.svg")
    assert words.count("2.00 (1.90 to 2.10)") == 4 and words.count("1.10 (1.04 to 1.16)") == 6
    assert "dcls_bilinear, folded" in words and "dense7, folded" not in words
    assert "before training" in text_of(tmp_path / "dcls_positions.svg")


def test_curves_are_means_over_sets_and_squared_for_the_loss(made_up):
    results = Results(made_up)
    frame = figures._curves(results, list(MILLIONS), "tap_radius_mean")["dcls_bilinear"]
    assert list(frame.columns) == [0, 1] and len(frame) == EPOCHS + 1
    assert frame.loc[4].tolist() == pytest.approx([0.6 + 0.3 * 4, 0.6 + 0.35 * 4])
    axes = figures.repulsion(results, list(MILLIONS)).axes[0]
    curve = next(line for line in axes.lines if line.get_label() == "dcls_bilinear")
    assert curve.get_ydata()[:2].tolist() == pytest.approx([0.25**2, 0.125**2])
    dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":" and len(line.get_xdata()) == 2]
    assert dotted == [pytest.approx(0.07 * EPOCHS)]  # of dcls_bilinear; frozen positions have no repulsion


def test_pictures_have_the_centre_at_zero_and_the_dense_kernel_around_it(made_up):
    results = Results(made_up)
    axes = figures.positions(results, ["dcls_bilinear"]).axes[0]
    assert axes.images[0].get_extent() == [-7.5, 7.5, 7.5, -7.5]
    assert axes.patches[0].get_bbox().bounds == (-3.5, -3.5, 7, 7)
    seeds = figures._arrays(results, ["dcls_bilinear"], "positions")["dcls_bilinear"]["stages.0.0.conv_dw"]["start"]
    shown = np.asarray(axes.images[0].get_array()) ** 2
    np.testing.assert_allclose(shown, np.mean(seeds, 0), atol=1e-4)
    assert len(seeds) == 2 and shown.sum() == pytest.approx(100, abs=0.1) and shown[7, 7] == shown.max()


def test_what_has_no_data_is_not_drawn(made_up, tmp_path):
    study = made_up_study(["dense7", "dense_s"])
    write_json(tmp_path / "bare" / "study.json", study)
    assert figures.draw(Results(tmp_path / "bare"), tmp_path) == []
    some = tmp_path / "some"
    write_json(some / "study.json", study)
    for name in study["variants"]:
        target = some / "metrics" / name / "seed0" / "evaluation.json"
        target.parent.mkdir(parents=True)
        target.write_text((made_up / "metrics" / name / "seed0" / "evaluation.json").read_text())
    assert figures.draw(Results(some), tmp_path) == ["dcls_parameters"]
