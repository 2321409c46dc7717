"""What the repository publishes is what its results say: README's result section and docs/results.md."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from house import REPOSITORY
from made_up import build

from convx import cli
from convx.config import ConfigError
from convx.manifest import read_json, write_json
from convx.report import published, tables

GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return a small repository with one committed study of which a run is missing."""
    root = tmp_path_factory.mktemp("published")
    (root / "docs").mkdir()
    for name in ("README.md", ".gitignore"):
        shutil.copy(REPOSITORY / name, root / name)
    folder = build(root / "results", images=120, missing=[("tcnn", 2)])
    exact = {"convx.papers.randconv.exact:fold_error": {"value": 3e-15}}
    write_json(folder / "exact.json", exact)
    tables.write(folder)
    published.write(root)
    return root


@pytest.fixture
def root(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def section(root: Path) -> str:
    text = (root / "README.md").read_text()
    return text.split(published.BEGIN)[1].split(published.END)[0]


# ------------------------------------------------------------------------------------------------------------- this repository


def test_readme_and_results_are_in_step_with_the_committed_studies():
    assert all("unchanged" in line or line.startswith("left out") for line in published.write(REPOSITORY, check=True))


def test_no_result_is_typed_into_the_readme():
    text = (REPOSITORY / "README.md").read_text()
    outside = text.split(published.BEGIN)[0] + text.split(published.END)[1]
    found = re.findall(r"[\d.]+ ?(?:%|pp\b|images/s|core-hours|ms\b|Wh\b)", outside)
    assert not found


# --------------------------------------------------------------------------------------------------------------- made-up studies


def test_nothing_run_is_said_as_it_is(tmp_path):
    for name in ("README.md", ".gitignore"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "docs").mkdir()
    build(tmp_path / "results", images=20, study="quick")  # git-ignored: not published
    tables.write(tmp_path / "results" / "quick")
    published.write(tmp_path)
    assert section(tmp_path).strip() == published.NOTHING.strip()
    assert "has been run" in (tmp_path / "docs" / "results.md").read_text()


def test_numbers_are_those_of_the_tables(finished):
    frame = pd.read_csv(finished / "results" / "made_up" / "tables" / "replication.csv").set_index("claim_id")
    claim = "randconv.frozen_costs_basic_block"
    value, low, high = frame.loc[claim, ["delta", "delta_ci_low", "delta_ci_high"]]
    line = next(line for line in section(finished).splitlines() if f"`{claim}`" in line)
    assert f"+{value:.2f} pp [+{low:.2f}, +{high:.2f}]" in line and "**supported**" in line and "+16 pp" in line
    page = (finished / "docs" / "results.md").read_text()
    assert f"[+{value:.2f} pp (+{low:.2f}, +{high:.2f})](#runs-made_up-cnn)" in page
    counts = frame[frame["claim_kind"] != "exact"]["verdict"].value_counts()
    assert f"{counts['supported']} supported" in section(finished) and "| 17 of 18 |" in section(finished)
    assert "1 exact" in section(finished) and "## Computed claims" in page and "exact.json" in page


def test_every_link_leads_somewhere(finished):
    for file in ("README.md", "docs/results.md"):
        text = section(finished) if file == "README.md" else (finished / file).read_text()
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert links
        for link in links:
            path, _, anchor = link.partition("#")
            target = (finished / file).parent / path if path else finished / file
            if path.startswith("../config/"):
                continue  # the made-up study has no file
            assert target.exists(), link
            if anchor:
                body = target.read_text()
                heads = {
                    line.lstrip("# ").lower().replace(" ", "-") for line in body.splitlines() if line.startswith("#")
                }
                assert f'id="{anchor}"' in body or anchor in heads, link


def test_every_number_has_its_runs_recipe_and_command(finished):
    text = (finished / "docs" / "results.md").read_text()
    manifest = read_json(finished / "results" / "made_up" / "manifest.json")
    assert len(manifest["runs"]) == 17 * 2 + 6
    for run in manifest["runs"]:
        assert f"(../results/made_up/{run['file']})" in text
        assert run["recipe_digest"] and run["command"] and run["device"].startswith("Made-up CPU")
    for variant, recipe in manifest["recipes"].items():
        assert (
            f"`{recipe['digest']}`" in text
            and f"`snakemake {variant}_seed0 --cores 1 --configfile config/made_up.yaml`" in text
        )
        assert {r["recipe_digest"] for r in manifest["runs"] if r["variant"] == variant and r["seed"] == 0} == {
            recipe["digest"]
        }


def test_an_incomplete_claim_shows_no_number_and_what_it_costs(root):
    line = next(line for line in section(root).splitlines() if "`tcnn.top1_gain_controlled`" in line)
    assert "| – | **incomplete** | 2 of 3 seeds of tcnn" in line
    need = {
        "tcnn.top1_gain_controlled": {"slots": 1, "core_hours": 0.75},
        "dcls.top1_gain": {"slots": 9, "core_hours": None},
    }
    costs = {"machine": "Made-up CPU", "studies": {"made_up": {"file": "config/m.yaml", "claims": need}}}
    write_json(root / published.COSTS, costs)
    published.write(root)
    line = next(line for line in section(root).splitlines() if "`tcnn.top1_gain_controlled`" in line)
    assert "missing: 1 slots of `config/m.yaml`, 0.8 core-hours (Made-up CPU)" in line
    line = next(line for line in section(root).splitlines() if "`dcls.top1_gain`" in line)
    assert "**not run**" in line and "9 slots of `config/m.yaml`, at a cost that was not measured" in line
    line = next(line for line in section(root).splitlines() if "`sere.improves_knn`" in line)
    assert "no study of `config/` decides it yet" in line


def test_writing_again_changes_nothing_and_what_is_typed_is_noticed(root, capsys, monkeypatch):
    before = {f: (root / f).read_bytes() for f in ("README.md", "docs/results.md")}
    assert all("unchanged" in line for line in published.write(root))
    assert before == {f: (root / f).read_bytes() for f in before}
    text = (root / "README.md").read_text()
    (root / "README.md").write_text(text.replace("**supported**", "**contradicted**"))
    monkeypatch.chdir(root)
    assert cli.main(["results", "--check"]) == 2
    assert "README.md: not in step with results/; `convx results` writes it" in capsys.readouterr().err
    assert cli.main(["results"]) == 0
    assert (root / "README.md").read_text() == text


def test_what_stands_around_the_section_stays(root):
    text = (root / "README.md").read_text()
    (root / "README.md").write_text("before\n" + text + "after\n")
    published.write(root)
    assert (root / "README.md").read_text() == "before\n" + text + "after\n"
    (root / "README.md").write_text(text.replace(published.END, ""))
    with pytest.raises(ConfigError, match="should stand in it once"):
        published.write(root)


def test_only_what_is_in_git_is_published(root):
    subprocess.run([*GIT, "init", "-q", "."], cwd=root, check=True)
    assert published.committed(root) == []
    lines = published.write(root)
    assert lines[-1] == "left out, as git does not know them (git add results/<study>): made_up"
    assert published.NOTHING.strip() in section(root)
    subprocess.run(["git", "add", "results"], cwd=root, check=True)
    published.write(root)
    assert "| [made_up]" in section(root)


def test_a_shortened_study_says_so_and_how_to_repeat_it(root):
    folder = build(root / "results", images=20, variants={"cnn": None, "cnn_frozen": None}, scale=0.5)
    tables.write(folder)
    published.write(root)
    assert "[made_up_scale50](docs/results.md#made_up_scale50)" in section(root)
    assert "*Reduced: nothing was trained; a few made-up images, for tests; every schedule times 0.5" in section(root)
    text = (root / "docs" / "results.md").read_text()
    assert "`snakemake cnn_seed0 --cores 1 --configfile config/made_up.yaml --config scale=0.5`" in text


# ------------------------------------------------------------------------------------------------------------------ what is pooled


def test_tables_name_devices_and_code_versions_and_leave_other_recipes_out(tmp_path):
    folder = build(tmp_path, images=60, variants={"cnn": None, "cnn_frozen": None})
    for file in folder.glob("metrics/cnn/seed1/*.json"):
        record = read_json(file)
        record["environment"] |= {"device_name": "Made-up GPU"}
        write_json(file, record | {"source_digest": "t"})
    for file in folder.glob("metrics/cnn_frozen/seed2/*.json"):
        write_json(file, read_json(file) | {"recipe_digest": "0123456789abcdef"})
    tables.write(folder)
    compared = pd.read_csv(folder / "tables" / "comparison.csv").set_index("variant")
    assert compared.loc["cnn", "devices"] == "Made-up CPU, torch 0.0 (2), Made-up GPU, torch 0.0 (1)"
    assert compared.loc["cnn", "code_versions"] == "training s (2), t (1); evaluation s (2), t (1)"
    assert compared.loc["cnn_frozen", "seeds_done"] == 2 and compared.loc["cnn_frozen", "status"] == "incomplete"
    claims = pd.read_csv(folder / "tables" / "replication.csv").set_index("claim_id")
    row = claims.loc["randconv.frozen_costs_basic_block"]
    assert row["verdict"] == "incomplete" and row["reason"] == "2 of 3 seeds of cnn_frozen"
    assert "Made-up GPU" in row["devices"] and "training s (4), t (1)" in row["code_versions"]
    for name in ("comparison.md", "replication.md"):
        text = (folder / "tables" / name).read_text()
        assert (
            "Made-up CPU, torch 0.0 (2), Made-up GPU, torch 0.0 (1); pooled over versions of the code: training s (2)"
            in text
        )
        assert "another recipe than the study's made them: cnn_frozen seed2" in text
    files = [run["file"] for run in json.loads((folder / "manifest.json").read_text())["runs"]]
    assert files and not any(file.startswith("metrics/cnn_frozen/seed2") for file in files)
