"""Studies, variants and frozen recipes. No torch: the workflow imports this while it parses.

A study (one YAML file in config/) is checked against ``workflow/schemas/study.schema.yaml`` and against what convx knows;
every error is one line that names the place and the nearest valid word. ``resolve`` turns (study, variant, seed) into the
frozen recipe of a run: everything that changes its numbers, and a digest of it.
"""

import copy
import math
from functools import lru_cache
from pathlib import Path

from convx.checks import (
    PACKAGE,
    ConfigError,
    check_schema,
    digest,
    fill,
    nearest,
    numbers_that_count,
    read_yaml,
    recipe_defaults,
    schema,
)
from convx.declarations import check_objective, check_surgery
from convx.scale import mark, scaled_epoch, shorten

SCHEMA_VERSION = 1
MIN_CORRUPTION_SIZE = 32


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
            check_objective(entry.get("objective", {"name": "supervised"}), f"{where}: {name}.objective")
            found[name] = entry | {"paper": file.parent.name}
    return found


def declared(name: str, where: str) -> dict:
    """Return the declaration of a variant, or raise with the nearest valid word."""
    table = declared_variants()
    if name not in table:
        raise ConfigError(f"{where}: variant {name!r} is unknown{nearest(name, table)}")
    return table[name]


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
    study = fill(source, schema("study"), schema("study"))
    study["variants"] = {name: entry or {} for name, entry in study["variants"].items()}
    _check_study(study, where)
    return mark(study)


def _check_study(study: dict, where: str) -> None:
    from convx.models import check_name
    from convx.models.pretrained import weights_file
    from convx.teachers import check_teacher

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
        _check_recipe({"schedule": recipe_defaults()["schedule"]} | recipe, f"{where}: recipes.{name}", study["data"])
    for name, entry in variants.items():
        here = f"{where}: variants.{name}"
        merged = _declared_settings(study, name)
        if merged["recipe"] not in study["recipes"]:
            raise ConfigError(
                f"{here}: it uses the recipe {merged['recipe']!r}, which recipes lacks{nearest(merged['recipe'], study['recipes'])}"
            )
        schedule = {"schedule": _numbers(study, name)["schedule"]}
        _check_recipe(schedule | entry.get("training", {}), f"{here}.training", study["data"])
        check_surgery(merged["surgery"], f"{here}.surgery")
        _check_parts(_numbers(study, name), merged["objective"]["name"], f"{here}.training")
        check_objective(merged["objective"], f"{here}.objective")
        try:
            check_name(merged["model"]["name"])
            if merged["model"].get("weights"):
                weights_file(merged["model"]["weights"])
        except ValueError as error:
            raise ConfigError(f"{here}: {error}") from None
    for name in variants:
        _check_start(study, name, where)
    for name in variants:
        check_teacher(study, name, where)


def _check_recipe(recipe: dict, here: str, data: dict) -> None:
    from convx.source import optimizer_names

    for key in ("crop_scale", "crop_interpolation", "color_jitter", "auto_augment"):
        if recipe.get(key) and data["name"] != "folder":
            own = "crop_padding, flip, randaugment and erase"
            raise ConfigError(f"{here}.{key}: it is for data.name: folder; {data['name']} has {own}")
    if (scale := recipe.get("crop_scale")) and scale[0] > scale[1]:
        raise ConfigError(f"{here}.crop_scale: {scale} should be the smallest share of the picture, then the largest")
    if recipe.get("decay_milestones") and recipe["schedule"] != "step":
        raise ConfigError(f"{here}.decay_milestones: they are for schedule: step, this one's is {recipe['schedule']}")
    if recipe.get("optimizer") and optimizer_names() and recipe["optimizer"] not in optimizer_names():
        raise ConfigError(
            f"{here}.optimizer: {recipe['optimizer']!r} is unknown{nearest(recipe['optimizer'], optimizer_names())}"
        )


def _check_parts(training: dict, objective: str, here: str) -> None:
    """Check that a batch can be split into the parts that gradients are accumulated over, and what else needs all numbers."""
    from convx.source import splitting_objectives

    if training["crop_interpolation"] and not training["crop_scale"]:
        raise ConfigError(f"{here}: crop_interpolation: it is for random crops; set crop_scale")
    parts, size = training["accumulate"], training["batch_size"]
    if parts > size:
        raise ConfigError(f"{here}: accumulate: {parts} parts of a batch of {size}; it must be at most batch_size")
    if parts > 1 and objective not in splitting_objectives():
        known = ", ".join(sorted(splitting_objectives()))
        raise ConfigError(f"{here}: accumulate: the objective {objective} cannot split a batch; these can: {known}")


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
    """Follow ``start_from`` from one variant: known, in the study, no cycle, the seeds there, an epoch that is there."""
    chain = [name]
    while (settings := _declared_settings(study, chain[-1]))["start_from"]:
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
        if settings["model"] != _declared_settings(study, start)["model"]:
            raise ConfigError(f"{here}.model: it starts from {start!r}, whose model is another one")
        chain.append(start)
    for place in reversed(chain):  # the last one first: the epochs of a start may come from its own start
        _check_partial_start(study, place, f"{where}: variants.{place}")


def _check_partial_start(study: dict, name: str, here: str) -> None:
    """Check ``at_epoch`` and ``budget`` of a variant whose chain of starts is sound."""
    settings = _declared_settings(study, name)
    at_epoch, budget, cost = (settings[key] for key in ("at_epoch", "budget", "epoch_cost"))
    if at_epoch is not None and not settings["start_from"]:
        raise ConfigError(f"{here}.at_epoch: it needs start_from, the variant whose epoch it is")
    if cost is not None and budget != "time":
        raise ConfigError(f"{here}.epoch_cost: it is for budget: time, this one's is {budget}")
    if budget != "recipe":
        if at_epoch is None:
            raise ConfigError(f"{here}.budget: {budget!r} needs at_epoch, the epoch or share of its start")
        if "epochs" in study["variants"][name].get("training", {}):
            raise ConfigError(
                f"{here}.training.epochs: its budget ({budget}) gives them; leave them out or set budget: recipe"
            )
    if budget == "time" and cost is None:
        raise ConfigError(
            f"{here}.epoch_cost is missing: the time of one of its epochs over that of one of {settings['start_from']!r}, "
            "which budget: time needs"
        )
    if at_epoch is None:
        return
    if at_epoch > 1 and at_epoch != int(at_epoch):
        raise ConfigError(f"{here}.at_epoch: {at_epoch} is neither a whole epoch nor a share below 1")
    kept, epochs = start_epoch(study, name), _epochs(study, settings["start_from"])
    if kept > epochs or (budget != "recipe" and kept == epochs) or (0 < at_epoch < 1 and kept in (0, epochs)):
        raise ConfigError(
            f"{here}.at_epoch: {at_epoch} is epoch {kept} of {settings['start_from']!r}, which trains for {epochs}; "
            f"it must be {'below' if budget != 'recipe' or at_epoch < 1 else 'at most'} {epochs}"
            + (" and above 0" if 0 < at_epoch < 1 else "")
        )


# ------------------------------------------------------------------------------------------------------------------- recipes


def declaration(study: dict, name: str) -> dict:
    """Return the declaration of a variant of the study; one of the study's own is that of its ``base``."""
    return declared(study["variants"].get(name, {}).get("base", name), "variants")


def _declared_settings(study: dict, name: str) -> dict:
    """Return the declaration of a variant with the study's overrides and host model, ``at_epoch`` as it was written."""
    entry = study["variants"].get(name, {})
    base = {
        "recipe": "train",
        "surgery": [],
        "start_from": None,
        "teacher": None,
        "at_epoch": None,
        "budget": "recipe",
        "epoch_cost": None,
        "objective": {"name": "supervised"},
    }
    overrides = {k: v for k, v in entry.items() if k not in ("training", "base")}
    merged = base | {"model": study["host"]} | declaration(study, name) | overrides
    merged["model"] = {k: v for k, v in ({"settings": {}} | merged["model"]).items() if (k, v) != ("weights", None)}
    return copy.deepcopy(merged)


def variant_settings(study: dict, name: str) -> dict:
    """Return the declaration of a variant with the study's overrides and host model; ``at_epoch`` is a whole epoch or None."""
    return _declared_settings(study, name) | {"at_epoch": start_epoch(study, name)}


def start_epoch(study: dict, name: str) -> int | None:
    """Return the epoch of its start that a variant takes, or None for the end; a share is rounded, a half up."""
    start, at_epoch = _start(study, name)
    if at_epoch is None or start is None:
        return None
    if 0 < at_epoch < 1:
        return math.floor(at_epoch * _epochs(study, start) + 0.5)
    return scaled_epoch(int(at_epoch), study.get("scale", 1))


def _start(study: dict, name: str) -> tuple[str | None, float | None]:
    """Return ``start_from`` and ``at_epoch`` of a variant as they were written."""
    entry, own = study["variants"].get(name, {}), declaration(study, name)
    return tuple(entry.get(key, own.get(key)) for key in ("start_from", "at_epoch"))


def _numbers(study: dict, name: str) -> dict:
    """Return the training numbers of a variant: defaults < recipe < declaration < override, shortened by the ``scale``."""
    entry, own = study["variants"][name], declaration(study, name)
    recipe = study["recipes"].get(entry.get("recipe", own.get("recipe", "train")), {})
    return shorten(
        recipe_defaults() | recipe | own.get("training", {}) | entry.get("training", {}), study.get("scale", 1)
    )


def _epochs(study: dict, name: str) -> int:
    """Return the epochs of a variant, those that its ``budget`` leaves where it has one.

    The whole budget is that of the start, E epochs, of which it trains e. ``epochs``: the other E - e. ``time``: as many as
    fit into what E epochs of this variant would take; e of them cost only 1 / ``epoch_cost`` each, so E - e / epoch_cost.
    """
    settings = _declared_settings(study, name)
    if settings["budget"] == "recipe":
        return _numbers(study, name)["epochs"]
    whole, spent = _epochs(study, settings["start_from"]), start_epoch(study, name)
    if settings["budget"] == "time":
        return max(1, math.floor(whole - spent / settings["epoch_cost"] + 0.5))
    return whole - spent


def training_settings(study: dict, name: str) -> dict:
    """Return the training numbers of a variant: defaults < the study's recipe < the declaration < the study's override.

    ``epochs`` is what its ``budget`` leaves; ``checkpoints`` holds what other variants of the study start from, too.
    """
    numbers = copy.deepcopy(_numbers(study, name)) | {"epochs": _epochs(study, name)}
    children = [other for other in study["variants"] if _start(study, other)[0] == name]
    wanted = {epoch for other in children if (epoch := start_epoch(study, other)) is not None}
    return numbers | {"checkpoints": sorted({*numbers["checkpoints"], *wanted})}


def seeds(study: dict, name: str) -> list[int]:
    """Return the seeds of a variant in this study."""
    return list(study["variants"][name].get("seeds") or study["seeds"])


def data_key(data: dict) -> str:
    """Return the folder name of a prepared data set: its name and a digest of everything that changes its arrays."""
    later = ("normalise", "canvas")  # keys that came later count where they say something
    numeric = {k: v for k, v in data.items() if k not in ("workers", "lossy") and not (k in later and v is None)}
    return f"{data['name']}-{digest(numeric)[:8]}"


def corruption_key(study: dict) -> str | None:
    """Return the folder name of the study's corrupted test set below its data set's, or None."""
    settings = study["evaluate"]["corruption"]
    if not settings:
        return None
    numeric = {key: settings[key] for key in ("protocol", "corruptions", "severities", "images", "path")}
    return f"{settings['protocol']}-{digest(numeric)[:8]}"


def resolve(study: dict, name: str, seed: int) -> dict:
    """Return the frozen recipe of a run: everything that changes its numbers, the starting run's recipe and a digest."""
    settings = variant_settings(study, name)
    start, teacher = settings["start_from"], settings["teacher"]
    recipe = {
        "schema_version": SCHEMA_VERSION,
        "study": study["study"],
        "variant": name,
        "paper": declaration(study, name)["paper"],
        "seed": seed,
        "data": study["data"],
        "data_key": data_key(study["data"]),
        "model": _dated(settings["model"]),
        "surgery": settings["surgery"],
        "objective": settings["objective"],
        "training": training_settings(study, name),
        "device": study["device"],
        "start": start and {"variant": start, "at_epoch": settings["at_epoch"], "recipe": resolve(study, start, seed)},
    }
    recipe |= (
        {"scale": study.get("scale", 1)} if study.get("scale", 1) != 1 else {}
    )  # a key of shortened studies alone: it changes digests
    if teacher:
        recipe["teacher"] = {"variant": teacher, "recipe": resolve(study, teacher, seed)}
    return recipe | {"digest": recipe_digest(recipe)}


def _dated(model: dict) -> dict:
    """Return a model with the sha256 of the weights that it starts from, where it has any."""
    from convx.models.pretrained import weights_digest

    return model | ({"weights_sha256": weights_digest(model["weights"])} if model.get("weights") else {})


def recipe_digest(recipe: dict) -> str:
    """Return the digest of a recipe; what changes no number (kept checkpoints, loader processes, the paper) does not count."""
    numeric = {k: v for k, v in recipe.items() if k not in ("digest", "data", "paper")}
    numeric["training"] = numbers_that_count(recipe["training"])
    if recipe["start"]:
        numeric["start"] = recipe["start"] | {"recipe": recipe["start"]["recipe"]["digest"]}
    if recipe.get("teacher"):
        numeric["teacher"] = recipe["teacher"] | {"recipe": recipe["teacher"]["recipe"]["digest"]}
    return digest(numeric)
