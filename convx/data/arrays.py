"""Arrays on disk: their room is taken before they are filled, and what is opened is what it should be."""

import os
from pathlib import Path

import numpy as np


def create(path: Path, shape: tuple[int, ...], dtype=np.uint8) -> np.memmap:
    """Return a new .npy file as a writable memory map whose blocks are there already.

    A map of a sparse file kills its process when the disk fills up; here a full disk is an OSError before any work.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    array.flush()
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def open_array(path: Path, mapped: bool = False, again: str = "make it again") -> np.ndarray:
    """Return the array of a .npy file, memory-mapped read-only if ``mapped``; nothing in it is executed.

    ValueError with one line names a file that is missing, empty, cut off, or no array of plain values.
    """
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; {again}") from None
    except (OSError, EOFError, ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"{path}: cannot be opened as an array ({_line(error)}); {again}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: cannot be opened as an array (it is an archive of several); {again}")
    return array


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
