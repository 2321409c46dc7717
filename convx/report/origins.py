"""Where the runs of a study were made: devices and versions of the code that are pooled, and the manifest of all runs. No torch.

Runs of one recipe (its precision is a part of it) add up whatever machine made them and whatever convx's version was; so every
table says which ones there are. A version of the code is the digest of what decides the numbers of a step (`convx.source`).
"""

import hashlib
from collections import Counter

from convx import config
from convx.report.words import listed

MANIFEST_SCHEMA_VERSION = 1


def device(record: dict) -> str:
    """Return where a record was made: the GPU or the processor, and torch's version."""
    facts = record["environment"]
    name = facts.get("device_name") or facts.get("processor") or facts.get("device") or "an unknown device"
    torch = facts.get("packages", {}).get("torch")
    return f"{name}, torch {torch}" if torch else name


def tally(results, *variants: str | None) -> tuple[Counter, dict[str, Counter]]:
    """Return {device: runs} and {step: {source digest: runs}} of the trained and evaluated runs of some variants."""
    devices, code = Counter(), {"training": Counter(), "evaluation": Counter()}
    for record in results.records:
        if record["run"]["variant"] in variants and record["what"] in code and record["environment"]:
            code[record["what"]][record.get("source_digest") or "unknown"] += 1
            if record["what"] == "evaluation":
                devices[device(record)] += 1
    return devices, code


def pooled(results, *variants: str | None) -> tuple[str, str]:
    """Return devices and code versions of the runs of some variants as text, "" without a run."""
    devices, code = tally(results, *variants)
    versions = [f"{what} {_counted(counts)}" for what, counts in code.items() if counts]
    return _counted(devices), "; ".join(versions)


def _counted(counts: Counter) -> str:
    return ", ".join(f"{name} ({number})" for name, number in sorted(counts.items()))


def notes(results) -> list[str]:
    """Return what was pooled, in sentences: where the runs were made, and by which versions of the code."""
    found: dict[tuple[str, str], list[str]] = {}
    for variant in results.variants:
        devices, code = tally(results, variant)
        if devices:
            several = "; ".join(f"{what} {_counted(c)}" for what, c in code.items() if len(c) > 1)
            key = (_counted(devices) if len(devices) > 1 else next(iter(devices)), several)
            found.setdefault(key, []).append(f"`{variant}`")
    lines = []
    for (devices, several), variants in found.items():
        code = f"pooled over versions of the code: {several}" if several else "one version of the code for each variant"
        who = "All runs" if len(found) == 1 else listed(variants, 12)
        lines.append(f"{who} (evaluated on): {devices}; {code}.")
    if results.strangers:
        places = sorted({f"{file.parent.parent.name} {file.parent.name}" for file in results.strangers})
        lines.append(f"Left out, since another recipe than the study's made them: {listed(places)}.")
    return lines


def manifest(results) -> dict:
    """Return the manifest of a study: a line for every metrics file, and the recipe of each variant (that of its first seed)."""
    runs = []
    for file, record in results.files.items():
        if file in results.strangers or not record["environment"]:  # of a step that left no record, or a broken one
            continue
        facts = record["environment"]
        runs.append(
            record["run"]
            | {"what": record["what"], "status": record["status"]}
            | {
                "file": file.relative_to(results.folder).as_posix(),
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            | {key: record.get(key) for key in ("recipe_digest", "source_digest", "data_digest", "command", "started")}
            | {"wall_seconds": record.get("wall_seconds"), "device": device(record)}
            | {
                key: facts.get(key)
                for key in ("precision", "threads", "python", "packages")
                if facts.get(key) is not None
            }
        )
    made = dict.fromkeys(run["variant"] for run in runs)
    recipes = {name: config.resolve(results.study, name, results.seeds(name)[0]) for name in made}
    return {
        "schema_version": MANIFEST_SCHEMA_VERSION,
        "study": results.study["study"],
        **{key: results.study[key] for key in ("description", "reduced")},
        "scale": results.study.get("scale", 1),
        "study_digest": config.digest(results.study),
        "planned": {variant: results.seeds(variant) for variant in results.variants},
        "runs": runs,
        "recipes": recipes,
    }
