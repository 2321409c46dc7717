"""Locks that die with their process: `flock` on a file, never a file that has to be removed. No torch."""

import errno
import fcntl
import logging
import os
from pathlib import Path

log = logging.getLogger("convx")

WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # file systems that have no locks (Lustre without `flock`)


def acquire(path: str | Path, busy: str = ""):
    """Return the open file that holds the lock of ``path``; the lock is free when it is closed, however that happens.

    Waits while another process has it, after a line that says ``busy``; ``waited`` of the file says so. Whoever has the
    lock may remove the file and its folder: then the lock of the file that comes next is taken. A file system without
    locks gets a warning and no lock.
    """
    path, waited = Path(path), False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a")  # noqa: SIM115 - the lock lives as long as the file
        except FileNotFoundError:
            continue  # its folder was removed just now
        try:
            waited = _lock(file, busy) or waited
            file.waited = waited
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file, busy: str) -> bool:
    """Take the lock of an open file; returns whether another process had it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if busy:
            print(busy, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
        log.warning("%s: this file system has no locks (%s); start nothing twice", file.name, error.strerror)
    return False
