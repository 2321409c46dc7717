"""Whatever stands in a study, a recipe, a ledger or a metrics file: it is read as it is, or one line says what is wrong.

Hypothesis writes the files. Never a traceback, never a value that nobody wrote.
"""

import copy
import json
from pathlib import Path

import pytest
import yaml
from house import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up import build

from convx import bundle, config, ledger
from convx.checks import ConfigError, parse_yaml
from convx.config import load_study, resolve
from convx.records import found_record, read_recipe, read_record, weights_failure
from convx.report import tables
from convx.report.results import Results

QUICK = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "cnn", "tcnn", "digits", "a\nb", "..", "/", "{}", "*", "\u2028", "1e-3", "nan", "null", "<b>"]
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.sampled_from([0, 1, 2.0, 1e999, 10**400, -0.0, 2**63, 1e-320, float("nan")]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)


def places(value, here=()) -> list[tuple]:
    """Return the path of every value in a nested one."""
    found = [here] if here else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, entry in inside for place in places(entry, (*here, key))]


@st.composite
def changed(draw, whole):
    """Draw a copy of a nested value in which one to three places hold something else, are gone, or have a neighbour."""
    new = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(new) or [("study",)]))
        node = new
        for key in path[:-1]:
            node = node[key]
        how = draw(st.sampled_from(["other", "gone", "more", "moved"]))
        if how == "gone":
            del node[path[-1]]
        elif how == "more" and isinstance(node, dict):
            node[draw(WORDS)] = draw(VALUES)
        elif how == "moved":
            node[path[-1]] = copy.deepcopy(draw(st.sampled_from([new, node, [node[path[-1]]], str(node[path[-1]])])))
        else:
            node[path[-1]] = draw(VALUES)
        if not new:
            break
    return new


def one_line(error: ConfigError, *starts: str) -> None:
    text = str(error)
    assert len(text.splitlines()) == 1 and len(text) > 10
    assert not starts or text.startswith(starts), text


# --------------------------------------------------------------------------------------------------------------- studies


@QUICK
@given(changed(TINY))
def test_a_study_is_loaded_as_it_is_written_or_refused_in_one_line(given_study):
    before = copy.deepcopy(given_study)
    try:
        study = load_study(given_study, "s.yaml")
        recipes = [resolve(study, name, seed) for name in study["variants"] for seed in config.seeds(study, name)[:1]]
    except ConfigError as error:
        one_line(error, "s.yaml: ", "convx/papers/")
        return
    kept(before, study)  # nothing that was written has become something else
    json.dumps([study, recipes], allow_nan=False)


def kept(written, found, here: str = "") -> None:
    """Every value that was written stands in what was loaded."""
    if isinstance(written, dict):
        for key, value in written.items():
            if here == ".variants" and value is None:
                assert found[key] == {}
            else:
                kept(value, found[key], f"{here}.{key}")
    else:
        assert found == written and type(found) is type(written), here


@QUICK
@given(st.one_of(st.text(max_size=60), VALUES, st.binary(max_size=40)))
def test_any_text_as_a_study_file(tmp_path, content):
    file = tmp_path / "study.yaml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", errors="ignore")
    with pytest.raises(ConfigError) as error:  # nothing so short is a study
        load_study(file)
    one_line(error.value, str(file))


@pytest.mark.parametrize(
    "text, words",
    [
        ("study: a\nseeds: [0]\nseeds: [1]\n", "line 3: the key 'seeds' stands twice"),
        ("variants: {cnn: {}, cnn: {recipe: x}}\n", "line 1: the key 'cnn' stands twice"),
        ("a: &x [*x]\n", "holds itself|undefined alias|recursive"),
        ("a: &x {b: *x}\n", "holds itself|undefined alias|recursive"),
        ("lr: .nan\n", "lr: nan is not a finite number"),
        ("recipes: {train: {lr: .inf}}\n", "recipes.train.lr: inf is not a finite number"),
        ("when: 2024-01-01\n", "when: .* is date; put it in quotes"),
        ("when: 2024-13-77\n", "not valid YAML"),
        ("1: 2\n", "the key 1 should be a word"),
        ("? [a, b]\n: c\n", "not valid YAML|should be a word"),
        ("a: !!python/object/apply:os.system [exit 3]\n", "not valid YAML: could not determine a constructor"),
        ("a: !!binary aGk=\n", "a: b'hi' is bytes"),
        ("a: !!set {b}\n", "a: .* is set"),
        ("a: " + "[" * 3000 + "\n", "nested too deeply|not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        (b"a: \xff\xfe", "not valid YAML"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{chr(98 + k)}: &{chr(98 + k)} [{','.join(['*' + chr(97 + k)] * 9)}]\n" for k in range(12)
        ), "stands for more than 200,000 values"),
    ],
    ids=range(17),
)  # fmt: skip
def test_what_yaml_would_take_silently(text, words, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=words) as error:
        load_study(file)
    one_line(error.value, str(file))


def test_numbers_that_yaml_and_json_schema_mistake():
    for changes, words in (
        ({"epochs": 2.0}, "epochs: 2.0 should be of type integer"),
        ({"lr": "1e-3"}, "lr: '1e-3' should be of type number"),
        ({"lr": True}, "lr: True should be of type number"),
        ({"lr": float("nan")}, "lr: nan is not a finite number"),
        ({"lr": 10**400}, "lr: a whole number of 1329 bits; 63 are the most"),
        ({"seed": 1}, "unknown key 'seed'"),
    ):
        study = copy.deepcopy(TINY)
        study["recipes"]["train"] |= changes
        with pytest.raises(ConfigError, match=words):
            load_study(study, "s.yaml")


# --------------------------------------------------------------------------------------------------------------- recipes

RECIPE = resolve(load_study(copy.deepcopy(TINY)), "tcnn", 0)


@QUICK
@given(changed(RECIPE))
def test_a_changed_recipe_is_refused_or_means_the_same(tmp_path, recipe):
    file = tmp_path / "seed0.json"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    try:
        found = read_recipe(file)
    except ConfigError as error:
        one_line(error, str(file))
        return
    assert config.recipe_digest(found) == found["digest"]


def test_a_whole_recipe_is_read(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RECIPE))
    assert read_recipe(tmp_path / "r.json") == RECIPE
    for cut in (0, 1, 700):
        (tmp_path / "r.json").write_text(json.dumps(RECIPE)[:cut])
        with pytest.raises(ConfigError, match=r"is empty|not readable as JSON"):
            read_recipe(tmp_path / "r.json")


# --------------------------------------------------------------------------------------------------------------- ledgers

CLAIMS = parse_yaml((ledger.PAPERS / "tcnn" / "claims.yaml").read_bytes(), "claims")[:3]


@QUICK
@given(changed(CLAIMS))
def test_a_ledger_is_read_as_it_is_written_or_refused_in_one_line(tmp_path, claims):
    folder = tmp_path / "tcnn"
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text((ledger.PAPERS / "tcnn" / "README.md").read_text())
    (folder / "claims.yaml").write_text(yaml.safe_dump(claims, allow_unicode=True), encoding="utf-8")
    try:
        found = ledger.load_ledgers(["tcnn"], tmp_path)
    except ConfigError as error:
        one_line(error, "convx/papers/tcnn/claims.yaml: ")
        return
    for written, read in zip(claims, found, strict=True):
        assert all(read[key] == value for key, value in written.items())


# --------------------------------------------------------------------------------------------------------------- metrics


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("fuzz"), variants={"cnn": None, "cnn_frozen": None}, seeds=[0], images=20)


@pytest.fixture(scope="module")
def evaluation(results) -> dict:
    record = json.loads((results / "metrics" / "cnn" / "seed0" / "evaluation.json").read_text())
    return record | {"rows": record["rows"][:3]}


@QUICK
@given(st.data())
def test_a_metrics_file_is_read_as_it_is_or_becomes_a_failed_record(results, evaluation, data):
    record = data.draw(changed(evaluation))
    file = results / "metrics" / "cnn" / "seed0" / "evaluation.json"
    file.write_text(json.dumps(record), encoding="utf-8")
    try:
        found = read_record(file, "cnn", 0)
        assert found == record
    except ConfigError as error:
        one_line(error, str(file))
        found = found_record(file, "cnn", 0, Results(results).study)
        assert found["status"] == "failed" and "evaluation.json cannot be used" in found["reason"]
    frame = Results(results).runs
    assert set(frame["variant"]) == {"cnn", "cnn_frozen"}
    status, reason = Results(results).status("cnn")
    if not Results(results).strangers:  # what another recipe made is left out
        assert (status == "failed") == (found["status"] == "failed")
    assert status == "ok" or reason


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"{", b"null", b"[]", b'{"rows": []}', b"\xff\xfe{}", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[" * 9000,
     b'{"a": ' + b"9" * 5000 + b"}"],
    ids=range(11),
)  # fmt: skip
def test_a_table_is_built_over_a_metrics_file_that_is_none(tmp_path, content):
    folder = build(tmp_path, variants={"cnn": None, "cnn_frozen": None}, seeds=[0], images=20)
    file = folder / "metrics" / "cnn_frozen" / "seed0" / "evaluation.json"
    file.write_bytes(content)
    tables.write(folder)
    text = (folder / "tables" / "comparison.md").read_text()
    assert "| `cnn_frozen` | failed: seed 0, evaluation: evaluation.json cannot be used: " in text
    assert "| `cnn` | ok |" in text
    assert "evaluation: forgotten (evaluation.json cannot be used" in "".join(bundle.retry(folder))
    assert not file.exists() and Results(folder).status("cnn_frozen") == ("not run", "no evaluation")


def test_payloads_that_are_bombs_or_cut_off(tmp_path):
    import base64
    import zlib

    folder = build(tmp_path, variants={"cnn": None}, seeds=[0], images=20)
    file = folder / "metrics" / "cnn" / "seed0" / "evaluation.json"
    record = json.loads(file.read_text())
    bomb = base64.b64encode(zlib.compress(bytes(50_000_000), 9)).decode()
    for change, words in (
        ({"data": bomb}, "holds more than its 3 bytes"),
        ({"data": record["per_image"]["correct"]["data"][:-6]}, "is damaged|holds fewer"),
        ({"n": 21_000}, "holds fewer than its 2,625 bytes"),
        ({"n": 10**12}, "is no size"),
        ({"n": -1}, "is no size"),
        ({"dtype": "object"}, "'object' is none of bool, uint8"),
        ({"data": "?"}, "is damaged"),
    ):
        broken = copy.deepcopy(record)
        broken["per_image"]["correct"] |= change
        file.write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match=rf"per_image\.correct: .*({words})"):
            read_record(file)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_as_weights(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert isinstance(weights_failure(file), str)


@QUICK
@given(st.data())
def test_any_bytes_as_a_bundle(results, tmp_path, data):
    packed = tmp_path / "b.tar.gz"
    if not packed.exists():
        bundle.pack(build(tmp_path / "x", variants={"cnn": None}, seeds=[0], images=5), packed)
    whole = packed.read_bytes()
    broken = tmp_path / "broken.tar.gz"
    place, new = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.binary(max_size=30))
    broken.write_bytes(data.draw(st.sampled_from([new, whole[:place] + new + whole[place + len(new) :]])))
    try:
        bundle.unpack(broken, tmp_path / "results")
    except ConfigError as error:
        one_line(error, str(broken))
    assert not [p for p in tmp_path.glob("results/*") if p.name != "made_up"]
