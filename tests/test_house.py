"""The order of the house: imports point downward, torch stays out of the workflow, files stay short."""

import ast
import re
import subprocess
import sys

import pytest
from house import REPOSITORY

from convx import VERBS

PACKAGE = REPOSITORY / "convx"
# A module may import from its own storey and from lower ones.
STOREYS = {
    0: [
        "seeds",
        "arguments",
        "source",
        "manifest",
        "devices",
        "locking",
        "statistics",
        "intervals",
        "resampling",
        "config",
        "scale",
        "teachers",
        "declarations",
        "checks",
        "distributed",
        "layers",
    ],
    1: ["models", "plan", "records", "bundle", "merge"],
    2: ["surgery", "replacing"],
    3: ["objectives", "data"],
    4: ["runs", "training"],
    5: ["evaluate"],
    6: ["papers"],
    7: ["claims", "ledger", "evidence", "verdicts"],
    8: ["report"],
    9: ["cli", "__main__", "steps", "explain", "bench", "calibrate", "compare", "pace", "slots", "queue"],
}
RANK = {name: rank for rank, names in STOREYS.items() for name in names}
# What the check of a study reads, all without torch: names of models, data sets and corruptions, and where weights are.
FACTS = {"convx", "convx.models", "convx.models.pretrained", "convx.data.sets", "convx.data.corruptions.constants"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Return the convx modules that a file imports anywhere, as dotted names."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "convx"}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "convx":
            for alias in node.names:
                path = PACKAGE.parent.joinpath(*node.module.split("."), alias.name)
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    assert parts[0] in RANK, f"{file.name} has no storey; put it into STOREYS"
    # The figures of a paper's folder are drawn by the report and stand beside it.
    own = RANK["report"] if parts[0] == "papers" and parts[-1] in ("figures", "pictures") else RANK[parts[0]]
    for name in imported(ast.parse(file.read_text())) - FACTS:
        other = name.split(".")[1]
        assert RANK[other] <= own, f"{'.'.join(parts)} imports {name}, which stands above it"


@pytest.mark.parametrize("file", sorted((PACKAGE / "layers").glob("*.py")), ids=lambda p: p.name)
def test_layers_import_torch_only(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots = {(node.module or "").split(".")[0]} if node.level == 0 else set()
        else:
            continue
        allowed = {"torch", "__future__", *sys.stdlib_module_names}
        assert roots <= allowed, f"{file.name} imports {roots - allowed}"


def test_import_convx_loads_no_torch():
    code = "import sys, convx, convx.plan, convx.cli; print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("compiled", ["none", "default"])
def test_an_evaluation_loads_neither_the_compiler_nor_scipy(compiled):
    """They take seconds, in every job; deterministic kernels are asked for either way."""
    code = f"""
import sys, torch, convx.evaluate.run, convx.runs
convx.runs.set_numerics({{"threads": 1, "precision": "fp32", "compile": "{compiled}"}})
assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
print(sorted({{"torch._dynamo", "torch._inductor", "scipy.stats", "pandas"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (result.stdout.strip() == "[]") == (compiled == "none") and not result.returncode, (
        result.stdout + result.stderr
    )


def test_every_verb_is_there_and_documented():
    import convx
    from convx.source import surgery_signatures

    assert set(surgery_signatures()[0]) == set(VERBS)
    for name in VERBS:
        assert len(getattr(convx, name).__doc__) > 40
    with pytest.raises(AttributeError, match="the verbs are"):
        convx.recast  # noqa: B018


def tracked() -> list[str]:
    result = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return [name for name in result.stdout.splitlines() if (REPOSITORY / name).is_file()]


def test_files_stay_short():
    limits = [(r"convx/layers/.*\.py", 220), (r"tests/.*\.py", 600), (r".*\.(py|smk)|.*Snakefile", 420)]
    long = {}
    for name in tracked():
        limit = next((n for pattern, n in limits if re.fullmatch(pattern, name)), None)
        lines = len((REPOSITORY / name).read_text(encoding="utf-8", errors="replace").splitlines()) if limit else 0
        if limit and lines > limit:
            long[name] = lines
    assert not long


def test_no_path_of_a_machine_stands_in_the_project():
    pattern = re.compile(r"/(home|Users|root|work|opt)/[a-z]")
    for name in tracked():
        if name.startswith("results/") or not name.endswith(
            (".py", ".smk", ".yaml", ".md", ".toml", ".lock", "Snakefile", "run")
        ):
            continue
        found = pattern.search((REPOSITORY / name).read_text(encoding="utf-8", errors="replace"))
        assert not found or name == "tests/test_house.py", f"{name}: {found.group(0)}"


def test_every_paper_folder_is_complete():
    for folder in sorted(p for p in (PACKAGE / "papers").iterdir() if p.is_dir() and p.name != "__pycache__"):
        assert (folder / "README.md").stat().st_size > 500, folder.name
        assert "@" in (folder / "bibtex.bib").read_text(), folder.name
        assert (folder / "claims.yaml").exists() or folder.name == "baseline", folder.name
