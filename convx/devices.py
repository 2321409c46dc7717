"""Which device a job gets. Jobs on one machine share its GPUs by file locks, so that no two take the same slot. No torch.

Snakemake counts GPUs (``resources: gpu``) but does not say which one a job may use. :func:`claim` does: every GPU has
``CONVX_GPU_SLOTS`` slots (1 unless set), a slot is an exclusive ``flock`` on a file, and the kernel frees it when the process
ends, however it ends. Training takes one slot; timing and energy take every slot of a GPU.

Environment: ``CONVX_GPUS`` (devices to use, e.g. "0,1"), else ``CUDA_VISIBLE_DEVICES`` as a cluster or a user set it, else all;
``CONVX_GPU_SLOTS``; ``CONVX_LOCKS`` (folder of the lock files).
"""

import contextlib
import ctypes
import fcntl
import os
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path

POLL_SECONDS = 0.2
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


@lru_cache
def _installed_gpus() -> tuple[str, ...]:
    """Return the indices of the GPUs of this machine, from the driver's own list."""
    if not Path("/dev/nvidiactl").exists():
        return ()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return tuple(listed.split())
    return ()


def visible_gpus() -> list[str]:
    """Return the GPUs that jobs may use here; an empty ``CUDA_VISIBLE_DEVICES`` hides them all."""
    for name in ("CONVX_GPUS", "CUDA_VISIBLE_DEVICES"):
        if name in os.environ:
            return [entry.strip() for entry in os.environ[name].split(",") if entry.strip() not in ("", "-1")]
    return list(_installed_gpus())


def slots_per_gpu() -> int:
    """Return the number of jobs that may share one GPU."""
    text = os.environ.get("CONVX_GPU_SLOTS", "1")
    if not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"CONVX_GPU_SLOTS={text!r}: the number of jobs that share a GPU is a whole number of at least 1"
        )
    return int(text)


def lock_folder() -> Path:
    """Return the folder of the lock files, one for all of a user's jobs on this machine."""
    if own := os.environ.get("CONVX_LOCKS"):
        Path(own).mkdir(parents=True, exist_ok=True)
        return Path(own)
    folder = Path(tempfile.gettempdir()) / f"convx-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder}: belongs to somebody else; name a folder of yours in CONVX_LOCKS")
    return folder


def _lock(gpu: str, slot: int, block: bool):
    """Return the open file that holds the lock of a slot, or None when another process has it."""
    name = "".join(c if c.isalnum() else "_" for c in gpu)
    file = open(lock_folder() / f"gpu{name}.slot{slot}", "a")  # noqa: SIM115 - the lock lives as long as the file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file


def _take_whole(gpus: list[str], slots: int):
    """Take all slots of one GPU: of a free one if there is any, else wait for the first. Slots are taken in order, so two
    waiting jobs cannot hold each other up."""
    for gpu in gpus:
        held = []
        for slot in range(slots):
            if (file := _lock(gpu, slot, block=False)) is None:
                break
            held.append(file)
        else:
            return gpu, held
        for file in held:
            file.close()
    return gpus[0], [_lock(gpus[0], slot, block=True) for slot in range(slots)]


def _take_slot(gpus: list[str], slots: int):
    """Take the first free slot, spreading jobs over the GPUs before doubling up; wait while there is none."""
    while True:
        for slot in range(slots):
            for gpu in gpus:
                if (file := _lock(gpu, slot, block=False)) is not None:
                    return gpu, [file]
        time.sleep(POLL_SECONDS)


def keep_freed_memory() -> None:
    """Let the C library keep what a training step frees for the next step; without glibc nothing happens.

    Activations are tens of MB each: given back to the system and fetched again at every step, page by page, they cost
    5 to 10 % of a training step on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(parameter, value)


def _take_several(gpus: list[str], slots: int, count: int):
    """Take a slot of each of ``count`` GPUs; hold none while waiting for enough, so that two such jobs cannot block each other."""
    if count > len(gpus):
        raise ValueError(f"{count} processes need a GPU each, this machine shows {len(gpus)} ({', '.join(gpus)})")
    while True:
        held = {}
        for slot in range(slots):
            for gpu in gpus:
                if len(held) < count and gpu not in held and (file := _lock(gpu, slot, block=False)) is not None:
                    held[gpu] = file
        if len(held) == count:
            return ",".join(sorted(held, key=gpus.index)), list(held.values())
        for file in held.values():
            file.close()
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def claim(wanted: str = "auto", whole: bool = False, count: int = 1):
    """Hold a slot of a GPU (all its slots if ``whole``) and point ``CUDA_VISIBLE_DEVICES`` at it; yields its name or None.

    With ``count`` above one it is a slot of each of so many GPUs, and the name is theirs with commas between.
    Call it before torch touches CUDA. ``wanted="cpu"``, or a machine without GPUs, takes nothing and yields None.
    """
    gpus = visible_gpus() if wanted != "cpu" else []
    if not gpus:
        yield None
        return
    take = _take_whole if whole else _take_slot
    gpu, held = take(gpus, slots_per_gpu()) if count == 1 else _take_several(gpus, slots_per_gpu(), count)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield gpu
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        for file in held:
            file.close()
