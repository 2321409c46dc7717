"""What the repository publishes: README's result section and docs/results.md, written from the committed studies in results/.

Nothing in them is typed. Every number stands beside the run files, the recipe and the command that it comes from.
"""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pandas as pd

from convx.claims import DECIDED, NUMBERS
from convx.config import ConfigError
from convx.manifest import atomic, read_json
from convx.report.findings import found, how_sure, order, paper_says
from convx.report.tables import markdown, split
from convx.report.words import DASH, listed, number, with_interval

BEGIN = "<!-- results: written by `convx results` from results/; what is typed here is lost -->"
END = "<!-- results: end -->"
PAGE = "docs/results.md"
COSTS = "results/queue.json"
NUMERIC = (*NUMBERS, "paper_value", "paper_spread", "paper_n", "margin")
NOTHING = (
    "No study has been run and committed yet, so there is no result to report. `convx queue config/<study>.yaml` says what "
    "to run first, what it costs on your machine and which claims it decides.\n"
)


def committed(root: Path) -> list[str]:
    """Return the studies in results/ that are in git (added is enough); without git, those that .gitignore does not name."""
    here = sorted(file.parent.name for file in (root / "results").glob("*/manifest.json"))
    if (root / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "results"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        tracked = {line.split("/")[1] for line in listing.splitlines() if line.endswith("/manifest.json")}
        return [name for name in here if name in tracked]
    ignored = re.findall(r"^results/(\w+)/$", (root / ".gitignore").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [name for name in here if name not in ignored]


class Study:
    """A committed study: its tables and manifest as the workflow wrote them."""

    def __init__(self, root: Path, name: str):
        self.name, self.folder, self.root = name, root / "results" / name, root
        self.manifest = read_json(self.folder / "manifest.json")
        self.claims, self.compared = (
            _table(self.folder / "tables" / f"{t}.csv") for t in ("replication", "comparison")
        )

    @property
    def file(self) -> str:
        """Return the study's file, that of the full study where this one is a shortened one."""
        scaled = re.fullmatch(r"(.+)_scale\w+", self.name)
        name = scaled[1] if scaled and not (self.root / "config" / f"{self.name}.yaml").exists() else self.name
        return f"config/{name}.yaml"

    @property
    def planned(self) -> int:
        return sum(map(len, self.manifest["planned"].values()))

    @property
    def done(self) -> int:
        return len({(r["variant"], r["seed"]) for r in self.manifest["runs"] if r["what"] == "evaluation"})

    def runs(self, variant: str, what: str) -> list[dict]:
        return [run for run in self.manifest["runs"] if run["variant"] == variant and run["what"] == what]

    def command(self, variant: str) -> str:
        scale = f" --config scale={self.manifest['scale']:g}" if self.manifest["scale"] != 1 else ""
        seed = self.manifest["planned"][variant][0]
        return f"snakemake {variant}_seed{seed} --cores 1 --configfile {self.file}{scale}"


def _table(file: Path) -> pd.DataFrame:
    if not file.exists():
        raise ConfigError(f"{file}: missing; `snakemake figures --configfile config/<study>.yaml` writes it")
    frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    names = NUMERIC if "claim_id" in frame else [c for c in frame if c not in ("variant", "status", "reason")]
    for name in names:
        values = pd.to_numeric(frame[name], errors="coerce")
        if "claim_id" in frame or values.notna().any():
            frame[name] = values
    return frame


def sections(root: str | Path = ".") -> dict[Path, str]:
    """Return {file: what it should hold} for README.md and docs/results.md."""
    root = Path(root)
    studies = [Study(root, name) for name in committed(root)]
    costs = read_json(root / COSTS) if (root / COSTS).exists() else {}
    readme = (root / "README.md").read_text(encoding="utf-8")
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ConfigError(
            f"{root / 'README.md'}: the lines {BEGIN!r} and {END!r} should stand in it once, in this order"
        )
    head, rest = readme.split(BEGIN)
    tail = rest.split(END)[1]
    return {
        root / "README.md": f"{head}{BEGIN}\n\n{summary(studies, costs)}\n{END}{tail}",
        root / PAGE: page(studies),
    }


def write(root: str | Path = ".", check: bool = False) -> list[str]:
    """Write what differs; returns a line for each file that changed. ``check`` writes nothing and raises if one would change."""
    changed = []
    for file, text in sections(root).items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            changed.append(str(file))
            if not check:
                with atomic(file) as temporary:
                    temporary.write_text(text, encoding="utf-8")
    if check and changed:
        raise ConfigError(f"{changed[0]}: not in step with results/; `convx results` writes it")
    left = sorted(set(_present(root)) - set(committed(Path(root))))
    lines = [f"{name}: {'written' if name in changed else 'unchanged'}" for name in map(str, sections(root))]
    return lines + ([f"left out, as git does not know them (git add results/<study>): {listed(left)}"] if left else [])


def _present(root: str | Path) -> list[str]:
    return [file.parent.name for file in (Path(root) / "results").glob("*/manifest.json")]


# ------------------------------------------------------------------------------------------------------------------- README


def summary(studies: list[Study], costs: dict) -> str:
    """Return README's result section: the studies, and what became of every primary claim."""
    if not studies:
        return NOTHING
    rows = []
    for study in studies:
        words = study.claims[study.claims["claim_kind"] != "exact"]["verdict"]
        counts = Counter(words[words.isin((*DECIDED, "inconclusive"))])
        verdicts = ", ".join(f"{counts[word]} {word}" for word in order(counts)) or "none yet"
        what = study.manifest["description"] + (
            f" *Reduced: {study.manifest['reduced']}.*" if study.manifest["reduced"] else ""
        )
        rows.append([f"[{study.name}]({PAGE}#{study.name})", what, f"{study.done} of {study.planned}", verdicts])
    parts = [markdown(["study", "what it is", "runs", "claims measured"], rows)]
    exact = _exact(studies)
    if len(exact):
        counts = Counter(exact["verdict"])
        words = ", ".join(f"{counts[word]} {word}" for word in order(counts))
        parts.append(f"\nClaims about numbers that follow from the architecture or the mathematics: {words} "
                     f"([each one]({PAGE}#computed-claims)).\n")  # fmt: skip
    parts.append("\nThe main claims of each paper, fixed before anything was run; the brackets are 95 % intervals:\n\n")
    parts.append(_primary(studies, costs))
    parts.append(f"\nEvery other claim, and the run, recipe and command behind each number: [{PAGE}]({PAGE}).\n")
    return "".join(parts)


def _primary(studies: list[Study], costs: dict) -> str:
    header = [
        "claim",
        "what is claimed",
        "the paper says",
        "we found",
        "verdict",
        "how sure, or what is missing",
        "study",
    ]
    rows = []
    first = studies[0].claims
    for claim in first[first["role"] == "primary"]["claim_id"]:
        mine = [(s, s.claims[s.claims["claim_id"] == claim].iloc[0]) for s in studies]
        shown = [(s, row) for s, row in mine if row["verdict"] != "not run"]
        row = mine[0][1]
        head = [f"`{claim}`", row["statement"], paper_says(row)]
        if not shown:
            rows.append([*head, DASH, "**not run**", missing(claim, costs), DASH])
        for study, row in shown:
            why = how_sure(row, study.manifest["reduced"])
            if row["verdict"] in ("incomplete", "failed"):
                why = "; ".join(filter(None, [why, missing(claim, costs, study.name)]))
            link = f"[{study.name}]({PAGE}#{study.name})"
            rows.append([*head, found(row), f"**{row['verdict']}**", why, link])
    return markdown(header, rows)


def missing(claim: str, costs: dict, study: str | None = None) -> str:
    """Return what a claim still needs and what that costs, by the committed answer of `convx queue`."""
    options = []
    for name, entry in costs.get("studies", {}).items():
        need = entry["claims"].get(claim)
        if need and study in (None, name):
            options.append((need["core_hours"] is None, need["core_hours"] or 0.0, need["slots"], entry["file"]))
    if not options:
        return (
            "no study of `config/` decides it yet" if study is None and costs else "`convx queue` says what is missing"
        )
    unknown, hours, slots, file = min(options)
    price = "at a cost that was not measured" if unknown else f"{hours:.1f} core-hours ({costs['machine']})"
    return f"missing: {slots} slots of `{file}`, {price}"


# ------------------------------------------------------------------------------------------------------------ docs/results.md


def page(studies: list[Study]) -> str:
    """Return docs/results.md: each committed study with its claims, its variants and its runs."""
    parts = ["# Results\n\nWritten by `convx results` from `results/`; nothing here is typed. "]
    if not studies:
        return "".join(parts) + "\n\n" + NOTHING
    parts.append(
        "A number leads to its runs: their files, the recipe that made them and the command that makes one again.\n"
    )
    for study in studies:
        parts.append(_study(study))
    exact = _exact(studies)
    if len(exact):
        name = next(s.name for s in studies if (s.claims["claim_kind"] == "exact").any())
        parts.append(f"\n## Computed claims\n\nMade by `convx exact --out results/{name}/exact.json`, kept in "
                     f"[exact.json](../results/{name}/exact.json).\n\n" + _claims(exact, None))  # fmt: skip
    return "".join(parts)


def _exact(studies: list[Study]) -> pd.DataFrame:
    """Return the computed claims of the first study that has any."""
    for study in studies:
        part = study.claims[
            (study.claims["claim_kind"] == "exact") & study.claims["verdict"].isin(("exact", "differs"))
        ]
        if len(part):
            return part
    return studies[0].claims[:0]


def _study(study: Study) -> str:
    m = study.manifest
    parts = [f"\n## {study.name}\n\n{m['description']}\n\n"]
    if m["reduced"]:
        parts.append(f"**Reduced study**: {m['reduced']}. Absolute values are not comparable with the papers'.\n\n")
    parts.append(f"Study file [{study.file}](../{study.file}); {study.done} of {study.planned} runs are in. Tables: ")
    names = ("replication.md", "replication.csv", "comparison.md", "runs.csv")
    parts.append(", ".join(f"[{name}](../results/{study.name}/tables/{name})" for name in names) + ".\n")
    kept = study.claims[study.claims["claim_kind"] != "exact"]
    primary, measured, _, rest = split(kept)
    primary = primary[primary["verdict"] != "not run"]
    for title, part in (("Primary claims", primary), ("Exploratory claims that were measured", measured)):
        if len(part):
            parts.append(f"\n### {title} ({study.name})\n\n" + _claims(part, study))
    unfinished = Counter(rest["verdict"])
    if unfinished:
        words = ", ".join(f"{unfinished[word]} {word}" for word in order(unfinished))
        parts.append(f"\nClaims without a number in this study: {words}; `replication.md` says why.\n")
    parts.append(f"\n### Variants ({study.name})\n\n" + _variants(study))
    parts.append(f"\n### Runs ({study.name})\n\n" + _runs(study))
    return "".join(parts)


def _claims(frame: pd.DataFrame, study: Study | None) -> str:
    header = [
        "claim",
        "what is claimed",
        "the paper says",
        "we found [95 %]",
        "verdict",
        "how sure, or why not",
        "runs",
    ]
    rows = []
    for _, row in frame.iterrows():
        ours, runs = found(row), DASH
        if study:
            variants = [v for v in dict.fromkeys((row["variant"], row["reference"])) if v in study.manifest["recipes"]]
            runs = ", ".join(f"[`{v}`](#{_anchor(study, v)})" for v in variants) or DASH
            if ours != DASH and variants:
                ours = f"[{ours.replace('[', '(').replace(']', ')')}](#{_anchor(study, variants[0])})"
        why = how_sure(row, study.manifest["reduced"] if study else "")
        rows.append(
            [f"`{row['claim_id']}`", row["statement"], paper_says(row), ours, f"**{row['verdict']}**", why, runs]
        )
    return markdown(header if study else header[:-1], rows if study else [row[:-1] for row in rows])


def _anchor(study: Study, variant: str) -> str:
    return f"runs-{study.name}-{variant}"


def _variants(study: Study) -> str:
    header = ["variant", "runs", "parameters", "top-1 %", "corrupted top-1 %", "latency / baseline", "made on"]
    rows = []
    for _, row in study.compared.iterrows():
        name = row["variant"]
        cells = [
            with_interval(row[c], row[f"{c}_low"], row[f"{c}_high"], 2) for c in ("top1", "corruption", "latency_ratio")
        ]
        link = f"[`{name}`](#{_anchor(study, name)})" if name in study.manifest["recipes"] else f"`{name}`"
        counts = f"{int(row['seeds_done'])} of {int(row['seeds_planned'])}"
        rows.append(
            [
                link,
                counts,
                number(row["parameters"]),
                *cells,
                row["devices"] if isinstance(row["devices"], str) else DASH,
            ]
        )
    return markdown(header, rows)


def _runs(study: Study) -> str:
    header = ["variant", "runs by seed", "recipe (first seed)", "a run again"]
    rows = []
    for variant, recipe in study.manifest["recipes"].items():
        links = []
        for seed in study.manifest["planned"][variant]:
            files = {
                r["what"]: r["file"] for r in study.manifest["runs"] if (r["variant"], r["seed"]) == (variant, seed)
            }
            inner = ", ".join(f"[{what}](../results/{study.name}/{file})" for what, file in sorted(files.items()))
            links += [f"{seed}: {inner}"] if files else []
        digest = f"[`{recipe['digest']}`](../results/{study.name}/manifest.json)"
        name = f'<a id="{_anchor(study, variant)}"></a>`{variant}`'
        rows.append([name, "; ".join(links), digest, f"`{study.command(variant)}`"])
    return markdown(header, rows)
