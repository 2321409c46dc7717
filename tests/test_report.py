"""The report: tables, figures and front page from a made-up results folder; their numbers, their words, their
bytes."""

import hashlib
import itertools
import json
import math
import re
import time
import warnings
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from made_up import STUDY, build

from convx import claims, config, statistics
from convx.evaluate.energy import SHARED_COUNTERS
from convx.report import figures, findings, forest, page, style, tables, words
from convx.report.comparison import comparison, interval
from convx.report.results import Results

FIGURES = [function.__name__ for function in figures.FIGURES]
FEW = (figures.claims_forest, figures.accuracy)


@pytest.fixture(scope="module", autouse=True)
def ledgers():
    """Read the ledgers once for all tests: they take a second or two."""
    read = claims.load_ledgers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "load_ledgers", lambda: read)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a complete study with everything made from it, the papers' own figures included."""
    return _made(build(tmp_path_factory.mktemp("made_up")), papers=True)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Return a study with a failed run, a variant without runs, and one with a seed missing."""
    lost = [("cnn_frozen", seed) for seed in (0, 1, 2)] + [("lc_frozen_x8", 2)]
    return _made(build(tmp_path_factory.mktemp("broken"), failed=[("tcnn", 1)], missing=lost), drawn=FEW)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Return a study of one seed: intervals over seeds do not exist."""
    return _made(build(tmp_path_factory.mktemp("single"), seeds=[0]), drawn=FEW)


def _made(folder, papers: bool = False, drawn=figures.FIGURES):
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error", UserWarning)  # matplotlib's, of layouts that collapse and glyphs that lack
        if not papers:
            patch.setattr(figures, "paper_figures", lambda results, out: [])
        patch.setattr(figures, "FIGURES", drawn)
        tables.write(folder)
        figures.draw(folder)
        page.write(folder)
    return folder


def _files(folder) -> dict[str, str]:
    made = [*folder.glob("tables/*"), *folder.glob("figures/*"), *folder.glob("report/*")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in made}


def _text(folder, name: str) -> str:
    return (folder / "tables" / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- comparison


def test_interval_resamples_seeds_and_images(folder):
    results = Results(folder)
    found = interval(results, "cnn", "top1")
    correct_SN = np.stack([results.per_image["cnn"][seed]["correct"] for seed in (0, 1, 2)])
    expected = statistics.bootstrap_seeds_images(correct_SN, resamples=4000)
    assert (found.estimate, found.low, found.high) == pytest.approx((expected.estimate, expected.low, expected.high))
    assert "3 seed(s) and 400 images" in found.method
    values = results.values("cnn", "top1")
    assert found.estimate == pytest.approx(values.mean()) and list(values.index) == [0, 1, 2]


def test_interval_of_corruption_has_the_image_as_its_unit(folder):
    results = Results(folder)
    found = interval(results, "lc_frozen_x8", "mean_corruption_accuracy")
    cells_SN = np.stack([results.per_image["lc_frozen_x8"][s]["corruption_correct_cells"] for s in (0, 1, 2)]) / 10
    expected = statistics.bootstrap_seeds_images(cells_SN, resamples=4000)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_interval_without_payloads_is_students(tmp_path):
    results = Results(build(tmp_path, payloads=False))
    found = interval(results, "cnn", "top1")
    expected = statistics.t_interval(results.values("cnn", "top1").to_numpy())
    assert (found.estimate, found.low) == pytest.approx((expected.estimate, expected.low))
    assert found.high == pytest.approx(min(100, expected.high)) and "Student" in found.method


def test_payloads_that_do_not_fit_their_rows_are_not_used(tmp_path):
    folder = build(tmp_path)
    file = folder / "metrics" / "cnn" / "seed1" / "evaluation.json"
    record = json.loads(file.read_text())
    next(row for row in record["rows"] if row["metric"] == "top1")["value"] -= 1.0
    file.write_text(json.dumps(record))
    assert "Student" in interval(Results(folder), "cnn", "top1").method


def test_one_seed_has_the_interval_of_its_test_images(single):
    results = Results(single)
    found = interval(results, "cnn", "top1")
    share = results.values("cnn", "top1").iloc[0] / 100
    expected = statistics.wilson_interval(round(400 * share), 400)
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert "one run" in found.method
    assert "single seed" in interval(results, "cnn", "mean_corruption_accuracy").method
    assert interval(results, "cnn", "not_a_metric") is None


def test_values_take_the_plainest_row_and_refuse_a_choice(folder):
    results = Results(folder)
    assert results.values("tcnn", "latency", statistic="median").iloc[0] == pytest.approx(1.0 + 0.37 * 5)  # batch 1
    assert results.values("tcnn", "latency", statistic="median", batch=32).iloc[0] > 20
    assert results.values("tcnn", "latency").empty  # five statistics: no single value
    assert results.values("tcnn", "top1", corruption="fog").empty
    assert results.values("tcnn", "top1", no_such_condition=1).empty


def test_comparison_has_a_row_a_variant_whatever_happened(broken):
    frame = comparison(Results(broken)).set_index("variant")
    assert list(frame.index) == list(STUDY["variants"])
    assert frame.loc["tcnn", "status"] == "failed" and "epoch 2" in frame.loc["tcnn", "reason"]
    assert frame.loc["cnn_frozen", "status"] == "not run" and math.isnan(frame.loc["cnn_frozen", "top1"])
    assert frame.loc["lc_frozen_x8", ["status", "seeds_done", "seeds_planned"]].tolist() == [
        "incomplete",
        2,
        3,
    ]
    assert frame.loc["cnn", "latency_ratio"] == 1.0 and frame.loc["tcnn", "latency_ratio"] == pytest.approx(2.85)
    finite = frame.select_dtypes("number").to_numpy(dtype=float)
    assert not np.isinf(finite).any()


def test_csv_files_hold_every_row(folder):
    runs = pd.read_csv(folder / "tables" / "runs.csv")
    assert len(runs) == sum(len(record["rows"]) for record in Results(folder).records)
    replicated = pd.read_csv(folder / "tables" / "replication.csv")
    assert list(replicated["claim_id"]) == [claim["id"] for claim in claims.load_ledgers()]
    assert list(replicated.columns) == [*claims.COLUMNS, "devices", "code_versions"]
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "tables" / "comparison.csv")[["variant", "top1"]],
        comparison(Results(folder))[["variant", "top1"]],
        rtol=1e-9,
    )


@pytest.mark.parametrize("which", ["folder", "broken", "single"])
def test_nothing_for_people_says_nan_or_inf(which, request):
    folder = request.getfixturevalue(which)
    texts = [_text(folder, "comparison.md"), _text(folder, "replication.md")]
    texts.append(re.sub(r"base64,[^\"]+", "", (folder / "report" / "index.html").read_text(encoding="utf-8")))
    for text in texts:
        assert not re.search(r"(?<![a-z])(nan|inf|infinite|None|NaT)(?![a-z])", text)
    for file in (folder / "figures").glob("*.svg"):
        assert not re.search(r">[^<]*(?<![a-z])(nan|inf|None)(?![a-z])[^<]*<", file.read_text(encoding="utf-8")), file


def test_notes_group_what_differs_in_numbers_alone(folder):
    text = _text(folder, "comparison.md")
    lines = [line for line in text.splitlines() if line.startswith("Training energy")]
    assert len(lines) == 1 and lines[0].count("estimate (") == 1
    assert "4.0 to 7.5 s" in lines[0] and "never ranked" in lines[0]
    assert "mWh" in text and "mgCO2e" in text and "e-06" not in text


def test_energy_of_a_device_that_others_used_too_is_a_bound(folder):
    results = Results(folder)
    frame = comparison(results)
    method = f"NVML (GPU by NVML counter 97%; {SHARED_COUNTERS}; 480.0 s; CodeCarbon)"
    frame.loc[frame["variant"] == "cnn", "training_energy_method"] = method
    header, rows = tables.comparison_cells(results, frame)
    energy = next(place for place, name in enumerate(header) if name.startswith("training") and name.endswith("Wh"))
    cells = {row[0]: (row[energy], row[energy + 1]) for row in rows}
    assert all(cell.startswith("≤ ") for cell in cells["cnn"])
    assert not any(cell.startswith("≤") for cell in cells["tcnn"]) and float(cells["tcnn"][0]) > 0
    notes = [note for note in tables.comparison_notes(results, frame) if note.startswith("Training energy")]
    assert len(notes) == 1 and "upper bounds" in notes[0]
    assert "upper bounds" not in _text(folder, "comparison.md")


def test_what_folding_saves_stands_below_the_comparison(tmp_path):
    folder = build(tmp_path, seeds=[0])
    for what, metric in (("evaluation", "macs"), ("cost", "latency_ratio")):
        file = folder / "metrics" / "lc_frozen_x8" / "seed0" / f"{what}.json"
        record = json.loads(file.read_text(encoding="utf-8"))
        plain = [row for row in record["rows"] if row["metric"] == metric]
        record["rows"] += [
            row | {"value": row["value"] / 4, "conditions": row["conditions"] | {"folded": "yes"}} for row in plain
        ]
        file.write_text(json.dumps(record), encoding="utf-8")
    results = Results(folder)
    frame = comparison(results).set_index("variant")
    notes = [note for note in tables.comparison_notes(results, frame.reset_index()) if note.startswith("Folded")]
    row = frame.loc["lc_frozen_x8"]
    ratio = words.with_interval(*(row[f"latency_ratio{k}"] / 4 for k in ("", "_low", "_high")), 2)
    wanted = f"`lc_frozen_x8` {words.number(row['macs'] / 4)} MACs, {ratio} of `cnn`'s latency"
    assert notes == [f"Folded for inference, the same function: {wanted}."]


# ------------------------------------------------------------------------------------------------------ words


def test_grouped_names_the_variants_of_each_way():
    assert words.grouped({"a": "RAPL; 7.2 s", "b": "RAPL; 12.0 s", "c": ""}) == ["RAPL; 7.2 to 12.0 s"]
    two = words.grouped({"a": "RAPL; 7 s", "b": "estimate; 7 s", "c": "estimate; 7 s"})
    assert two == ["RAPL; 7 s (a)", "estimate; 7 s (b, c)"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (19_800, "19.8 k"),
        (999_999, "1.00 M"),
        (3.09e6, "3.09 M"),
        (0.5, "0.500"),
        (2.5e-5, "2.50e-05"),
        (math.nan, "–"),
        (None, "–"),
        (math.inf, "–"),
    ],
)
def test_number(value, text):
    assert words.number(value) == text


def test_with_interval_never_prints_what_is_not_known():
    assert words.with_interval(93.456, 93.1, 93.8, 2) == "93.46 [93.10, 93.80]"
    assert words.with_interval(93.456, -math.inf, math.inf, 2) == "93.46"
    assert words.with_interval(0.22499999999999998, math.nan, math.nan, 2) == words.with_interval(0.225, None, None, 2)
    assert words.with_interval(-0.5, -0.75, 0.25, 2, sign=True, unit=" pp") == "−0.50 pp [−0.75, +0.25]"
    assert words.with_interval(0.00123, 0.0012, 0.00126) == "0.00123 [0.00120, 0.00126]"
    assert words.with_interval(math.nan, 1, 2) == "–"


def test_scaled_takes_one_prefix_a_column():
    factor, prefix = words.scaled(pd.Series([2.5e-6, 1e-7, math.nan]))
    assert (prefix, 2.5e-6 * factor) == ("m", pytest.approx(2.5))
    assert words.scaled(pd.Series([math.nan])) == (1.0, "k")
    assert words.scaled(pd.Series([12.0]))[1] == "k"


# --------------------------------------------------------------------------------------------------- findings


def _claim(**given) -> pd.Series:
    row = dict.fromkeys(claims.COLUMNS) | {"reason": "", "scope": "", "role": "primary", "claim_id": "x.y"}
    return pd.Series(row | given)


def test_found_speaks_the_language_of_the_claim():
    difference = {"claim_kind": "delta", "unit": "pp", "paper_value": 2.2, "direction": "higher"}
    row = _claim(**difference, delta=1.5, delta_ci_low=1.0, delta_ci_high=2.0, ours_mean=95.0)
    assert findings.found(row) == "+1.50 pp [+1.00, +2.00]" and findings.paper_says(row) == "+2.2 pp"
    cost = {"claim_kind": "cost", "unit": "ratio", "paper_value": 0.75}
    row = _claim(**cost, delta=0.05, delta_ci_low=0.02, delta_ci_high=0.08)
    assert findings.found(row) == "0.800 times [0.770, 0.830]" and findings.paper_says(row) == "0.75 times"
    row = _claim(
        claim_kind="ordering",
        unit="ratio",
        direction="lower",
        delta=-0.2,
        delta_ci_low=-0.3,
        delta_ci_high=-0.1,
    )
    assert findings.found(row) == "0.80 times [0.70, 0.90]" and findings.paper_says(row) == "lower"
    row = _claim(
        claim_kind="absolute",
        unit="%",
        paper_value=93.0,
        paper_spread=0.2,
        ours_mean=92.5,
        delta=-0.5,
        ours_ci_low=92.0,
        ours_ci_high=93.0,
    )
    assert findings.found(row) == "92.50 % [92.00, 93.00]" and findings.paper_says(row) == "93 ± 0.2 %"
    row = _claim(claim_kind="exact", unit="1", paper_value=0.0, ours_mean=2.5e-16, ours_n=1)
    assert findings.found(row) == "2.5e−16"
    assert findings.found(_claim(claim_kind="delta", unit="pp")) == "–"


def test_how_sure_names_the_evidence_or_the_reason():
    scope = "data: digits (paper: imagenet); epochs: 3 (paper: 300); reduced study: a; b; "
    scope += "the images are a lossy copy"
    row = _claim(
        verdict="supported",
        claim_kind="delta",
        unit="pp",
        margin=0.5,
        ours_n=3.0,
        reference_n=3.0,
        holm_p=0.0004,
        scope=scope,
    )
    text = findings.how_sure(row, reduced="a; b")
    assert text == (
        "3 runs each; margin 0.5 pp; p < 0.001 after Holm's correction; not as in the paper: data digits "
        "(the paper: "
        "imagenet), epochs; reduced study; the images are a lossy copy"
    )
    assert findings.how_sure(_claim(verdict="not run", reason="x is not in the study")) == "x is not in the study"


@pytest.mark.parametrize(
    ("low", "high", "said", "words"),
    [(5.9, 6.9, 16, "smaller than the paper's"), (-0.6, -0.1, -0.2, ""), (-9, -7, -2, "larger than the paper's")],
)
def test_how_sure_says_where_the_size_is_not_the_papers(low, high, said, words):
    """A cost of 6 points supports the direction of a claim of 16, and the table must not hide the difference."""
    facts = {"claim_kind": "delta", "unit": "pp", "margin": 0.1, "ours_n": 4.0, "reference_n": 4.0}
    facts |= {"paper_value": said, "delta_ci_low": low, "delta_ci_high": high}
    row = _claim(verdict="supported", **facts)
    assert findings.how_sure(row) == "; ".join(filter(None, ["4 runs each; margin 0.1 pp", words]))
    assert "paper's" not in findings.how_sure(_claim(verdict="inconclusive", reason="too wide", **facts))


def test_reasons_group_what_the_study_lacks():
    rows = [
        _claim(claim_id=f"p.{i}", verdict="not run", reason=f"{v} is not in the study") for i, v in enumerate("aab")
    ]
    rows.append(_claim(claim_id="p.3", verdict="failed", reason="out of memory"))
    found = findings.reasons(pd.DataFrame(rows))
    assert found == [
        ("not run", "not in the study: a (2), b", ["p.0", "p.1", "p.2"]),
        ("failed", "out of memory", ["p.3"]),
    ]


def test_replication_markdown_stays_readable(folder):
    text = _text(folder, "replication.md")
    frame = Results(folder).replication
    for claim in frame.loc[frame["role"] == "primary", "claim_id"]:
        assert f"| `{claim}` |" in text
    assert text.index("## Primary claims") < text.index("## Exploratory claims") < text.index("## All other claims")
    assert len(text.splitlines()) < 120 < len(frame)
    counted = sum(int(n) for n in re.findall(r"^- (\d+) \*\*", text, flags=re.MULTILINE))
    assert counted + len(re.findall(r"^\| `\w+\.", text, flags=re.MULTILINE)) == len(frame)  # no claim is lost


# ---------------------------------------------------------------------------------------------------- figures


def test_every_figure_is_drawn_twice(folder):
    drawn = {file.stem for file in (folder / "figures").glob("*.png")}
    assert set(FIGURES) <= drawn and drawn == {file.stem for file in (folder / "figures").glob("*.svg")}
    for name in drawn:
        text = (folder / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert "<text" in text and "<dc:date>" not in text


def test_axes_name_their_units(folder):
    for name, unit in (
        ("accuracy", "(%)"),
        ("accuracy_energy", "Wh / 1000 images"),
        ("claims_forest", "percentage points"),
    ):
        assert unit in (folder / "figures" / f"{name}.svg").read_text(encoding="utf-8"), name


def test_estimates_of_energy_get_no_front(folder):
    svg = (folder / "figures" / "accuracy_energy.svg").read_text(encoding="utf-8")
    assert "an estimate" in svg and figures.FRONT not in svg
    assert figures.FRONT in (folder / "figures" / "accuracy_latency.svg").read_text(encoding="utf-8")


def test_pareto_front():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([80.0, 90.0, 85.0, 95.0])
    assert figures.pareto(x, y, "low") == [(1.0, 80.0), (2.0, 90.0), (4.0, 95.0)]
    assert figures.pareto(x, y, "high") == [(4.0, 95.0)]
    assert figures.pareto(np.array([1.0, 1.0]), np.array([5.0, 6.0]), "low") == [(1.0, 6.0)]


def test_forest_says_when_nothing_is_decided(single, folder):
    words_ = "none of them is decided yet"
    assert words_ in (single / "figures" / "claims_forest.svg").read_text(encoding="utf-8")
    assert "no interval" in (single / "figures" / "claims_forest.svg").read_text(encoding="utf-8")
    assert words_ not in (folder / "figures" / "claims_forest.svg").read_text(encoding="utf-8")


def test_forest_puts_paper_and_margin_on_the_axis_of_its_panel():
    cost = {"claim_kind": "cost", "unit": "ratio", "paper_value": 0.75, "margin": 0.05}
    row = _claim(**cost, delta=0.05, delta_ci_low=0.02, delta_ci_high=0.08)
    assert forest._panel(row) == "ratios"
    assert forest._numbers(row, "ratios") == pytest.approx((0.80, 0.77, 0.83, 0.75, 0.75))
    row = _claim(claim_kind="absolute", unit="%", paper_value=93.0, delta=-0.5, delta_ci_low=-1.0, delta_ci_high=0.1)
    assert forest._panel(row) == "values" and forest._numbers(row, "values") == (-0.5, -1.0, 0.1, 0.0, 0.0)
    row = _claim(claim_kind="delta", unit="pp", paper_value=2.0, delta=1.0, delta_ci_low=0.5, delta_ci_high=1.5)
    assert forest._panel(row) == "differences" and forest._numbers(row, "differences") == (
        1.0,
        0.5,
        1.5,
        2.0,
        0.0,
    )


def test_nothing_measured_draws_nothing_and_still_reports(tmp_path):
    folder = build(tmp_path, missing=[(name, seed) for name in STUDY["variants"] for seed in (0, 1, 2)])
    tables.write(folder)
    results = Results(folder)
    assert all(function(results, comparison(results)) is None for function in figures.FIGURES)
    text = page.write(folder).read_text(encoding="utf-8")
    assert "0 could be decided" in text and "No run is in yet" in text


@pytest.mark.parametrize("count", [3, 30])
def test_marks_differ_and_text_stays_inside(tmp_path, count):
    variants = {"cnn": None} | {f"own_variant_with_a_name_{i:02d}": {"base": "cnn"} for i in range(count - 1)}
    folder = build(tmp_path, seeds=[0], variants=variants, images=50)
    results = Results(folder)
    table = comparison(results)
    looks = [tuple(style.look(place).values()) for place in range(count)]
    assert len(set(looks)) == count and len({tuple(map(str, style.line(p).values())) for p in range(count)}) == count
    crowded = (figures.accuracy, figures.accuracy_latency, figures.training_curves)
    for function in figures.FIGURES[1:] if count < 10 else crowded:
        figure = function(results, table)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.canvas.draw()
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        texts = [
            figure._suptitle,
            figure._supxlabel,
            *(text for legend in legends for text in legend.get_texts()),
        ]
        for text in texts:
            box, edges = text.get_window_extent(), figure.bbox
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= edges.x1 + 1 and box.y1 <= edges.y1 + 1
            assert inside, (function.__name__, text)
        for axes in figure.axes:
            assert axes.get_window_extent().width > 150 or axes.get_label() == "<colorbar>", function.__name__
            labels = [t.get_window_extent() for t in axes.get_yticklabels() if t.get_text()]
            for one, other in itertools.pairwise(labels):
                assert one.y1 <= other.y0 or other.y1 <= one.y0, function.__name__
        figures.plt.close(figure)


# ------------------------------------------------------------------------------------------------------- page


class _Outline(HTMLParser):
    """Collects what a page promises to people who do not see it, and what it would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.images, self.headers, self.links, self.open = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(attrs)
        if tag == "th":
            self.headers.append(attrs)
        self.links += [v for k, v in attrs.items() if k in ("src", "href") and not v.startswith("data:")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


def _outline(folder) -> tuple[str, _Outline]:
    text = (folder / "report" / "index.html").read_text(encoding="utf-8")
    outline = _Outline()
    outline.feed(text)
    assert not outline.open
    return text, outline


@pytest.mark.parametrize("which", ["folder", "broken", "single"])
def test_page_is_one_accessible_file(which, request):
    text, outline = _outline(request.getfixturevalue(which))
    assert "script" not in outline.tags and not outline.links and "http" not in re.sub(r"base64,[^\"]+", "", text)
    assert outline.images and all(len(image["alt"]) > 20 for image in outline.images)
    assert all(header.get("scope") in ("col", "row") for header in outline.headers)
    assert outline.tags.count("h1") == outline.tags.count("main") == 1 and 'lang="en"' in text
    assert "prefers-color-scheme:dark" in text


def test_page_answers_first(folder):
    text, _ = _outline(folder)
    frame = Results(folder).replication
    primary = frame[frame["role"] == "primary"]
    settled = int((~primary["verdict"].isin(page.OPEN)).sum())
    assert f"Of {len(primary)} main claims, {settled} could be decided here" in text
    assert text.index("main claims,") < text.index("What could not be decided") < text.index("Side by side")
    for _, row in primary.iterrows():
        assert row["claim_id"] in text and page.html.escape(row["statement"]) in text
    for word in set(frame["verdict"]):
        assert page.verdict(word) in text and findings.SIGNS[word] in page.verdict(word)


def test_page_folds_main_claims_of_other_studies(folder):
    """What a reader came for stands first; a claim about variants that the study lacks is there when unfolded."""
    text, _ = _outline(folder)
    frame = Results(folder).replication
    primary = frame[frame["role"] == "primary"]
    absent = primary[primary["reason"].fillna("").str.endswith("is not in the study")]
    assert 0 < len(absent) < len(primary)
    fold = text.index(f"<details><summary>{len(absent)} are about variants that this study does not have (")
    end = text.index("</details>", fold)
    for _, row in primary.iterrows():
        inside = fold < text.index(f"<code>{row['claim_id']}</code>") < end
        assert inside == (row["claim_id"] in set(absent["claim_id"])), row["claim_id"]


def test_page_escapes_what_it_shows(tmp_path):
    folder = build(tmp_path, seeds=[0], description='<b>bold</b> & "quoted"', reduced="<script>alert(1)</script>")
    text = page.write(folder).read_text(encoding="utf-8")
    assert "<script" not in text and "<b>bold" not in text and "&lt;script&gt;" in text


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_of_text_in_light_and_dark():
    schemes = re.findall(
        r"--ink:(#\w+);--paper:(#\w+).*?--soft:(#\w+);--back:(#\w+);--good:(#\w+);--bad:(#\w+);--news:(#\w+)",
        page.STYLE.replace("\n", ""),
    )
    assert len(schemes) == 2
    for ink, paper, soft, back, good, bad, news in schemes:
        full = [c if len(c) == 7 else "#" + "".join(2 * d for d in c[1:]) for c in (ink, soft, good, bad, news)]
        for ground in (paper, back):
            ground = ground if len(ground) == 7 else "#" + "".join(2 * d for d in ground[1:])
            for colour in full:
                light, dark = sorted((_luminance(colour), _luminance(ground)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (colour, ground)


# ------------------------------------------------------------------------------------------------------ whole


def test_same_bytes_twice_and_quickly(folder):
    before = _files(folder)
    started = time.process_time()
    _made(folder, papers=True)
    assert time.process_time() - started < 60
    assert _files(folder) == before and len(before) > 18


def test_stale_figures_disappear(tmp_path):
    folder = build(tmp_path, seeds=[0])
    (folder / "figures").mkdir()
    (folder / "figures" / "of_another_day.svg").write_text("old")
    assert _made(folder, drawn=FEW) and (folder / "figures" / "accuracy.svg").exists()
    assert not (folder / "figures" / "of_another_day.svg").exists()


def test_a_folder_without_a_study_is_told_in_one_line(tmp_path):
    with pytest.raises(config.ConfigError, match=r"study.json: missing; run the workflow, or unpack a bundle, first"):
        tables.write(tmp_path)
