"""Bounds and choices of the surgery verbs' arguments, checked in a direct call and when a study is read. No torch."""

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
