"""Adding the runs of a bundle to a results folder that may hold runs of the same study already. No torch.

Runs add up when one recipe made them, whatever the machine: a run that is here already with the same numbers is kept as it is,
one with other numbers is refused and named, and so is one that another recipe made. Times and energies are no numbers in this
sense, as no machine repeats them; costs were measured where they were measured and stay what they are.
"""

import csv
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from convx import config
from convx.config import ConfigError
from convx.manifest import read_json
from convx.records import read_record

RUN_FILE = re.compile(r"metrics/(?P<variant>\w+)/seed(?P<seed>\d+)/(?P<what>\w+)\.json")
OF_RUN = re.compile(r"(?:histories|runs)/(?P<variant>\w+)/seed(?P<seed>\d+)(?:\.csv|/.*)")
DERIVED = re.compile(r"tables/.*|manifest\.json")  # made again from all runs
KEPT = ("study.json", "exact.json")  # what is here stays
MEASURED = {"s", "ms", "images/s", "kWh", "kgCO2e", "MiB", "kWh per 1000 images", "kgCO2e per 1000 images"}
SAME_STUDY = ("data", "baseline", "evaluate")  # what two machines must agree on beside the recipes


@dataclass
class Merge:
    """What a bundle adds: files to write (relative to the study's folder) and a line for each run."""

    write: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def made_by(study: dict, record: dict) -> bool:
    """Return whether a metrics record of a run was made by the recipe that a study has for it.

    Studies of other names may hand their runs over (`convx compare` does), so the name alone is no difference.
    """
    run = record["run"]
    if run["variant"] not in study["variants"] or run["seed"] not in config.seeds(study, run["variant"]):
        return False
    return (
        config.resolve(study | {"study": run["study"]}, run["variant"], run["seed"])["digest"]
        == record["recipe_digest"]
    )


def decide(incoming: Path, here: Path, names: list[str], where: str) -> Merge:
    """Return what the files ``names`` below ``incoming`` add to the study's folder ``here``; raises for the first conflict."""
    merge, study = Merge(), _study(incoming, here, where)
    runs: dict[tuple[str, int], list[str]] = {}
    fresh = not (here / "metrics").is_dir()
    for name in names:
        if match := RUN_FILE.fullmatch(name) or OF_RUN.fullmatch(name):
            runs.setdefault((match["variant"], int(match["seed"])), []).append(name)
        elif DERIVED.fullmatch(name):
            if fresh and not (here / name).exists():
                merge.write.append(name)
        elif not (here / name).exists():
            merge.write.append(name)
        elif name not in KEPT and (here / name).read_bytes() != (incoming / name).read_bytes():
            raise ConfigError(f"{here / name}: is there already and is not the bundle's; move {here} away, or unpack elsewhere "
                              "(--results)")  # fmt: skip
    for run, files in runs.items():
        _run(merge, study, incoming, here, run, files, where)
    return merge


def _study(incoming: Path, here: Path, where: str) -> dict | None:
    """Return the study that all runs must belong to: the one here, else the bundle's, else None."""
    found = {}
    for side, folder in (("here", here), ("bundle", incoming)):
        file = folder / "study.json"
        if file.exists():
            try:
                found[side] = read_json(file)
                assert isinstance(found[side]["variants"], dict)
            except (ValueError, KeyError, TypeError, AssertionError):
                raise ConfigError(
                    f"{file}: not a frozen study; move {here} away, or unpack elsewhere (--results)"
                ) from None
    if len(found) == 2:
        for key in SAME_STUDY:
            if found["here"].get(key) != found["bundle"].get(key):
                raise ConfigError(
                    f"{where}: its study has another `{key}` than {here / 'study.json'}; runs add up within one study alone"
                )
    return found.get("here", found.get("bundle"))


def _run(
    merge: Merge, study: dict | None, incoming: Path, here: Path, run: tuple[str, int], files: list[str], where: str
):
    variant, seed = run
    name, fresh, common, moved = f"{variant} seed {seed}", [], [], []
    for file in files:
        if not (match := RUN_FILE.fullmatch(file)):
            moved.append(file)
            continue
        record = _record(incoming / file, where)
        _check_recipe(study, record, name, where)
        if not (here / file).exists():
            fresh.append(file)
            continue
        mine = _record(here / file, str(here / file))
        if difference := other_numbers(mine, record):
            again = "" if mine["status"] == "ok" else f"; `convx retry {here} {variant}` forgets the failed run here"
            raise ConfigError(
                f"{where}: {name}: {here / file} is there already with other numbers ({difference}); nothing was unpacked{again}"
            )
        common.append(match["what"])
    stem = f"metrics/{variant}/seed{seed}"
    if fresh and not common and (here / stem).is_dir() and any((here / stem).glob("*.json")):
        raise ConfigError(
            f"{where}: {name}: {here / stem} holds other steps of this run, and none of the bundle's shows that they are of "
            "the same training; nothing was unpacked"
        )
    merge.write += fresh
    for file in moved:
        if not (here / file).exists():
            merge.write.append(file)
        elif file.endswith(".csv") and (difference := _other_history(here / file, incoming / file)):
            raise ConfigError(f"{where}: {name}: {here / file} is there already with other numbers ({difference})")
    if fresh:
        merge.added.append(name)
    elif common:
        merge.kept.append(name)


def _record(file: Path, where: str) -> dict:
    try:
        record = read_record(file)
    except ValueError:
        raise ConfigError(
            f"{where}: {file.name} of {file.parent.parent.name} {file.parent.name} is no metrics file"
        ) from None
    return record


def _check_recipe(study: dict | None, record: dict, name: str, where: str) -> None:
    if study is None:
        return
    run = record["run"]
    if run["variant"] not in study["variants"] or run["seed"] not in config.seeds(study, run["variant"]):
        raise ConfigError(f"{where}: {name} is not in the study {study['study']} here; nothing was unpacked")
    if not made_by(study, record):
        wanted = config.resolve(study, run["variant"], run["seed"])["digest"]
        raise ConfigError(
            f"{where}: {name} was made by the recipe {record['recipe_digest']}, the study here has {wanted}: runs of one recipe "
            "alone add up; nothing was unpacked"
        )


def numbers(record: dict) -> dict:
    """Return the numbers of a record that a repeated run must give again, by what they are of."""
    found = {"status": record["status"]}
    for row in record["rows"]:
        if row["unit"] not in MEASURED:
            where = ", ".join(f"{key} {value}" for key, value in sorted(row["conditions"].items()))
            found[f"{row['metric']} ({row['split']}; {where})"] = row["value"]
    return found | {f"{key} per image": value for key, value in record.get("per_image", {}).items()}


def other_numbers(mine: dict, theirs: dict) -> str:
    """Return the first number in which two records of a step differ, "" where they are the same."""
    if mine["what"] == "cost" and mine["status"] == theirs["status"]:
        return ""
    if mine["recipe_digest"] != theirs["recipe_digest"]:
        return f"recipe {mine['recipe_digest']}, the bundle's {theirs['recipe_digest']}"
    if mine["status"] == theirs["status"] == "failed":
        return ""
    a, b = numbers(mine), numbers(theirs)
    for key in [*a, *(key for key in b if key not in a)]:
        if a.get(key) != b.get(key):
            values = ("there", "another") if key.endswith("per image") else (a.get(key), b.get(key))
            return f"{key.replace(' (; )', '')}: {values[0]}, the bundle's {values[1]}"
    return ""


def _other_history(mine: Path, theirs: Path) -> str:
    def rows(file: Path) -> list[dict]:
        with open(file, newline="", encoding="utf-8") as stream:
            return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)]

    a, b = rows(mine), rows(theirs)
    if len(a) != len(b):
        return f"{len(a)} epochs, the bundle's {len(b)}"
    return next((f"epoch {x.get('epoch')}" for x, y in zip(a, b) if x != y), "")


def write(merge: Merge, incoming: Path, here: Path) -> None:
    """Write all files of a merge or none: they are copied beside the folder first and renamed into place, or taken back."""
    here.parent.mkdir(parents=True, exist_ok=True)
    staged, placed = Path(tempfile.mkdtemp(prefix=f".{here.name}.", dir=here.parent)), []
    try:
        for name in merge.write:
            copy = staged / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(incoming / name, copy)
        for name in merge.write:
            target = here / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(staged / name, target)
            placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
