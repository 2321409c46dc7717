"""`build` writes a corrupted copy of a data set, `open_corrupted` opens it again memory-mapped.

A folder holds ``<corruption>.npy`` (uint8 [severities, N, H, W, C]) and ``meta.json``. Arrays are filled
under a temporary name by a pool of processes and renamed when complete; an interrupted build goes on with the
corruptions that it had finished.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import multiprocessing
import os
import platform
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convx.data.arrays import create, open_array
from convx.data.corruptions.constants import SEVERITIES, Protocol, protocol_of
from convx.locking import acquire
from convx.manifest import atomic

SCHEMA_VERSION = 1
META = "meta.json"
STATE = "built.json"  # beside META, which is a job's output: a workflow removes that before it runs a job again
CHUNK_BYTES = 4 << 20
"""Of source images in a job: small for an even load, large against the cost of a job."""


def library_versions() -> dict[str, str]:
    """What the bits of a corrupted image can depend on: blurs and resizing (OpenCV, SciPy), random draws
    (NumPy), JPEG and pixelation (Pillow and its libjpeg), and the processor family."""
    import cv2
    import PIL
    import scipy
    from PIL import features

    return {
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
        "libjpeg": str(features.version("libjpeg_turbo") or features.version("jpg")),
        "machine": platform.machine(),
    }


def digest_of(images_NHWC: np.ndarray) -> str:
    """sha256 (hex) of shape and bytes, read in pieces."""
    total = hashlib.sha256(repr(tuple(images_NHWC.shape)).encode())
    for start in range(0, len(images_NHWC), 1024):
        total.update(np.ascontiguousarray(images_NHWC[start : start + 1024]).data)
    return total.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _locked(folder: Path):
    """Keeps a second build out of the folder for as long as this one runs; an orphan of a killed one is waited for."""
    with acquire(folder / ".lock", f"waiting for another process that builds corruptions in {folder}"):
        for left in folder.glob(".source-*.npy"):  # of a build that was killed: we hold the lock
            left.unlink(missing_ok=True)
        yield


# A worker's own arrays, opened once a process: (source path, target path) -> memory maps.
_OPEN: dict[str, np.ndarray] = {}


def _start_worker(source: str) -> None:
    import cv2

    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)  # the processes are the parallelism
    _OPEN["source"] = np.load(source, mmap_mode="r")


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone: killed, it could not stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job) -> tuple[str, int]:
    """Fills one block of images at one severity; returns the corruption and how many images it did."""
    from convx.data.corruptions.engine import corrupt_batch

    target, protocol, corruption, severity, row, start, stop, seed = job
    if _OPEN.get("target_name") != target:
        _OPEN["target"], _OPEN["target_name"] = np.load(target, mmap_mode="r+"), target
    images = np.ascontiguousarray(_OPEN["source"][start:stop])
    _OPEN["target"][row, start:stop] = corrupt_batch(images, corruption, severity, protocol, range(start, stop), seed)
    return corruption, stop - start


def build(
    images_NHWC: np.ndarray,
    protocol: str | Protocol,
    corruptions: Sequence[str] | None,
    severities: Sequence[int] | None,
    folder: str | Path,
    seed: int,
    workers: int = 1,
    progress: bool = True,
) -> CorruptedSet:
    """Corrupts a data set once and for all; returns it opened.

    images_NHWC: uint8 [N, H, W, 1 or 3], an array or a memory map. corruptions: names, None for the 15 main
    ones.
    severities: ascending, of 1..5, None for all five. seed: of the random streams; image i of the array uses
    the streams of index i.
    workers: processes (1: this one); the result does not depend on it. They are spawned, so a script that
    calls this with more than one needs the usual ``if __name__ == "__main__":``.
    A folder that holds arrays of the same images, constants, severities, seed and library versions is
    completed; one that holds others is built anew; one that another process is filling is waited for. ValueError
    for unknown names and wrong arrays. A full disk is an OSError before any image is made; a worker that dies
    is a RuntimeError, and the next call goes on with what was finished.
    """
    from convx.data.corruptions.constants import MAIN
    from convx.data.corruptions.engine import check_images

    protocol, folder = protocol_of(protocol), Path(folder)
    corruptions = list(dict.fromkeys(MAIN if corruptions is None else corruptions))
    severities = list(SEVERITIES if severities is None else severities)
    if severities != sorted(set(severities)) or not severities:
        raise ValueError(f"severities: {severities} given, an ascending list of 1..5 is needed")
    for corruption in corruptions:
        for severity in severities:
            protocol.constants(corruption, severity)
    check_images(images_NHWC)
    if len(images_NHWC) == 0:
        raise ValueError("images to corrupt: none given")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers: {workers!r} given, a whole number of 1 or more is needed")

    identity = {
        "schema_version": SCHEMA_VERSION,
        "protocol": protocol.name,
        "label": protocol.label,
        "constants_source": protocol.source,
        "constants_digest": protocol.digest,
        "data_digest": digest_of(images_NHWC),
        "shape": list(images_NHWC.shape),
        "severities": [int(s) for s in severities],
        "seed": int(seed),
        "libraries": library_versions(),
    }
    with _locked(folder):
        finished = _finished(folder, identity, protocol.corruptions)
        missing = [c for c in corruptions if c not in finished]
        if missing:
            _write_json(folder / STATE, identity | {"sha256": finished})
            (folder / META).unlink(missing_ok=True)  # incomplete from here on
            jobs = list(_jobs(images_NHWC.shape, protocol, missing, severities, folder, seed))
            total = len(images_NHWC) * len(severities) * len(missing)
            with (
                _source_file(images_NHWC, folder) as source,
                _pool(workers, source) as run,
                tqdm(total=total, unit="img", desc=protocol.name, disable=not progress, leave=False) as bar,
            ):
                for corruption in _completed(jobs, run, bar):
                    part = folder / f"{corruption}.npy.part"
                    finished[corruption] = _sha256(part)
                    with part.open("rb") as file:
                        os.fsync(file.fileno())
                    os.replace(part, folder / f"{corruption}.npy")
                    _write_json(folder / STATE, identity | {"sha256": finished})
        ordered = {c: finished[c] for c in protocol.corruptions if c in finished}
        _write_json(folder / META, identity | {"corruptions": list(ordered), "sha256": ordered})
    return open_corrupted(folder)


def _finished(folder: Path, identity: dict, known: tuple[str, ...]) -> dict[str, str]:
    """corruption -> sha256 of the arrays that can be kept; removes others and what an interrupted build left.

    ValueError where the folder holds arrays that no build wrote, say a published set: they are never removed.
    """
    arrays = [path for c in known for path in (folder / f"{c}.npy", folder / f"{c}.npy.part") if path.is_file()]
    records = [folder / name for name in (META, STATE) if (folder / name).is_file()]
    if arrays and not records:
        raise ValueError(f"{folder}: holds {arrays[0].name} but no {META} of a build; give another folder")
    keep: dict[str, str] = {}
    for record in records:
        try:
            found = json.loads(record.read_text())
            sums = dict(found["sha256"])
        except (ValueError, KeyError, TypeError):
            continue  # torn: nothing is known about the arrays, so nothing is kept
        if all(found.get(key) == value for key, value in identity.items()):
            keep |= {c: s for c, s in sums.items() if folder / f"{c}.npy" in arrays}
    keep = {c: s for c, s in keep.items() if _sha256(folder / f"{c}.npy") == s}
    for path in arrays:
        if path.suffix == ".part" or path.stem not in keep:
            path.unlink()
    return keep


def _jobs(shape, protocol, missing, severities, folder, seed) -> Iterator[tuple]:
    """Lays out the missing arrays on disk and yields the jobs that fill them, corruption by corruption."""
    size = int(np.prod(shape)) * len(severities) * len(missing)
    free = shutil.disk_usage(folder).free
    if size > free:  # a full disk would kill the workers that write through memory maps
        raise ValueError(f"{folder}: {size / 1e9:.1f} GB needed for the corrupted set, {free / 1e9:.1f} GB free")
    chunk = max(1, CHUNK_BYTES // int(np.prod(shape[1:])))
    parts = [folder / f"{corruption}.npy.part" for corruption in missing]
    try:
        for part in parts:
            create(part, (len(severities), *shape))
    except OSError:  # somebody else took the room
        for part in parts:
            part.unlink(missing_ok=True)
        raise
    for corruption, part in zip(missing, parts):
        for row, severity in enumerate(severities):
            for start in range(0, shape[0], chunk):
                stop = min(start + chunk, shape[0])
                yield str(part), protocol, corruption, int(severity), row, start, stop, int(seed)


def _completed(jobs: list[tuple], run, bar) -> Iterator[str]:
    """Runs the jobs, moves the bar, and yields each corruption when the last of its jobs is done."""
    left = Counter(job[2] for job in jobs)
    for corruption, done in run(jobs):
        bar.update(done)
        left[corruption] -= 1
        if not left[corruption]:
            yield corruption


@contextmanager
def _source_file(images: np.ndarray, folder: Path):
    """A .npy file with the images, for the workers to map: the array's own where it is one, else a temporary
    copy."""
    name = getattr(images, "filename", None)
    untouched = (
        isinstance(images, np.memmap) and images.mode == "r" and isinstance(images.base, mmap.mmap)
    )  # no view of one
    if untouched and str(name).endswith(".npy"):
        yield str(name)
        return
    handle, name = tempfile.mkstemp(suffix=".npy", prefix=".source-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, np.ascontiguousarray(images))
        yield name
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _pool(workers: int, source: str):
    """A function that maps jobs to results in any order: in this process for one worker, else in spawned
    ones.

    Spawned, not forked: the caller may have torch's threads or a GPU open.
    """
    if workers == 1:
        _OPEN["source"] = np.load(source, mmap_mode="r")
        try:
            yield lambda jobs: map(_work, jobs)
        finally:
            _OPEN.clear()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(source,)) as pool:

        def run(jobs):
            jobs = iter(jobs)
            waiting = {pool.submit(_work, job) for job in itertools.islice(jobs, 4 * workers)}
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    waiting |= {pool.submit(_work, job) for job in itertools.islice(jobs, len(done))}
                    yield from (future.result() for future in done)
            except BrokenProcessPool:
                raise RuntimeError(
                    "a worker that corrupts images died (killed, or out of memory); what is finished is kept, the same "
                    "command goes on; fewer --workers need less memory"
                ) from None
            finally:  # after an error: do not work off the rest first
                for future in waiting:
                    future.cancel()

        yield run


class CorruptedSet(Mapping[str, np.ndarray]):
    """corruption -> read-only memory map, uint8 [severities, N, H, W, C], with the facts of ``meta.json`` in
    ``meta``."""

    def __init__(self, folder: Path, meta: dict):
        self.folder, self.meta = folder, meta
        self.protocol: str = meta["protocol"]
        self.label: str = meta["label"]
        self.severities: tuple[int, ...] = tuple(meta["severities"])
        self.labels_N: np.ndarray | None = None  # those of the images that were corrupted: kept with their data set

    def __getitem__(self, corruption: str) -> np.ndarray:
        if corruption not in self.meta["corruptions"]:
            raise KeyError(corruption)
        return open_array(self.folder / f"{corruption}.npy", mapped=True, again="build the set again")

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta["corruptions"])

    def __len__(self) -> int:
        return len(self.meta["corruptions"])

    def cell(self, corruption: str, severity: int) -> np.ndarray:
        """Memory map [N, H, W, C] of one corruption at one severity (1..5)."""
        if severity not in self.severities:
            raise ValueError(f"{self.folder}: no severity {severity}, it holds {list(self.severities)}")
        return self[corruption][self.severities.index(severity)]

    def verify(self) -> None:
        """Compares every array with its checksum; ValueError names the first that differs."""
        for corruption, expected in self.meta["sha256"].items():
            found = _sha256(self.folder / f"{corruption}.npy")
            if found != expected:
                raise ValueError(
                    f"{self.folder / corruption}.npy: sha256 {found} found, {expected} expected; build again"
                )


def open_corrupted(folder: str | Path) -> CorruptedSet:
    """Opens what `build` wrote: a mapping corruption -> memory map [severities, N, H, W, C].

    ValueError where the folder has no complete set or an array's shape contradicts ``meta.json``; checksums
    are compared by `CorruptedSet.verify` only, since that reads everything.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text())
    except FileNotFoundError:
        state = "an unfinished set" if (folder / STATE).exists() else "no corrupted set"
        raise ValueError(f"{folder}: {state}, {META} is missing; build it") from None
    except ValueError as error:
        raise ValueError(f"{folder / META}: not JSON ({error}); build the set again") from None
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{folder / META}: schema_version {meta.get('schema_version')!r}, {SCHEMA_VERSION} is needed")
    result = CorruptedSet(folder, meta)
    for corruption in result:
        array = result[corruption]
        shape, kind = array.shape, array.dtype
        expected = (len(result.severities), *meta["shape"])
        if shape != expected or kind != np.uint8:
            raise ValueError(f"{folder / corruption}.npy: {kind} {shape} found, uint8 {expected} expected")
    return result
