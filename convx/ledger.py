"""The claims of the papers, read from convx/papers/<paper>/claims.yaml and checked. No torch.

Every mistake in a ledger is one line that names the file, the claim, the key and the nearest valid word.
"""

import copy
import re
from pathlib import Path

from convx.checks import read_yaml
from convx.config import PACKAGE, ConfigError, check_schema, nearest, schema

PAPERS = PACKAGE / "papers"
COMPARED = ("delta", "ordering", "cost")  # kinds that set a variant against a reference


def papers(folder: Path = PAPERS) -> list[str]:
    """Return the keys of the papers that have a ledger."""
    return sorted(file.parent.name for file in folder.glob("*/claims.yaml"))


def load_ledgers(keys: list[str] | None = None, folder: Path = PAPERS) -> list[dict]:
    """Return the claims of the papers ``keys`` (None: of all), every default filled in, with their ``paper``.

    Raises ``ConfigError`` with one line for the first mistake.
    """
    known = papers(folder)
    for key in keys or []:
        if key not in known:
            raise ConfigError(f"paper {key!r} has no ledger{nearest(key, known)}")
    claims = [claim for key in (keys if keys is not None else known) for claim in _load(folder / key / "claims.yaml")]
    _unique(claims)
    return claims


def _load(file: Path) -> list[dict]:
    where = f"convx/papers/{file.parent.name}/claims.yaml"
    entries = read_yaml(file, where)
    if not isinstance(entries, list):
        raise ConfigError(f"{where}: a ledger is a list of claims, this is {type(entries).__name__}")
    for place, entry in enumerate(entries):
        here = f"{where}: {entry['id'] if isinstance(entry, dict) and 'id' in entry else f'claim {place + 1}'}"
        # Checked one by one, so that the line names the claim and not its place in the list.
        check_schema([entry], "claims", here)
    defaults = {k: sub["default"] for k, sub in schema("claims")["items"]["properties"].items() if "default" in sub}
    claims = [{"paper": file.parent.name} | copy.deepcopy(defaults) | copy.deepcopy(entry) for entry in entries]
    divergences = _divergences(file.parent / "README.md")
    for claim in claims:
        _check(claim, f"{where}: {claim['id']}", divergences)
    primary = sum(claim["role"] == "primary" for claim in claims)
    if not 1 <= primary <= 2:
        raise ConfigError(f"{where}: {primary} claims are primary, a paper has one or two")
    return claims


def _check(claim: dict, here: str, divergences: set[str]) -> None:
    """Check what a schema cannot say."""
    kind = claim["kind"]
    if claim["id"].split(".")[0] != claim["paper"]:
        raise ConfigError(f"{here}: id: it should start with {claim['paper']!r}, the folder that it is in")
    if (kind != "exact") != bool(claim["variant"]):
        raise ConfigError(
            f"{here}: variant: {'is missing' if kind != 'exact' else 'an exact claim has a check instead'}"
        )
    if (kind in COMPARED) != bool(claim["reference"]):
        wrong = (
            f"is missing, a claim of kind {kind} compares"
            if kind in COMPARED
            else f"a claim of kind {kind} compares nothing"
        )
        raise ConfigError(f"{here}: reference: {wrong}")
    if kind in ("delta", "ordering") and not claim["direction"]:
        raise ConfigError(f"{here}: direction: is missing; valid: higher, lower, not_lower")
    if kind in ("absolute", "exact", "cost") and claim["paper_value"] is None:
        raise ConfigError(f"{here}: paper_value: a claim of kind {kind} needs the paper's number")
    if kind == "cost" and claim["unit"] != "ratio":
        raise ConfigError(
            f"{here}: unit: a cost claim is decided on the ratio, its unit is 'ratio', not {claim['unit']!r}"
        )
    if kind != "exact" and claim["check"]:
        raise ConfigError(f"{here}: check: only exact claims have one")
    if kind != "exact" and not claim["margin"]:
        raise ConfigError(f"{here}: margin: must be above 0 for a claim of kind {kind}")
    if (claim["paper_spread"] is None) != (claim["spread_kind"] == "none"):
        raise ConfigError(f"{here}: spread_kind: {claim['spread_kind']!r} does not go with {claim['paper_spread']}")
    for name in claim["divergences"]:
        if name not in divergences:
            raise ConfigError(f"{here}: divergences: {name!r} is not in README.md{nearest(name, divergences)}")


def _divergences(readme: Path) -> set[str]:
    """Return the numbered divergences that a paper's README.md describes, as lines that begin "- **D1**"."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else ""
    return set(re.findall(r"^- \*\*(D\d+)\*\*", text, flags=re.MULTILINE))


def _unique(claims: list[dict]) -> None:
    seen = set()
    for claim in claims:
        if claim["id"] in seen:
            raise ConfigError(
                f"convx/papers/{claim['paper']}/claims.yaml: {claim['id']}: id: stands in the ledger twice"
            )
        seen.add(claim["id"])
