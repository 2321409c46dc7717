"""Writes docs/licences.md: the licence of every pinned package, as its own metadata state it.

Run it with the Python of an environment that all locks were installed into: python envs/licences.py
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "licences.md"
LOCKS = {"requirements.lock": "a run", "requirements-test.lock": "the tests", "requirements-cluster.lock": "clusters"}
HEAD = """# Licences of the dependencies

convx itself is under the MIT licence. It depends on the packages below and contains none of them. The words are those of each
package's own metadata. `nvidia-*` and `cuda-*` come with PyTorch for NVIDIA GPUs and are under NVIDIA's own terms.
Written by `envs/licences.py`.

| package | version | licence | needed for |
| --- | --- | --- | --- |
"""


def pinned() -> dict[str, tuple[str, str]]:
    """Return {package: (version, what it is needed for)} of the locks."""
    found = {}
    for lock, purpose in reversed(LOCKS.items()):  # what several need belongs to the first
        for name, version in re.findall(r"^([\w.-]+)==([^\s\\;]+)", (ROOT / "envs" / lock).read_text(), re.MULTILINE):
            found[name] = (version, purpose)
    return dict(sorted(found.items()))


def licence(package: str) -> str | None:
    """Return the licence that the metadata of an installed package name, in one line; None where it is not installed."""
    try:
        found = metadata(package)
    except PackageNotFoundError:
        return None
    if expression := found.get("License-Expression"):
        return expression
    classified = [c.split(" :: ")[-1] for c in found.get_all("Classifier", []) if c.startswith("License :: ")]
    classified = [c for c in classified if c != "OSI Approved"]
    if classified:
        return ", ".join(dict.fromkeys(classified))
    text = (found.get("License") or "").strip()
    text = "" if text == "UNKNOWN" else text
    return " ".join(text.splitlines()[0].split())[:80] if text else "not stated in its metadata"


def row(package: str, version: str, purpose: str) -> str | None:
    """Return the line of the table of one package, or None where it is not installed."""
    words = licence(package)
    return None if words is None else f"| {package} | {version} | {words.replace('|', '/')} | {purpose} |"


def main() -> None:
    """Write the table; every pinned package has to be installed."""
    lines = []
    for package, (version, purpose) in pinned().items():
        line = row(package, version, purpose)
        if line is None:
            sys.exit(f"{package} is not installed; install all of envs/*.lock first")
        lines.append(line)
    OUT.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{OUT}: {len(lines)} packages")


if __name__ == "__main__":
    main()
