"""A copy of the project's own tree in a temporary folder, with the real Snakefile, for tests that run or edit it."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = ("Snakefile", "workflow", "profiles", "config", "envs", "convx", "pyproject.toml", "README.md")

TINY = {
    "study": "tiny",
    "description": "A tiny study for tests.",
    "reduced": "a few digits, one epoch",
    "data": {"name": "digits", "image_size": 32, "train_images": 192, "test_images": 60, "validation": 32},
    "host": {"name": "resnet8_8"},
    "baseline": "cnn",
    "seeds": [0],
    "recipes": {
        "train": {"epochs": 2, "batch_size": 32, "lr": 0.05, "weight_decay": 0.0005},
        "finetune": {"epochs": 1, "batch_size": 32, "optimizer": "adamw", "lr": 0.0005, "weight_decay": 0.05},
    },
    "variants": {"cnn": None, "cnn_finetuned": None, "lc_frozen_x8": None, "tcnn": None},
    "evaluate": {
        "corruption": {"protocol": "imagenet_c", "corruptions": ["fog", "contrast"], "severities": [1, 5]},
        "attacks": {"epsilons": [1]},
        "latency": {"batches": [1], "rounds": 10, "seconds": 1},
        "energy": {"seconds": 0.5},
    },
    "device": "cpu",
}


@dataclass
class House:
    """A copy of the tree at ``root``; ``study`` is written to ``config/tiny.yaml`` before each run."""

    root: Path
    study: dict

    @classmethod
    def build(cls, root: Path, study: dict = TINY) -> "House":
        root.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            source = REPOSITORY / part
            if source.is_dir():
                shutil.copytree(source, root / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, root / part)
        return cls(root, yaml.safe_load(yaml.safe_dump(study)))

    @property
    def environment(self) -> dict:
        here = {
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(self.root / "cache"),
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SNAKEMAKE")}
        return clean | here | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def write(self) -> None:
        text = yaml.safe_dump(self.study, sort_keys=False)
        file = self.root / "config" / "tiny.yaml"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)

    def snakemake(self, *arguments: str, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
        """Run Snakemake on the study; stdout and stderr come together in ``stdout``."""
        self.write()
        # Arguments first: --configfile takes every word that follows it.
        command = [sys.executable, "-m", "snakemake", *arguments]
        command += ["--cores", "2", "--configfile", "config/tiny.yaml"]
        return subprocess.run(
            command,
            cwd=self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def planned(self, *targets: str) -> list[tuple[str, str]]:
        """Return (rule, variant) of the jobs of a dry run; variant is empty for rules without one."""
        result = self.snakemake("--dry-run", *targets)
        assert result.returncode == 0, result.stdout
        jobs, rule = [], None
        for line in result.stdout.splitlines():
            if match := re.match(r"(?:local)?rule (\w+):", line):
                if rule:
                    jobs.append((rule, ""))
                rule = match.group(1)
            elif rule and (match := re.match(r"\s+wildcards: .*variant=(\w+)", line)):
                jobs.append((rule, match.group(1)))
                rule = None
            elif line.startswith("Job stats") and rule:
                break
        if rule:
            jobs.append((rule, ""))
        return [job for job in jobs if job[0] not in ("all", "default")]

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.root / file
        text = path.read_text()
        assert old in text, f"{old!r} is not in {file}"
        path.write_text(text.replace(old, new, 1))

    def results(self, *parts: str) -> Path:
        return self.root.joinpath("results", self.study["study"], *parts)


def clone(house: House, root: Path) -> House:
    """Return a second house with everything of the first, times included."""
    shutil.copytree(house.root, root, copy_function=shutil.copy2, symlinks=True)
    return House(root, yaml.safe_load(yaml.safe_dump(house.study)))
