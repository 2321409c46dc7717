"""Variants that learn from the trained run of another one: an edge of the workflow beside ``start_from``. No torch."""

from convx import config
from convx.checks import ConfigError
from convx.source import takes_teacher


def check_teacher(study: dict, name: str, where: str) -> None:
    """Check ``teacher`` of a variant: in the study, with its seeds, no circle of teachers and starts, an objective for it."""
    settings, here = config.variant_settings(study, name), f"{where}: variants.{name}"
    if (teacher := settings["teacher"]) is None:
        return
    if teacher not in study["variants"]:
        config.declared(teacher, f"{here}.teacher")
        raise ConfigError(
            f"{here}: it learns from {teacher!r}, which is not a variant of the study; add it to variants"
        )
    if missing := sorted(set(config.seeds(study, name)) - set(config.seeds(study, teacher))):
        raise ConfigError(f"{here}: it learns from {teacher!r}, whose seeds lack {missing[0]}")
    if not takes_teacher(settings["objective"]["name"]):
        raise ConfigError(f"{here}.teacher: the objective {settings['objective']['name']} learns from no teacher")
    seen, queue = set(), [teacher]
    while queue:
        seen.add(other := queue.pop())
        own = config.variant_settings(study, other)
        queue += [v for v in (own["teacher"], own["start_from"]) if v in study["variants"] and v not in seen]
    if name in seen:
        raise ConfigError(f"{here}.teacher: {teacher!r} itself needs {name!r}")
