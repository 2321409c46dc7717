"""Studies, variants and frozen recipes. No torch: the workflow imports this while it parses.

A study (one YAML file in config/) is checked against ``workflow/schemas/study.schema.yaml`` and against what convx knows;
every error is one line that names the place and the nearest valid word. ``resolve`` turns (study, variant, seed) into the
frozen recipe of a run: everything that changes its numbers, and a digest of it.
"""

import copy
import difflib
import hashlib
import json
from functools import lru_cache
from pathlib import Path

import yaml

PACKAGE = Path(__file__).resolve().parent
SCHEMAS = next(p for p in (PACKAGE / "schemas", PACKAGE.parent / "workflow" / "schemas") if p.is_dir())
SCHEMA_VERSION = 1
MIN_CORRUPTION_SIZE = 32


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


def _deref(node: dict, root: dict) -> dict:
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
        raise ConfigError(f"{prefix}it is empty; it needs at least {error.validator_value}")
    raise ConfigError(f"{prefix}{error.message}")


def _fill(value, node: dict, root: dict):
    """Return ``value`` with the schema's defaults in every object of fixed keys (not inside free maps such as recipes)."""
    node = _deref(node, root)
    if isinstance(value, dict) and "properties" in node:
        filled = {key: copy.deepcopy(_deref(sub, root).get("default")) for key, sub in node["properties"].items()}
        filled |= value
        return {key: _fill(entry, node["properties"][key], root) for key, entry in filled.items()}
    return copy.deepcopy(value)


@lru_cache
def recipe_defaults() -> dict:
    """Return the default of every recipe value."""
    return {key: sub["default"] for key, sub in schema("study")["$defs"]["recipe"]["properties"].items()}


# ----------------------------------------------------------------------------------------------------------------- variants


@lru_cache
def declared_variants() -> dict[str, dict]:
    """Return every declared variant {name: declaration + "paper"}, read from convx/papers/*/variants.yaml."""
    found: dict[str, dict] = {}
    for file in sorted((PACKAGE / "papers").glob("*/variants.yaml")):
        where = f"convx/papers/{file.parent.name}/variants.yaml"
        entries = read_yaml(file, where) or {}
        check_schema(entries, "variants", where)
        for name, entry in entries.items():
            if name in found:
                raise ConfigError(f"{where}: variant {name!r} is declared in papers/{found[name]['paper']} already")
            check_surgery(entry.get("surgery", []), f"{where}: {name}.surgery")
            found[name] = entry | {"paper": file.parent.name}
    return found


def declared(name: str, where: str) -> dict:
    """Return the declaration of a variant, or raise with the nearest valid word."""
    table = declared_variants()
    if name not in table:
        raise ConfigError(f"{where}: variant {name!r} is unknown{nearest(name, table)}")
    return table[name]


def check_surgery(steps: list[dict], where: str) -> None:
    """Check verbs, arguments, choices and ranges of surgery steps against the signatures in ``convx/surgery.py``."""
    from convx.source import surgery_signatures

    verbs, limits = surgery_signatures()
    for place, step in enumerate(steps):
        here = f"{where}[{place}]"
        if "verb" not in step:
            raise ConfigError(f"{here}: the key 'verb' is missing{nearest('', verbs)}")
        verb = step["verb"]
        if verb not in verbs:
            raise ConfigError(f"{here}.verb: {verb!r} is unknown{nearest(verb, verbs)}")
        for key, value in step.items():
            if key == "verb":
                continue
            if verb == "custom" and key == "function":
                _check_function(value, f"{here}.function")
            if key not in verbs[verb]:
                raise ConfigError(f"{here}.{key}: {verb} has no argument {key!r}{nearest(key, verbs[verb])}")
            choices = verbs[verb][key]
            if choices and value not in choices:
                raise ConfigError(f"{here}.{key}: {value!r} is not valid{nearest(value, choices)}")
            low, high = limits.get(key, (None, None))
            for number in value if isinstance(value, list) else [value]:
                if (low is None and high is None) or number is None:
                    continue
                if not isinstance(number, int | float) or isinstance(number, bool):
                    raise ConfigError(f"{here}.{key}: {value!r} should be a number")
                if (low is not None and number < low) or (high is not None and number > high):
                    bounds = f"{'' if low is None else f'{low} <= '}{key}{'' if high is None else f' <= {high}'}"
                    raise ConfigError(f"{here}.{key}: {value!r} is out of range, it must be {bounds}")


def _check_function(value, here: str) -> None:
    from convx.models import check_user_function

    try:
        check_user_function(str(value), "function")
    except ValueError as error:
        raise ConfigError(f"{here}: {error}") from None


# ------------------------------------------------------------------------------------------------------------------- studies


def load_study(source: str | Path | dict, where: str | None = None) -> dict:
    """Return a checked study with every default filled in. ``source`` is a YAML file or its content."""
    if not isinstance(source, dict):
        where = where or str(source)
        source = read_yaml(source)
        if not isinstance(source, dict):
            raise ConfigError(f"{where}: a study is a mapping of keys, this is {type(source).__name__}")
    where = where or "study"
    check_schema(source, "study", where)
    study = _fill(source, schema("study"), schema("study"))
    study["variants"] = {name: entry or {} for name, entry in study["variants"].items()}
    _check_study(study, where)
    return study


def _check_study(study: dict, where: str) -> None:
    from convx.models import check_name

    variants = study["variants"]
    _check_data(study, where)
    for name, entry in variants.items():
        declared(entry.get("base", name), f"{where}: variants" + (f".{name}.base" if "base" in entry else ""))
        if "base" in entry and name in declared_variants():
            raise ConfigError(
                f"{where}: variants.{name}: it is a declared variant and takes no base; give yours another name"
            )
    if study["baseline"] not in variants:
        raise ConfigError(
            f"{where}: baseline: {study['baseline']!r} is not a variant of the study{nearest(study['baseline'], variants)}"
        )
    for name, recipe in study["recipes"].items():
        _check_recipe(recipe, f"{where}: recipes.{name}")
    for name, entry in variants.items():
        here = f"{where}: variants.{name}"
        merged = variant_settings(study, name)
        if merged["recipe"] not in study["recipes"]:
            raise ConfigError(
                f"{here}: it uses the recipe {merged['recipe']!r}, which recipes lacks{nearest(merged['recipe'], study['recipes'])}"
            )
        _check_recipe(entry.get("training", {}), f"{here}.training")
        check_surgery(merged["surgery"], f"{here}.surgery")
        try:
            check_name(merged["model"]["name"])
        except ValueError as error:
            raise ConfigError(f"{here}: {error}") from None
    for name in variants:
        _check_start(study, name, where)


def _check_recipe(recipe: dict, here: str) -> None:
    from convx.source import optimizer_names

    if recipe.get("optimizer") and optimizer_names() and recipe["optimizer"] not in optimizer_names():
        raise ConfigError(
            f"{here}.optimizer: {recipe['optimizer']!r} is unknown{nearest(recipe['optimizer'], optimizer_names())}"
        )


def _check_data(study: dict, where: str) -> None:
    from convx.data.corruptions.constants import PROTOCOLS
    from convx.data.sets import SETS

    data, corruption = study["data"], study["evaluate"]["corruption"]
    if data["name"] not in SETS:
        raise ConfigError(f"{where}: data.name: data set {data['name']!r} is unknown{nearest(data['name'], SETS)}")
    if (data["name"] == "folder") != bool(data["path"]):
        wrong = (
            "is missing (the root of the image folder)" if data["name"] == "folder" else "is for data.name: folder only"
        )
        raise ConfigError(f"{where}: data.path {wrong}")
    if not corruption:
        return
    size = data["image_size"] or SETS[data["name"]].image_size
    if size and size < MIN_CORRUPTION_SIZE:
        raise ConfigError(
            f"{where}: evaluate.corruption: corruptions need images of at least {MIN_CORRUPTION_SIZE} px, these have {size}; "
            f"set data.image_size to {MIN_CORRUPTION_SIZE} or leave evaluate.corruption out"
        )
    if corruption["protocol"] == "official":
        if not corruption["path"]:
            raise ConfigError(f"{where}: evaluate.corruption.path is missing (the folder of the official archives)")
        return
    known = PROTOCOLS[corruption["protocol"]].corruptions
    for name in corruption["corruptions"] or []:
        if name not in known:
            raise ConfigError(
                f"{where}: evaluate.corruption.corruptions: {name!r} is not in {corruption['protocol']}{nearest(name, known)}"
            )


def _check_start(study: dict, name: str, where: str) -> None:
    """Follow ``start_from`` from one variant: known, in the study, no cycle, the seeds there, the epoch kept."""
    chain = [name]
    while (settings := variant_settings(study, chain[-1]))["start_from"]:
        start, here = settings["start_from"], f"{where}: variants.{chain[-1]}"
        if start not in study["variants"]:
            declared(start, f"{here}.start_from")
        if start not in study["variants"]:
            raise ConfigError(
                f"{here}: it starts from {start!r}, which is not a variant of the study; add it to variants"
            )
        if start in chain:
            raise ConfigError(f"{here}: start_from is a cycle: {' -> '.join([*chain, start])}")
        missing = sorted(set(seeds(study, chain[-1])) - set(seeds(study, start)))
        if missing:
            raise ConfigError(f"{here}: it starts from {start!r}, whose seeds lack {missing[0]}")
        kept = training_settings(study, start)
        if settings["at_epoch"] is not None and settings["at_epoch"] not in kept["checkpoints"]:
            raise ConfigError(
                f"{here}.at_epoch: {settings['at_epoch']} is not among the checkpoints that {start!r} keeps "
                f"({kept['checkpoints'] or 'none'}); add it to the `checkpoints` of its recipe"
            )
        if settings["model"] != variant_settings(study, start)["model"]:
            raise ConfigError(f"{here}.model: it starts from {start!r}, whose model is another one")
        chain.append(start)


# ------------------------------------------------------------------------------------------------------------------- recipes


def declaration(study: dict, name: str) -> dict:
    """Return the declaration of a variant of the study; one of the study's own is that of its ``base``."""
    return declared(study["variants"].get(name, {}).get("base", name), "variants")


def variant_settings(study: dict, name: str) -> dict:
    """Return the declaration of a variant with the study's overrides and the study's host model."""
    entry = study["variants"].get(name, {})
    base = {
        "recipe": "train",
        "surgery": [],
        "start_from": None,
        "at_epoch": None,
        "objective": {"name": "supervised"},
    }
    overrides = {k: v for k, v in entry.items() if k not in ("training", "base")}
    merged = base | {"model": study["host"]} | declaration(study, name) | overrides
    merged["model"] = {"settings": {}} | merged["model"]
    return copy.deepcopy(merged)


def training_settings(study: dict, name: str) -> dict:
    """Return the training numbers of a variant: defaults < the study's recipe < the declaration < the study's override."""
    entry, own = study["variants"][name], declaration(study, name)
    recipe = study["recipes"].get(variant_settings(study, name)["recipe"], {})
    return copy.deepcopy(recipe_defaults() | recipe | own.get("training", {}) | entry.get("training", {}))


def seeds(study: dict, name: str) -> list[int]:
    """Return the seeds of a variant in this study."""
    return list(study["variants"][name].get("seeds") or study["seeds"])


def data_key(data: dict) -> str:
    """Return the folder name of a prepared data set: its name and a digest of everything that changes its arrays."""
    numeric = {k: v for k, v in data.items() if k not in ("workers", "lossy")}
    return f"{data['name']}-{digest(numeric)[:8]}"


def corruption_key(study: dict) -> str | None:
    """Return the folder name of the study's corrupted test set below its data set's, or None."""
    settings = study["evaluate"]["corruption"]
    if not settings:
        return None
    return f"{settings['protocol']}-{digest({k: settings[k] for k in ('protocol', 'corruptions', 'severities', 'images', 'path')})[:8]}"


def resolve(study: dict, name: str, seed: int) -> dict:
    """Return the frozen recipe of a run: everything that changes its numbers, the starting run's recipe and a digest."""
    settings = variant_settings(study, name)
    start = settings["start_from"]
    recipe = {
        "schema_version": SCHEMA_VERSION,
        "study": study["study"],
        "variant": name,
        "seed": seed,
        "data": study["data"],
        "data_key": data_key(study["data"]),
        "model": settings["model"],
        "surgery": settings["surgery"],
        "objective": settings["objective"],
        "training": training_settings(study, name),
        "device": study["device"],
        "start": start and {"variant": start, "at_epoch": settings["at_epoch"], "recipe": resolve(study, start, seed)},
    }
    return recipe | {"digest": recipe_digest(recipe)}


def recipe_digest(recipe: dict) -> str:
    """Return the digest of a recipe; what changes no number (kept checkpoints, loader processes) does not count."""
    numeric = {k: v for k, v in recipe.items() if k not in ("digest", "data")}
    numeric["training"] = {k: v for k, v in recipe["training"].items() if k != "checkpoints"}
    if recipe["start"]:
        numeric["start"] = recipe["start"] | {"recipe": recipe["start"]["recipe"]["digest"]}
    return digest(numeric)
