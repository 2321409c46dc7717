"""Numbers and sentences for people: prefixes, decimals that fit an interval, how figures were obtained. No
torch.

A table for people has no `nan` and no `inf`: what has no number is a dash, what has no interval says so.
"""

import math
import re

import pandas as pd

DASH = "–"
PREFIXES = (
    (1.0, "k"),
    (1e-3, ""),
    (1e-6, "m"),
    (1e-9, "µ"),
    (1e-12, "n"),
)  # of a quantity stored in kilo-units


def known(value) -> bool:
    """Return whether a cell holds a finite number."""
    return value is not None and not isinstance(value, str) and not pd.isna(value) and math.isfinite(value)


def number(value, digits: int = 3) -> str:
    """Return a number for people: thousands as k, M and G, small ones with their exponent, a dash where there
    is none."""
    if not known(value):
        return DASH
    size = abs(value)
    for limit, mark in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * (1 - 0.5 * 10**-digits):
            return f"{significant(value / limit, digits)} {mark}"
    if size != 0 and size < 1e-2:
        return f"{value:.{digits - 1}e}"
    return significant(value, digits)


def significant(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, never with an exponent."""
    if value == 0:
        return "0"
    rounded = abs(float(f"{value:.{digits - 1}e}"))  # 0.9996 to three digits is 1.00, not 1.000
    places = max(0, digits - 1 - math.floor(math.log10(rounded)))
    return f"{value:.{places}f}"


def decimals(value: float, low: float = math.nan, high: float = math.nan) -> int:
    """Return how many decimals say what an interval leaves known: two digits of its half width, one to five
    of them."""
    half = (high - low) / 2 if known(low) and known(high) else 0.0
    size = half if half > 0 else abs(value) / 100
    return 2 if not size else min(5, max(1, 1 - math.floor(math.log10(size))))


def with_interval(value, low, high, places: int | None = None, sign: bool = False, unit: str = "") -> str:
    """Return "12.34 % [12.11, 12.57]", the value alone where it has no finite interval, a dash where it has
    no value."""
    if not known(value):
        return DASH
    value, low, high = (float(f"{x:.10g}") if known(x) else x for x in (value, low, high))  # as a table's CSV has them
    places = decimals(value, low, high) if places is None else places
    text = f"{value:{'+' if sign else ''}.{places}f}{unit}"
    if known(low) and known(high) and high > low:
        text += f" [{low:{'+' if sign else ''}.{places}f}, {high:{'+' if sign else ''}.{places}f}]"
    return text.replace("-", "−")


def scaled(values: pd.Series) -> tuple[float, str]:
    """Return (factor, prefix) that make a column stored in kilo-units (kWh, kgCO2e) readable: one prefix for
    the column."""
    largest = values.abs().max()
    if not known(largest) or largest == 0:
        return 1.0, "k"
    for size, prefix in PREFIXES:
        if largest >= size:
            return 1 / size, prefix
    return 1 / PREFIXES[-1][0], PREFIXES[-1][1]


def grouped(methods: dict[str, str]) -> list[str]:
    """Return how things were obtained, one sentence a way: {variant: method} in, "7.2 to 9.4 s" where only
    numbers differ.

    Where there are several ways, each one names its variants.
    """
    ways: dict[str, list[str]] = {}
    pattern = r"\d+(?:\.\d+)?"
    methods = {variant: _plural(method) for variant, method in methods.items()}
    for variant, method in methods.items():
        if method:
            ways.setdefault(re.sub(pattern, "#", method), []).append(variant)
    found = []
    for way, variants in ways.items():
        columns = zip(*(re.findall(pattern, methods[v]) for v in variants))
        ranges = []
        for column in columns:
            ends = sorted(set(column), key=float)
            ranges.append(ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}")
        parts = way.split("#")
        text = "".join(part + (ranges[i] if i < len(ranges) else "") for i, part in enumerate(parts))
        found.append(text if len(ways) == 1 else f"{text} ({listed(variants)})")
    return found


def _plural(text: str) -> str:
    return re.sub(r"\b1 seed\(s\)", "1 seed", text).replace("seed(s)", "seeds")


def listed(names: list[str], most: int = 6) -> str:
    """Return "a, b, c and 4 more"."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
