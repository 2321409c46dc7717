"""What there is, and where every number of a variant comes from. No torch."""

import re
from pathlib import Path

from convx import config
from convx.checks import deref
from convx.config import ConfigError, nearest
from convx.scale import LENGTHS


def table(header: list[str], rows: list[list]) -> str:
    """Return rows as aligned text columns."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def listing(what: str) -> str:
    """Return the list of variants, models, data sets, surgery verbs, study keys or claims as text."""
    if what == "variants":
        rows = [[name, v["paper"], v["description"]] for name, v in config.declared_variants().items()]
        return table(["variant", "paper", "what it is"], sorted(rows, key=lambda row: (row[1], row[0])))
    if what == "models":
        from convx.models import FAMILIES, timm_names

        rows = [[example, pattern, text] for pattern, example, text in FAMILIES.values()]
        return (
            table(["example", "pattern", "what it is"], rows)
            + f"\n\nand timm's {len(timm_names())} models as timm/<name>"
        )
    if what == "data":
        from convx.data import describe_sets

        rows = describe_sets()
        cells = [["varies" if value is None else value for value in row.values()] for row in rows]
        return table(list(rows[0]), cells)
    if what == "verbs":
        from convx.source import surgery_signatures

        verbs, limits = surgery_signatures()
        rows = []
        for name, arguments in verbs.items():
            for argument, choices in arguments.items():
                low, high = limits.get(argument, (None, None))
                bounds = f"{'' if low is None else f'{low} <= '}{argument}{'' if high is None else f' <= {high}'}"
                valid = ", ".join(map(str, choices)) if choices else bounds if argument in limits else ""
                rows.append([name, argument, valid])
            if not arguments:
                rows.append([name, "", ""])
        return table(["verb", "argument", "valid"], rows)
    if what == "keys":
        return keys_markdown()
    from convx.claims import load_ledgers

    rows = [[c["id"], c["role"], c["kind"], _value(c), c["location"]] for c in load_ledgers()]
    return table(["claim", "role", "kind", "paper", "where"], rows)


def keys_markdown() -> str:
    """Return every key of a study as a Markdown table, from its schema: type, default, meaning."""
    import json

    root = config.schema("study")
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]

    def walk(node: dict, path: str) -> None:
        node = deref(node, root)
        if path:
            kind = node.get("type", "")
            kind = " or ".join(kind) if isinstance(kind, list) else kind
            if "enum" in node:
                kind = " \\| ".join(f"`{value}`" for value in node["enum"])
            default = json.dumps(node.get("default")) if not node.get("properties") else ""
            meaning = " ".join(node["description"].split())
            lines.append(f"| `{path}` | {kind} | {f'`{default}`' if default else ''} | {meaning} |")
        for key, sub in node.get("properties", {}).items():
            walk(sub, f"{path}.{key}" if path else key)
        if isinstance(node.get("additionalProperties"), dict):
            walk(node["additionalProperties"], f"{path}.<name>")

    walk(root, "")
    return "\n".join(lines)


def _value(claim: dict) -> str:
    value = claim.get("paper_value")
    return "" if value is None else f"{value:g} {claim.get('unit') or ''}".strip()


def explain(study_file: str | Path, name: str) -> str:
    """Return every number of a variant in a study, with its origin.

    The origin is the one that the paper's variants.yaml gives for a value; a value that the study sets names the study file
    and comment of its line, which says whether it is a paper's; the rest are convx's defaults.
    """
    study = config.load_study(study_file)
    if name not in study["variants"]:
        known = study["variants"]
        if name in config.declared_variants():
            raise ConfigError(
                f"{study_file}: variant {name!r} is declared but not in this study; it has {', '.join(known)}"
            )
        raise ConfigError(f"{study_file}: variant {name!r} is unknown{nearest(name, known)}")
    own, settings = config.declaration(study, name), config.variant_settings(study, name)
    override = study["variants"][name]
    comments = _comments(study_file)
    origins = own.get("origin", {})
    rows = []

    def row(path: str, value, where: str) -> None:
        rows.append([path, _short(value), where])

    def declared_origin(path: str) -> str:
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            if (key := ".".join(parts[:length])) in origins:
                return origins[key]
        return f"convx/papers/{own['paper']}/variants.yaml"

    def chosen(path: str) -> str:
        return f"{comments.get(path, 'own choice')} [{study_file}: {path.rpartition('.')[0]}]"

    host = "model" not in own and "model" not in override
    row(
        "model.name",
        settings["model"]["name"],
        f"own choice [{study_file}: host]" if host else declared_origin("model.name"),
    )
    for key, value in settings["model"]["settings"].items():
        row(
            f"model.settings.{key}",
            value,
            f"own choice [{study_file}: host]" if host else declared_origin(f"model.settings.{key}"),
        )
    for place, step in enumerate(settings["surgery"]):
        for key, value in step.items():
            origin = (
                f"own choice [{study_file}: variants.{name}]"
                if "surgery" in override
                else declared_origin(f"surgery.{place}.{key}")
            )
            row(f"surgery.{place}.{key}", value, origin)
    for key, value in settings["objective"].items():
        path = f"objective.{key}"
        if "objective" in override and (key not in own.get("objective", {}) or own["objective"][key] != value):
            row(path, value, chosen(f"variants.{name}.{path}"))
        else:
            row(path, value, declared_origin(path) if "objective" in own else "own choice: convx's default")
    for key in ("start_from", "teacher", "at_epoch", "budget", "epoch_cost"):
        if settings[key] not in (None, "recipe"):
            row(
                key,
                settings[key],
                f"own choice [{study_file}: variants.{name}]" if key in override else declared_origin(key),
            )
    recipe_name = settings["recipe"]
    recipe = study["recipes"][recipe_name]
    for key, value in config.training_settings(study, name).items():
        if key == "epochs" and settings["budget"] != "recipe":
            origin = f"own choice: what budget ({settings['budget']}) leaves"
        elif key in override.get("training", {}):
            origin = chosen(f"variants.{name}.training.{key}")
        elif key in own.get("training", {}):
            origin = declared_origin(f"training.{key}")
        elif key in recipe:
            origin = chosen(f"recipes.{recipe_name}.{key}")
        else:
            origin = "own choice: convx's default"
        if key in ("epochs", *LENGTHS) and value and study["scale"] != 1:
            origin += f"; times the study's scale {study['scale']:g}"
        row(f"training.{key}", value, origin)
    row(
        "seeds",
        config.seeds(study, name),
        f"own choice [{study_file}" + (f": variants.{name}]" if "seeds" in override else "]"),
    )
    head = f"{name} ({own['paper']}): {own['description']}\n\n"
    return head + table(["value", "is", "origin"], rows)


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _comments(file: str | Path) -> dict[str, str]:
    """Return {dotted path: comment} of the lines of a YAML file that end in a comment."""
    found, stack = {}, []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        match = re.match(r"^( *)([\w-]+):(?:[^#]*)(?:#\s*(.*))?$", line)
        if not match:
            continue
        indent, key, comment = len(match.group(1)), match.group(2), match.group(3)
        stack = [entry for entry in stack if entry[0] < indent] + [(indent, key)]
        if comment:
            found[".".join(k for _, k in stack)] = comment.strip()
    return found
