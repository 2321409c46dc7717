"""Reading what the workflow wrote: metrics files and frozen recipes, checked before anything believes them. No torch.

A file that was cut off, edited or written by another version is one line that names it and what is wrong, never a
traceback, and nothing in it is replaced by a default.
"""

import base64
import binascii
import json
import math
import zlib
from pathlib import Path

from convx.checks import ConfigError
from convx.config import SCHEMA_VERSION, recipe_digest, resolve
from convx.manifest import METRICS_SCHEMA_VERSION, attempt, read_json

ROW = {
    "metric": (str,),
    "value": (int, float, type(None)),
    "unit": (str,),
    "n": (int, type(None)),
    "split": (str,),
    "conditions": (dict,),
    "method": (str,),
}
TAKEN = {"study", "variant", "seed", "what", "status", "reason", *ROW}  # columns that a condition cannot be named like
HEAD = {
    "run": (dict,),
    "what": (str,),
    "status": (str,),
    "reason": (str,),
    "rows": (list,),
    "per_image": (dict,),
    "arrays": (dict,),
    "recipe_digest": (str,),
    "environment": (dict,),
    "command": (str,),
    "started": (str,),
    "wall_seconds": (int, float),
}
PAYLOAD_BYTES = 2**31  # of one decompressed payload


def read_record(path: str | Path, variant: str | None = None, seed: int | None = None) -> dict:
    """Return a metrics file; ``ConfigError`` with one line where it is not one, or that of another run."""
    path = Path(path)
    record = read_json(path)
    try:
        _check_record(record, path.stem, variant, seed)
    except ValueError as error:
        raise ConfigError(f"{path}: not a metrics file that can be used: {error}") from None
    return record


def found_record(path: Path, variant: str, seed: int, study: dict) -> dict | None:
    """Return the record of a step, whatever its file is like; None where the step has not been tried, or still runs.

    A file that cannot be used, and a step that died before it wrote one, become failed records with the reason.
    """
    try:
        return read_record(path, variant, seed)
    except FileNotFoundError:
        reason = attempt(path)
    except (ConfigError, OSError) as error:
        words = str(error).removeprefix(f"{path}: ")
        reason = f"{path.name} cannot be used: {words} (`convx retry` forgets it)"
    if reason is None:
        return None
    return {
        "schema_version": METRICS_SCHEMA_VERSION,
        "run": {"study": study["study"], "variant": variant, "seed": seed},
        "what": path.stem,
        "status": "failed",
        "reason": reason,
        "rows": [],
        "per_image": {},
        "arrays": {},
        "recipe_digest": resolve(study, variant, seed)["digest"],
        "environment": {},
        "command": "",
        "started": "",
        "wall_seconds": 0.0,
    }


def read_recipe(path: str | Path) -> dict:
    """Return a frozen recipe; ``ConfigError`` where it is none, or was changed after it was frozen."""
    recipe = read_json(path)
    if not isinstance(recipe, dict) or "digest" not in recipe:
        raise ConfigError(f"{path}: not a frozen recipe; remove it and run again")
    if recipe.get("schema_version") != SCHEMA_VERSION:
        version = recipe.get("schema_version")
        raise ConfigError(f"{path}: a recipe of version {version!r}, this convx reads {SCHEMA_VERSION}")
    try:
        same = recipe_digest(recipe) == recipe["digest"]
    except (KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise ConfigError(f"{path}: does not match its digest; it was edited or cut off, remove it and run again")
    return recipe


def weights_failure(path: str | Path) -> str | None:
    """Return why a file of weights holds none: the reason that a failed run left there, or how it is damaged; else None.

    Reads the header alone (8 bytes of length, JSON with the places of the tensors) and compares it with the file's size.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                return f"{path.name} was cut off"
            head = json.loads(file.read(length))
        reason = (head.pop("__metadata__", None) or {}).get("convx_failed")
        end = max((entry["data_offsets"][1] for entry in head.values()), default=0)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
        return f"{path.name} is no file of weights"
    return reason or (f"{path.name} was cut off" if end != size - 8 - length else None)


def inflate(data: str, size: int) -> bytes:
    """Return the ``size`` bytes that base64 text of zlib data holds; ValueError where it holds more, fewer or none."""
    if not 0 <= size <= PAYLOAD_BYTES:
        raise ValueError(f"a payload of {size:,} bytes is more than {PAYLOAD_BYTES:,}")
    try:
        packed = zlib.decompressobj()
        raw = packed.decompress(base64.b64decode(data, validate=True), size + 1)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(f"a payload is damaged ({error})") from None
    if len(raw) != size or not (packed.eof or size == 0):
        raise ValueError(f"a payload holds {'more' if len(raw) > size else 'fewer'} than its {size:,} bytes")
    return raw


def _check_record(record, what: str, variant: str | None, seed: int | None) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"it holds {_kind(record)}, not a mapping")
    if record.get("schema_version") != METRICS_SCHEMA_VERSION:
        version = record.get("schema_version")
        raise ValueError(f"it is of version {version!r}, this convx reads {METRICS_SCHEMA_VERSION}")
    _check_keys(record, HEAD, "")
    run = record["run"]
    _check_keys(run, {"study": (str,), "variant": (str,), "seed": (int,)}, "run: ")
    for key, wanted in (("variant", variant), ("seed", seed)):
        if wanted is not None and run[key] != wanted:
            raise ValueError(f"run: {key}: it is of {run[key]!r}, its folder is that of {wanted!r}")
    if not _usable(record["wall_seconds"]):
        raise ValueError("wall_seconds: it is not finite")
    facts = record["environment"]
    for key, kind in (
        ("packages", dict),
        ("device_name", str),
        ("processor", str),
        ("device", str),
        ("precision", str),
    ):
        if key in facts and not isinstance(facts[key], kind):
            raise ValueError(f"environment: {key}: {_kind(facts[key])} where {kind.__name__} belongs")
    if not all(isinstance(version, str) for version in facts.get("packages", {}).values()):
        raise ValueError("environment: packages: a version is a word")
    for key in ("source_digest", "data_digest"):
        if not isinstance(record.get(key), str | None):
            raise ValueError(f"{key}: {_kind(record[key])} where str belongs")
    if record["what"] != what:
        raise ValueError(f"what: it is of {record['what']!r}, its name says {what!r}")
    if record["status"] not in ("ok", "failed"):
        raise ValueError(f"status: {record['status']!r} is neither 'ok' nor 'failed'")
    if (record["status"] == "failed") != bool(record["reason"]):
        raise ValueError("reason: a failed step has one, another one has none")
    for place, row in enumerate(record["rows"]):
        _check_row(row, f"rows.{place}: ")
    for group, shaped in (("per_image", False), ("arrays", True)):
        for name, payload in record[group].items():
            _check_payload(payload, shaped, f"{group}.{name}: ")


def _check_keys(value, keys: dict, here: str) -> None:
    """Check that a mapping has all of ``keys``, each of one of its types (a bool is no number)."""
    if not isinstance(value, dict):
        raise ValueError(f"{here}{_kind(value)} where a mapping belongs")
    for key, kinds in keys.items():
        if key not in value:
            raise ValueError(f"{here}the key {key!r} is missing")
        if type(value[key]) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{here}{key}: {_kind(value[key])} where {wanted} belongs")


def _check_row(row, here: str) -> None:
    _check_keys(row, ROW, here)
    if unknown := sorted(set(row) - set(ROW)):
        raise ValueError(f"{here}unknown key {unknown[0]!r}")
    if not row["metric"]:
        raise ValueError(f"{here}metric: it is empty")
    if row["value"] is not None and not _usable(row["value"]):
        raise ValueError(f"{here}value: it is not finite")
    for key, value in row["conditions"].items():
        if key in TAKEN:
            raise ValueError(f"{here}conditions: {key!r} is the name of a column of every row")
        if not isinstance(value, str | int | float) or not (isinstance(value, str) or _usable(value)):
            raise ValueError(f"{here}conditions.{key}: {_kind(value)} is neither a word nor a finite number")


def _usable(number) -> bool:
    """Return whether a number has a finite double: JSON's may be 1e999 or have a thousand digits."""
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


def _check_payload(payload, shaped: bool, here: str) -> None:
    size = {"shape": (list,)} if shaped else {"n": (int,)}
    _check_keys(payload, {"dtype": (str,), "data": (str,)} | size, here)
    lengths = payload["shape"] if shaped else [payload["n"]]
    if not all(type(n) is int and 0 <= n <= PAYLOAD_BYTES for n in lengths):
        raise ValueError(f"{here}its size {lengths!r:.60} is no size")
    kinds = {"float16": 16} if shaped else {"bool": 1, "uint8": 8}
    if payload["dtype"] not in kinds:
        raise ValueError(f"{here}dtype: {payload['dtype']!r} is none of {', '.join(kinds)}")
    try:
        inflate(payload["data"], -(-math.prod(lengths) * kinds[payload["dtype"]] // 8))
    except ValueError as error:
        raise ValueError(f"{here}{error}") from None


def _kind(value) -> str:
    """Return a value as an error may show it: its type, and itself where that is short."""
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 else type(value).__name__
