"""The real Snakefile, end to end on a tiny study: what it makes, what it makes again, and what it leaves alone."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from house import REPOSITORY, TINY, House, clone

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> House:
    """Return a house in which the tiny study has run to its end."""
    house = House.build(tmp_path_factory.mktemp("finished") / "house")
    result = house.snakemake()
    assert result.returncode == 0, result.stdout[-6000:]
    return house


@pytest.fixture
def house(finished, tmp_path) -> House:
    """Return a copy of the finished house that a test may change."""
    return clone(finished, tmp_path / "house")


def sha(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def accuracy_rows(house):
    frame = pd.read_csv(house.results("tables", "runs.csv"))
    return frame[frame["what"].eq("evaluation") & frame["unit"].eq("%")].reset_index(drop=True)


def test_everything_is_made(finished):
    for variant in TINY["variants"]:
        for what in ("training", "evaluation", "cost"):
            record = json.loads(finished.results("metrics", variant, "seed0", f"{what}.json").read_text())
            assert record["status"] == "ok", record["reason"]
            assert record["rows"]
            assert record["recipe_digest"]
            assert record["source_digest"]
            assert record["environment"]["packages"]["torch"]
    for table in ("runs.csv", "comparison.csv", "comparison.md", "replication.csv", "replication.md"):
        assert finished.results("tables", table).stat().st_size > 100
    comparison = pd.read_csv(finished.results("tables", "comparison.csv"))
    assert list(comparison["variant"]) == list(TINY["variants"])
    wanted = [
        "parameters",
        "macs",
        "top1",
        "corruption",
        "latency_ms",
        "latency_ratio",
        "inference_kwh",
        "training_kgco2e",
    ]
    assert comparison[wanted].notna().all().all()
    assert set(comparison["status"]) == {"ok"}
    replication = pd.read_csv(finished.results("tables", "replication.csv"))
    decided = [
        "replicated",
        "higher",
        "lower",
        "supported",
        "contradicted",
        "no relevant difference",
        "exact",
        "differs",
    ]
    assert replication["verdict"].notna().all()
    assert replication.loc[~replication["verdict"].isin(decided), "reason"].fillna("").str.len().gt(3).all()
    names = {file.name for file in finished.results("figures").iterdir()}
    for figure in (
        "accuracy",
        "corruption_heatmap",
        "accuracy_latency",
        "accuracy_energy",
        "clean_against_corrupted",
        "training_curves",
    ):
        assert {f"{figure}.svg", f"{figure}.png"} <= names
    page = finished.results("report", "index.html").read_text()
    assert "does it hold up?" in page
    assert "Reduced study" in page
    assert not list((finished.root / "resources" / "progress").iterdir())


def test_tcnn_at_epoch_0_is_the_cnn(finished):
    cnn = pd.read_csv(finished.results("histories", "cnn", "seed0.csv"))
    tcnn = pd.read_csv(finished.results("histories", "tcnn", "seed0.csv"))
    assert tcnn["validation_top1"].iloc[0] == cnn["validation_top1"].iloc[-1]
    assert tcnn["validation_loss"].iloc[0] == pytest.approx(cnn["validation_loss"].iloc[-1], rel=1e-4)


def test_a_second_run_has_nothing_to_do(finished):
    result = finished.snakemake()
    assert result.returncode == 0
    assert "Nothing to be done" in result.stdout


def test_a_learning_rate_reruns_its_variant_and_what_starts_from_it(house):
    house.study["variants"]["tcnn"] = {"training": {"lr": 0.001}}
    planned = house.planned()
    assert {variant for rule, variant in planned if variant} == {"tcnn"}
    assert ("train", "tcnn") in planned
    assert ("evaluate", "tcnn") in planned
    house.study["variants"]["tcnn"] = None
    house.study["variants"]["cnn"] = {"training": {"lr": 0.06}}
    trained = {variant for rule, variant in house.planned() if rule == "train"}
    assert trained == {"cnn", "cnn_finetuned", "tcnn"}


def test_another_evaluation_trains_nothing(house):
    house.study["evaluate"]["attacks"]["epsilons"] = [1, 2]
    planned = house.planned()
    assert {rule for rule, _ in planned} >= {"evaluate", "tables"}
    assert "train" not in {rule for rule, _ in planned}
    assert "measure" not in {rule for rule, _ in planned}


def test_white_space_and_comments_rerun_nothing(house):
    house.edit(
        "workflow/rules/train.smk",
        '        "convx train {input.recipe}',
        '        "convx  train {input.recipe}',
    )
    house.edit("workflow/rules/evaluate.smk", "rule evaluate:", "# a comment\nrule evaluate:")
    house.edit("convx/layers/gpsa.py", '"""', '"""Another docstring. ')
    house.edit("convx/training.py", "import csv\n", "import csv\n\n# a comment\n")
    assert house.planned() == []


def test_an_edit_in_a_layer_reruns_the_variants_of_its_paper_alone(house):
    path = house.root / "convx" / "layers" / "gpsa.py"
    path.write_text(path.read_text() + "\nADDED = 1\n")
    planned = house.planned()
    assert {variant for rule, variant in planned if rule in ("train", "measure")} == {"tcnn"}
    # The control has no such layer, but the paper's evaluator, which uses the layer's functions, looks at it too.
    assert {variant for rule, variant in planned if rule == "evaluate"} == {"tcnn", "cnn_finetuned"}


def test_an_edit_in_the_loop_reruns_every_training(house):
    path = house.root / "convx" / "training.py"
    path.write_text(path.read_text() + "\nADDED = 1\n")
    assert {variant for rule, variant in house.planned() if rule == "train"} == set(TINY["variants"])


def test_a_new_variant_trains_alone(house):
    house.study["variants"]["cnn_frozen"] = None
    assert {variant for rule, variant in house.planned() if variant} == {"cnn_frozen"}


def bare(finished, root) -> House:
    """Return a house with the code, the metrics and the histories of a finished one, as a fresh clone has them."""
    new = House.build(root)
    for part in ("metrics", "histories"):
        shutil.copytree(finished.results(part), new.results(part))
    shutil.copy(finished.results("exact.json"), new.results("exact.json"))
    return new


def test_figures_and_report_from_metrics_alone(finished, tmp_path):
    house = bare(finished, tmp_path / "bare")
    planned = {rule for rule, _ in house.planned("figures")}
    assert planned == {"study", "tables", "figures_drawn", "figures"}
    result = house.snakemake("figures", "report")
    assert result.returncode == 0, result.stdout
    files = [
        *sorted(house.results("figures").iterdir()),
        *sorted(house.results("tables").iterdir()),
        house.results("report", "index.html"),
    ]
    first = {file.name: sha(file) for file in files if file.is_file() and not file.name.startswith(".")}
    assert len(first) > 15
    shutil.rmtree(house.results("figures"))
    shutil.rmtree(house.results("tables"))
    shutil.rmtree(house.results("report"))
    assert house.snakemake("figures", "report").returncode == 0
    assert {file.name: sha(file) for file in files if file.is_file() and not file.name.startswith(".")} == first
    for name in ("comparison.csv", "replication.csv", "runs.csv"):
        assert sha(house.results("tables", name)) == sha(finished.results("tables", name))


def test_one_missing_metric_schedules_no_training_for_figures(finished, tmp_path):
    house = bare(finished, tmp_path / "bare")
    shutil.rmtree(house.results("metrics", "tcnn"))
    assert {rule for rule, _ in house.planned("figures")} == {"study", "tables", "figures_drawn", "figures"}
    assert ("train", "tcnn") in house.planned()
    assert house.snakemake("figures").returncode == 0
    table = pd.read_csv(house.results("tables", "comparison.csv")).set_index("variant")
    assert table.loc["tcnn", "status"] == "not run"


def test_snakemakes_own_report(finished, tmp_path):
    house = clone(finished, tmp_path / "house")
    result = house.snakemake("--report", "report.html")
    assert result.returncode == 0, result.stdout
    text = (house.root / "report.html").read_text()
    assert "corruption_heatmap" in text
    assert "replication" in text


def test_a_failing_run_keeps_its_row_and_can_be_retried(tmp_path):
    house = House.build(tmp_path / "house")
    house.study["variants"] = {
        "cnn": None,
        "lc_frozen_x8": {"training": {"lr": 1e30, "optimizer": "momentum"}},
    }
    house.study["evaluate"] = {}
    result = house.snakemake()
    assert result.returncode == 0, result.stdout
    table = pd.read_csv(house.results("tables", "comparison.csv")).set_index("variant")
    assert table.loc["cnn", "status"] == "ok"
    assert table.loc["lc_frozen_x8", "status"] == "failed"
    assert "not finite in epoch" in table.loc["lc_frozen_x8", "reason"]
    assert "Nothing to be done" in house.snakemake().stdout
    command = [sys.executable, "-m", "convx", "retry", "results/tiny", "lc_frozen_x8"]
    done = subprocess.run(command, cwd=house.root, env=house.environment, capture_output=True, text=True)
    assert "forgotten" in done.stdout
    assert {variant for rule, variant in house.planned() if variant} == {"lc_frozen_x8"}


def test_the_same_study_twice_gives_the_same_accuracies(finished, tmp_path):
    house = House.build(tmp_path / "house")
    house.study["variants"] = {"cnn": None, "tcnn": None}
    house.study["evaluate"].pop("latency")
    house.study["evaluate"].pop("energy")
    assert house.snakemake().returncode == 0
    ours, theirs = accuracy_rows(house), accuracy_rows(finished)
    theirs = theirs[theirs["variant"].isin(["cnn", "tcnn"])].reset_index(drop=True)
    columns = ["variant", "seed", "metric", "value", "corruption", "severity", "epsilon"]
    pd.testing.assert_frame_equal(ours[columns], theirs[columns])


def test_a_partial_start_takes_a_kept_epoch(tmp_path):
    house = House.build(tmp_path / "house")
    house.study["recipes"]["train"]["checkpoints"] = [1]
    house.study["variants"] = {"cnn": None, "cnn_finetuned": {"at_epoch": 1}}
    house.study["evaluate"] = {}
    result = house.snakemake()
    assert result.returncode == 0, result.stdout
    cnn = pd.read_csv(house.results("histories", "cnn", "seed0.csv")).set_index("epoch")
    tuned = pd.read_csv(house.results("histories", "cnn_finetuned", "seed0.csv")).set_index("epoch")
    assert tuned.loc[0, "validation_top1"] == cnn.loc[1, "validation_top1"]
    assert tuned.loc[0, "validation_loss"] == pytest.approx(cnn.loc[1, "validation_loss"], rel=1e-6)


def test_a_step_that_dies_leaves_a_partial_table(tmp_path):
    """Snakemake fails when a process dies; `onerror` still writes the table from the metrics that exist."""
    house = House.build(tmp_path / "house")
    house.study["variants"], house.study["evaluate"] = {"cnn": None}, {}
    house.edit("convx/evaluate/accuracy.py", "def run(", "raise SystemError('a broken evaluator')\n\n\ndef run(")
    result = house.snakemake()
    assert result.returncode != 0
    assert "a broken evaluator" in result.stdout  # show-failed-logs
    table = pd.read_csv(house.results("tables", "comparison.csv")).set_index("variant")
    assert table.loc["cnn", "status"] == "not run"


def test_timing_owns_the_machine_and_is_done_once_a_variant(finished):
    house_plan = finished.snakemake("--dry-run", "--forceall")
    jobs = re.split(r"\n(?=(?:local)?rule )", house_plan.stdout)
    measured = [job for job in jobs if re.match(r"(?:local)?rule measure:", job)]
    assert len(measured) == len(TINY["variants"])
    assert all("threads: 2" in job for job in measured)  # 10000, capped to the cores given
    trained = [job for job in jobs if re.match(r"(?:local)?rule train:", job)]
    assert trained and not any("threads: 2" in job for job in trained)


def test_the_default_profile_and_the_rules_keep_the_pattern():
    import yaml

    profile = yaml.safe_load((REPOSITORY / "profiles" / "default" / "profile.yaml").read_text())
    assert profile["rerun-triggers"] == ["mtime", "params", "input", "software-env"]
    assert all(profile[key] is True for key in ("keep-going", "rerun-incomplete", "nolock"))
    assert profile["resources"]["gpu"] == 1
    rules = "".join(path.read_text() for path in (REPOSITORY / "workflow").rglob("*.smk"))
    assert "ancient(" not in rules
    assert "lambda" not in rules
    assert "threads: 10000" in rules
    lock = (REPOSITORY / "envs" / "requirements.lock").read_text()
    assert "executor-plugin-slurm" not in lock


def test_a_users_operator_beside_the_controls(house):
    """`convx compare` takes over what the study has: the user's variant alone is trained."""
    (house.root / "mine.py").write_text(
        "from torch import nn\n\n\ndef dropped(model):\n    model.fc = nn.Sequential(nn.Dropout(0.1), model.fc)\n    return model\n"
    )
    house.write()
    command = [sys.executable, "-m", "convx", "compare", "--study", "config/tiny.yaml", "--surgery", "mine.py:dropped"]
    result = subprocess.run(
        [*command, "--name", "dropped", "--cores", "2"],
        cwd=house.root,
        env=house.environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "`dropped`" in result.stdout
    results = house.root / "results" / "tiny_dropped"
    table = pd.read_csv(results / "tables" / "comparison.csv").set_index("variant")
    assert list(table.index) == [*TINY["variants"], "dropped"]
    assert set(table["status"]) == {"ok"}
    logs = house.root / "logs" / "tiny_dropped"
    assert [path.name for path in (logs / "train").glob("*.log")] == ["dropped.seed0.log"]
    assert [path.name for path in (logs / "measure").glob("*.log")] == ["dropped.seed0.log"]
    (house.root / "mine.py").write_text((house.root / "mine.py").read_text().replace("0.1", "0.2"))
    again = subprocess.run(
        [*command, "--name", "dropped", "--dry-run"],
        cwd=house.root,
        env=house.environment,
        capture_output=True,
        text=True,
    )
    assert "rule train" in again.stdout + again.stderr  # an edit in the user's file counts
