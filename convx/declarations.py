"""What a declaration says, checked before anything runs: steps of surgery and objectives with their settings. No torch."""

from convx.arguments import IN_A_VARIANT, check_settings
from convx.checks import ConfigError, nearest
from convx.source import objective_settings, surgery_signatures


def check_surgery(steps: list[dict], where: str) -> None:
    """Check verbs, arguments, choices and ranges of surgery steps against the signatures in ``convx/surgery.py``."""
    verbs, limits = surgery_signatures()
    for place, step in enumerate(steps):
        here = f"{where}[{place}]"
        if "verb" not in step:
            raise ConfigError(f"{here}: the key 'verb' is missing{nearest('', verbs)}")
        verb = step["verb"]
        if verb not in verbs:
            raise ConfigError(f"{here}.verb: {verb!r} is unknown{nearest(verb, verbs)}")
        for key, (value, why) in IN_A_VARIANT.get(verb, {}).items():
            if step.get(key) != value:
                raise ConfigError(f"{here}.{key}: in a variant {verb} takes {key}: {value} ({why})")
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


def check_objective(objective: dict, where: str) -> None:
    """Check an objective's name and, where its file has a table of them, its settings."""
    try:
        table = objective_settings(objective["name"])
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from None
    if table is not None:
        try:
            check_settings(where, {k: v for k, v in objective.items() if k != "name"}, table)
        except ValueError as error:
            raise ConfigError(str(error)) from None
