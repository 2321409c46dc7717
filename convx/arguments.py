"""Bounds and choices of the surgery verbs' arguments, checked in a direct call and when a study is read. No torch."""

import difflib

# Bounds (low, high; None is open) of the verbs' numeric arguments by name. Read when a study is checked, so that a
# value out of range is an error before any job starts; ``check_limits`` applies the same bounds to a direct call.
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "expansion": (1, 4096),
    "locality": (0.001, 1000.0),
    "key_dim": (1, 4096),
    "gate_init": (-50.0, 50.0),
    "gate_lr_factor": (0.0, None),
    "position_lr_factor": (0.0, None),
    "kernel_count": (1, 65536),
    "dilated_kernel_size": (1, 1023),
    "position_std": (0.0, None),
    "repulsion_start": (0.0, 1.0),
    "keep": (0.0, 1.0),
    "coverage": (0.01, 1.0),
    "tile": (1, 1024),
    "dense_above": (0.0, 1.0),
    "down_after": (0, 1023),
    "stem_width": (1, 4096),
    "dropout": (0.0, 0.999),
}

# What a verb's step in a variant must say besides: {verb: {argument: (value, why)}}. A direct call is free.
IN_A_VARIANT = {
    "agent_of": {"weights": ("own", "shared weights stay with a ViT that the variant would no longer hold")}
}


def check_limits(**values) -> None:
    """Raise ``ValueError`` that names the first argument outside its bounds in ``LIMITS``; None passes."""
    for name, value in values.items():
        low, high = LIMITS[name]
        numbers = value if isinstance(value, tuple | list) else [value]
        for number in numbers:
            if number is not None and ((low is not None and number < low) or (high is not None and number > high)):
                bounds = f"{'' if low is None else f'{low} <= '}{name}{'' if high is None else f' <= {high}'}"
                raise ValueError(f"{name}={value!r} is out of range: {bounds}")


def check_choices(**values) -> None:
    """Raise ``ValueError`` that names the first argument, given as ``name=(value, choices)``, that is none of its choices."""
    for name, (value, choices) in values.items():
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not valid; choose one of {', '.join(choices)}")


def check_settings(where: str, given: dict, table: dict[str, tuple]) -> dict:
    """Return the settings of an objective with every default filled in.

    ``table``: name -> (default, bounds or choices). A tuple (low, high) bounds a number, or each number of a list as long as the
    default; a list holds choices; a default of None stands for a value that follows from others and takes lists too.
    Raises ``ValueError``, one line, for an unknown name or a value that is not allowed.
    """
    for name, value in given.items():
        here = f"{where}.{name}"
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
            raise ValueError(f"{here}: unknown setting" + (f"; did you mean {near[0]!r}?" if near else ""))
        default, allowed = table[name]
        if value is None and default is None:
            continue
        if isinstance(allowed, list):
            if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
                raise ValueError(f"{here}: {value!r} is not valid; choose one of {', '.join(map(str, allowed))}")
            continue
        whole = type(default) is int or (default is None and type(allowed[0]) is int)
        listed = isinstance(default, list) or (default is None and isinstance(value, list))
        if listed and default is not None and (not isinstance(value, list | tuple) or len(value) != len(default)):
            raise ValueError(f"{here}: {value!r} should be a list of {len(default)} numbers, e.g. {default}")
        low, high = allowed
        for number in value if listed else [value]:
            if isinstance(number, bool) or not isinstance(number, int if whole else int | float):
                raise ValueError(f"{here}: {number!r} should be a {'whole number' if whole else 'number'}")
            if (low is not None and number < low) or (high is not None and number > high):
                bounds = f"{'' if low is None else f'{low} <= '}{name}{'' if high is None else f' <= {high}'}"
                raise ValueError(f"{here}: {value!r} is out of range: {bounds}")
    return {name: default for name, (default, _) in table.items()} | given
