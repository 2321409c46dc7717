"""A user's own model or operator beside the matched controls of a study: same data, recipe, seeds, evaluations, one table.

A comparison is a study of its own, ``<study>_<name>``: the study's file with one more variant. What the study has in ``results/``
already, metrics, histories and weights, is taken over, so that only what is new is trained. Without the weights of the
baseline, which latencies are paired with, it is trained again and everything is measured against it anew. No torch.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from convx.config import ConfigError, load_study, read_yaml
from convx.manifest import atomic

TAKEN = ("metrics/**/*.json", "histories/**/*.csv", "recipes/**/*.json", "runs/**/*", "exact.json")


def derive_study(study_file: str | Path, name: str, model: str | None, surgery: str | None, recipe: str | None) -> dict:
    """Return the study with the user's variant added, checked; ``model`` and ``surgery`` are ``file.py:function``."""
    study = read_yaml(study_file)
    load_study(study, str(study_file))
    if (model is None) == (surgery is None):
        raise ConfigError("give one of --model file.py:function and --surgery file.py:function")
    if name in study["variants"]:
        raise ConfigError(f"--name {name!r} is a variant of {study_file} already; choose another")
    entry: dict = {"base": study["baseline"]}
    if model is not None:
        entry["model"] = {"name": _absolute(model)}
    else:
        entry["surgery"] = [{"verb": "custom", "function": _absolute(surgery)}]
    if recipe is not None:
        entry["recipe"] = recipe
    new = study | {"study": f"{study['study']}_{name}", "variants": study["variants"] | {name: entry}}
    load_study(new, "convx compare")
    return new


def _absolute(function: str) -> str:
    file, _, name = function.rpartition(":")
    return f"{Path(file).resolve()}:{name}" if file else function


def run(
    study_file: str,
    name: str,
    model: str | None,
    surgery: str | None,
    recipe: str | None,
    cores: str,
    dry_run: bool,
) -> str:
    """Run the comparison through the workflow of this folder and return its table (or the plan, for a dry run)."""
    if not Path("Snakefile").exists():
        raise ConfigError("no Snakefile here; run `convx compare` in the folder of the convx checkout")
    study = derive_study(study_file, name, model, surgery, recipe)
    source = Path("results") / load_study(study_file)["study"]
    target = Path("results") / load_study(study, "convx compare")["study"]
    for part in TAKEN:
        for file in source.glob(part):
            copy = target / file.relative_to(source)
            if file.is_file() and not copy.exists():
                with atomic(copy) as temporary:  # half a copy would be taken for a whole one the next time
                    shutil.copy2(file, temporary)  # with its times: what is newer than what decides what is made again
    file = target / "compare.yaml"
    with atomic(file) as temporary:
        temporary.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "--cores", cores, "--configfile", str(file)]
    code = subprocess.run([*command, *(["--dry-run"] if dry_run else [])]).returncode
    if code:
        raise ConfigError(f"the workflow ended with exit code {code}; its log is above, the study is {file}")
    return "" if dry_run else (target / "tables" / "comparison.md").read_text(encoding="utf-8")
