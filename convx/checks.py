"""Schemas of YAML files, and errors that are one line: the place, what is wrong, and the nearest valid word. No torch."""

import copy
import difflib
import hashlib
import json
import math
from functools import lru_cache
from pathlib import Path

import yaml

PACKAGE = Path(__file__).resolve().parent
SCHEMAS = next(p for p in (PACKAGE / "schemas", PACKAGE.parent / "workflow" / "schemas") if p.is_dir())


class ConfigError(ValueError):
    """A mistake of the user's, told in one line."""

    def __init__(self, text: str):
        super().__init__(" ".join(str(text).splitlines()))


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


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML without what would be taken silently for something else: a key that stands twice, a value that holds itself."""

    def construct_mapping(self, node, deep=False):
        seen: set = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            word = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if word in seen:
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: the key {key.value!r} stands twice")
            seen.add(word or id(key))
        return super().construct_mapping(node, deep)


def read_yaml(file: str | Path, where: str | None = None):
    """Return the content of a YAML file; a missing or broken file is one line, and so is a key that stands twice."""
    where = where or str(file)
    try:
        return parse_yaml(Path(file).read_bytes(), where)
    except FileNotFoundError:
        raise ConfigError(f"{where}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from None


def parse_yaml(text: bytes | str, where: str):
    """Return the content of YAML text: plain values of JSON's kinds alone, finite, none inside itself."""
    try:
        value = yaml.load(text, Loader=_Loader)
        check_plain(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where}: its values are nested too deeply") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # a date that is none, a key that is a list
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    return value


MOST_VALUES = 200_000  # aliases of aliases of aliases multiply: a small file may stand for billions


def check_plain(value, place: str = "", above: tuple = (), count: list | None = None) -> None:
    """Raise ``ConfigError`` unless a value and all in it are of JSON's kinds: finite numbers, words as keys, no cycle."""
    count = count or [0]
    count[0] += 1
    if count[0] > MOST_VALUES:
        raise ConfigError(f"it stands for more than {MOST_VALUES:,} values")
    if isinstance(value, dict | list):
        if id(value) in above:
            raise ConfigError(f"{place}: it holds itself")
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in inside:
            if isinstance(value, dict) and not isinstance(key, str):
                raise ConfigError(f"{place + ': ' if place else ''}the key {key!r} should be a word; put it in quotes")
            check_plain(entry, f"{place}.{key}" if place else str(key), (*above, id(value)), count)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}: {value!r} is not a finite number")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{place}: a whole number of {value.bit_length()} bits; 63 are the most")
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise ConfigError(f"{place}: {value!r} is {type(value).__name__}; put it in quotes")


@lru_cache
def schema(name: str) -> dict:
    """Return a JSON schema of workflow/schemas by name."""
    return read_yaml(SCHEMAS / f"{name}.schema.yaml")


def deref(node: dict, root: dict) -> dict:
    if "$ref" in node:
        return root["$defs"][node["$ref"].rsplit("/", 1)[1]] | {k: v for k, v in node.items() if k != "$ref"}
    return node


@lru_cache
def _validator():
    """Return the validator of our schemas: 2.0 is no whole number, NaN and infinity are no numbers, a key is a word."""
    import jsonschema

    base = jsonschema.Draft202012Validator
    kinds = base.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
            "number": lambda _, value: (
                (isinstance(value, int) and not isinstance(value, bool))
                or (isinstance(value, float) and math.isfinite(value))
            ),
            "object": lambda _, value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
        }
    )
    return jsonschema.validators.extend(base, type_checker=kinds)


def check_schema(value, schema_name: str, where: str) -> None:
    """Raise ``ConfigError`` for the first violation: the place, what is wrong, and what would be right."""
    try:
        check_plain(value)
    except (ConfigError, RecursionError) as error:
        words = error if isinstance(error, ConfigError) else "its values are nested too deeply"
        raise ConfigError(f"{where}: {words}") from None
    root = schema(schema_name)
    errors = list(_validator()(root).iter_errors(value))
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
