"""Schemas of YAML files, and errors that are one line: the place, what is wrong, and the nearest valid word. No torch."""

import copy
import difflib
import hashlib
import json
from functools import lru_cache
from pathlib import Path

import yaml

PACKAGE = Path(__file__).resolve().parent
SCHEMAS = next(p for p in (PACKAGE / "schemas", PACKAGE.parent / "workflow" / "schemas") if p.is_dir())


class ConfigError(ValueError):
    """A mistake of the user's, told in one line."""


def nearest(word: str, known) -> str:
    """Return "; did you mean 'x'?" for the closest known word, or the list of the known ones where none is close."""
    known = sorted(str(k) for k in known)
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = ", ".join(known[:15]) + (", ..." if len(known) > 15 else "")
    return f"; valid: {shown}" if known else ""


def digest(value) -> str:
    """Return the first 16 hex digits of the sha256 of a JSON value, independent of key order and spelling."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def read_yaml(file: str | Path, where: str | None = None):
    """Return the content of a YAML file; a missing or broken file is one line."""
    where = where or str(file)
    try:
        return yaml.load(Path(file).read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise ConfigError(f"{where}: there is no such file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


@lru_cache
def schema(name: str) -> dict:
    """Return a JSON schema of workflow/schemas by name."""
    return read_yaml(SCHEMAS / f"{name}.schema.yaml")


def deref(node: dict, root: dict) -> dict:
    if "$ref" in node:
        return root["$defs"][node["$ref"].rsplit("/", 1)[1]] | {k: v for k, v in node.items() if k != "$ref"}
    return node


def check_schema(value, schema_name: str, where: str) -> None:
    """Raise ``ConfigError`` for the first violation: the place, what is wrong, and what would be right."""
    import jsonschema

    root = schema(schema_name)
    errors = list(jsonschema.Draft202012Validator(root).iter_errors(value))
    if not errors:
        return
    error = min(errors, key=lambda e: (len(e.absolute_path), str(e.absolute_path)))
    place = ".".join(str(part) for part in error.absolute_path)
    prefix = f"{where}: " + (f"{place}: " if place else "")
    found = error.instance
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        word = next(key for key in found if key not in known)
        raise ConfigError(f"{prefix}unknown key {word!r}{nearest(word, known)}")
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in found)
        raise ConfigError(f"{prefix}the key {missing!r} is missing")
    if error.validator == "enum":
        raise ConfigError(f"{prefix}{found!r} is not valid{nearest(found, error.validator_value)}")
    if error.validator == "type":
        types = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        raise ConfigError(f"{prefix}{found!r} should be of type {' or '.join(types)}")
    limits = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    if error.validator in limits:
        raise ConfigError(
            f"{prefix}{found!r} is out of range, it must be {limits[error.validator]} {error.validator_value}"
        )
    if error.validator == "uniqueItems":
        raise ConfigError(f"{prefix}{found!r} holds a value twice")
    if error.validator == "pattern":
        raise ConfigError(f"{prefix}{found!r} is not valid; it must match {error.validator_value}")
    if error.validator in ("minItems", "minProperties"):
        raise ConfigError(
            f"{prefix}it {f'holds {len(found)}' if found else 'is empty'}; it needs at least {error.validator_value}"
        )
    if error.validator == "maxItems":
        raise ConfigError(f"{prefix}it holds {len(found)}; it takes at most {error.validator_value}")
    raise ConfigError(f"{prefix}{error.message}")


def fill(value, node: dict, root: dict):
    """Return ``value`` with the schema's defaults in every object of fixed keys (not inside free maps such as recipes)."""
    node = deref(node, root)
    if isinstance(value, dict) and "properties" in node:
        filled = {key: copy.deepcopy(deref(sub, root).get("default")) for key, sub in node["properties"].items()}
        filled |= value
        return {key: fill(entry, node["properties"][key], root) for key, entry in filled.items()}
    return copy.deepcopy(value)


@lru_cache
def recipe_defaults() -> dict:
    """Return the default of every recipe value."""
    return {key: sub["default"] for key, sub in schema("study")["$defs"]["recipe"]["properties"].items()}


# Recipe values that came after the first runs were made: at their default they do not count in a digest, so that a run made
# before is still one of the same recipe. A new key goes here.
LATER = ("accumulate", "auto_augment", "color_jitter", "crop_interpolation", "decay_milestones", "erase", "train_share")


def numbers_that_count(training: dict) -> dict:
    """Return the values of a recipe that its digest covers: not kept checkpoints, nor a later key that says nothing new."""
    silent = {key for key in LATER if training.get(key) == recipe_defaults().get(key)}
    return {key: value for key, value in training.items() if key != "checkpoints" and key not in silent}
