"""Files that are whole or absent, the environment a number was made in, and the metrics file. No torch at import."""

import contextlib
import datetime
import errno
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from convx.checks import ConfigError

METRICS_SCHEMA_VERSION = 1
PACKAGES = (
    "convx",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "pandas",
    "snakemake",
    "codecarbon",
    "opencv-python",
)


DAY = 86_400  # seconds


@contextlib.contextmanager
def atomic(path: str | Path):
    """Yield a temporary path that is renamed to ``path`` on success and removed on failure.

    It lies alone in a hidden folder beside ``path``, which takes along what a library writes next to it (safetensors
    does). A process that is killed leaves that folder behind; whoever writes ``path`` next removes it. The content is on
    the disk before its name is, so that a power cut leaves no empty file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{platform.node()}-{os.getpid()}.", dir=path.parent))
    temporary = folder / path.name
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what killed writers of ``path`` left: of this machine's dead processes, of others' after a day."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(?P<node>.*)-(?P<pid>\d+)\.\w+")
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            if (found := pattern.fullmatch(entry.name)) is None:
                continue
            mine = found["node"] == platform.node()
            if not _alive(int(found["pid"])) if mine else time.time() - entry.stat().st_mtime > DAY:
                shutil.rmtree(entry.path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def write_json(path: str | Path, value) -> None:
    """Write JSON atomically; NaN and infinity are an error (they are not JSON)."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path):
    """Return the content of a JSON file; one that is empty, cut off or no JSON is a ``ConfigError`` of one line."""
    text = Path(path).read_bytes()
    if not text.strip():
        raise ConfigError(f"{path}: is empty; it was cut off, remove it and run again")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}); it is damaged, remove it and run again") from None


def _once(pairs: list[tuple]) -> dict:
    """Return a JSON object; a key that stands in it twice has no one value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} stands in it twice")
    return found


def _no_constant(word: str):
    raise ValueError(f"{word} is not a number of JSON")


def processor() -> str:
    """Return the name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def processor_features() -> list[str]:
    """Return the CPU features that decide which number formats are fast (AVX2, AVX-512, bf16, AMX)."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "sve", "bf16")
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.split(":", 1)[1].split())
                return [name for name in wanted if name in flags]
    return []


def environment(device: str = "cpu", **facts) -> dict:
    """Return what a number depends on beyond the recipe: packages, processor, device, threads and the facts given."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    result = {
        "python": platform.python_version(),
        "packages": found,
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "processor_features": processor_features(),
        "cores": os.cpu_count(),
        "device": device,
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        result["threads"] = torch.get_num_threads()
        result["deterministic"] = torch.are_deterministic_algorithms_enabled()
        if device.startswith("cuda"):
            result["device_name"] = torch.cuda.get_device_name(device)
            result["cuda"] = torch.version.cuda
    return result | facts


class Failure(Exception):
    """Something that makes one run fail without breaking the table: NaN, out of memory, a missing device."""


class MetricsFile:
    """Collects the rows of one step of one run and writes them once, whole.

    Used as a context manager: an expected failure (:class:`Failure`, out of memory) inside it becomes a record with
    ``status: failed`` and the reason, and the program goes on to exit 0; everything else is raised. While it is open, and
    after an error that is raised or a death without one, a small hidden file beside ``path`` says so (:func:`attempt`):
    a table that is built without the record can tell why.
    """

    def __init__(self, path: str | Path, what: str, recipe: dict, **digests):
        self.path, self.what, self.recipe, self.digests = Path(path), what, recipe, digests
        self.rows: list[dict] = []
        self.per_image: dict = {}
        self.arrays: dict = {}
        self.environment: dict = {}
        self.failed: str | None = None

    def add(self, metric: str, value, unit: str, *, n=None, split: str = "", method: str = "", **conditions) -> None:
        """Add one row."""
        self.rows.append(
            {
                "metric": metric,
                "value": value,
                "unit": unit,
                "n": n,
                "split": split,
                "conditions": conditions,
                "method": method,
            }
        )

    def __enter__(self):
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._clock = time.perf_counter()
        _note_attempt(self.path, self.started, "")
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if error is None and (bad := [r["metric"] for r in self.rows if not _is_finite(r["value"])]):
            error = Failure(f"{bad[0]} is not finite")
        try:
            if error is not None:
                reason = failure_reason(error)
                if reason is None:
                    raise error
                self.failed, self.rows, self.per_image, self.arrays = reason, [], {}, {}
                print(f"convx: {self.what} failed: {reason}", file=sys.stderr)
            self._write()
        except BaseException as problem:
            _note_attempt(self.path, self.started, explained(problem))
            if problem is error and kind is not None:
                return False  # raised again by Python, with its own trace
            raise
        attempt_file(self.path).unlink(missing_ok=True)
        return True

    def _write(self) -> None:
        write_json(
            self.path,
            {
                "schema_version": METRICS_SCHEMA_VERSION,
                "run": {key: self.recipe[key] for key in ("study", "variant", "seed")},
                "what": self.what,
                "status": "failed" if self.failed else "ok",
                "reason": self.failed or "",
                "rows": self.rows,
                "per_image": self.per_image,
                "arrays": self.arrays,
                "recipe_digest": self.recipe["digest"],
                **self.digests,
                "environment": self.environment or environment(),
                "command": shlex.join(["convx", *sys.argv[1:]]),
                "started": self.started,
                "wall_seconds": round(time.perf_counter() - self._clock, 3),
            },
        )


def _is_finite(value) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def failure_reason(error: BaseException) -> str | None:
    """Return why a run failed in one line if the failure is of the kind that is recorded, else None."""
    name = type(error).__name__
    if isinstance(error, Failure):
        return " ".join(str(error).split()) or "no reason was given"
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "out of memory: " + " ".join(str(error).split())[:200]
    return None


def explained(error: BaseException) -> str:
    """Return in one line what an error that is not recorded means, for the table that is built without the run."""
    chain, seen = [], error
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    text = str(error).strip()
    if "Original Traceback" in text:  # of a loader process: its last line says what happened
        text = text.splitlines()[-1]
    text = " ".join(text.split())[:300]
    for link in chain:
        if getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(link):
            where = getattr(link, "filename", None)
            return (
                f"no space left on the disk{f' ({where})' if where else ''}; free some and run the same command again"
            )
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return "stopped by a signal; the same command continues"
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "is killed by signal" in text):
        return "a loader process died (killed, or out of memory); fewer data.workers need less memory"
    return f"{type(error).__name__}: {text}"


# ------------------------------------------------------------------------------------------------------------ attempts

ATTEMPT_BYTES = 4096  # taken at the start, so that a reason can be noted when the disk has become full


def attempt_file(path: str | Path) -> Path:
    """Return the hidden file that says how far the writing of a metrics file came."""
    return Path(path).with_name(f".{Path(path).stem}.attempt")


def _note_attempt(path: Path, started: str, reason: str) -> None:
    """Note that a step began, or why it ended without a record; never an error of its own."""
    note = {"started": started, "node": platform.node(), "process": os.getpid(), "reason": reason[:1000]}
    content = json.dumps(note).encode("ascii").ljust(ATTEMPT_BYTES)[:ATTEMPT_BYTES]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(attempt_file(path), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(file, content, 0)  # in place: its block is there already
        finally:
            os.close(file)


def attempt(path: str | Path) -> str | None:
    """Return why a step that began left no record at ``path``; None where none began, or its process still runs."""
    try:
        note = json.loads(attempt_file(path).read_bytes())
        here = note["node"] == platform.node()
        if here and note["process"] != os.getpid() and _alive(note["process"]) and not note["reason"]:
            return None
        where = "" if here else f" on {note['node']}"
        silent = f"begun {note['started']}{where} and ended without a word: killed, or out of memory"
        return note["reason"] or silent
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "it broke off"
