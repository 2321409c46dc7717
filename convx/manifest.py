"""Files that are whole or absent, the environment a number was made in, and the metrics file. No torch at import."""

import contextlib
import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


@contextlib.contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside ``path`` that is renamed to it on success and removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value) -> None:
    """Write JSON atomically; NaN and infinity are an error (they are not JSON)."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path):
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


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
    ``status: failed`` and the reason, and the program goes on to exit 0; everything else is raised.
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
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if error is not None:
            reason = failure_reason(error)
            if reason is None:
                return False
            self.failed, self.rows, self.per_image, self.arrays = reason, [], {}, {}
            print(f"convx: {self.what} failed: {reason}", file=sys.stderr)
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
        return True


def failure_reason(error: BaseException) -> str | None:
    """Return why a run failed in one line if the failure is of the kind that is recorded, else None."""
    name = type(error).__name__
    if isinstance(error, Failure):
        return str(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "out of memory: " + " ".join(str(error).split())[:200]
    return None
