"""One process per directory: an exclusive lock on <dir>/lock, which the kernel drops when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType

from towpath.store.contract import StoreInUse


class DirLock:
    """A lock that is held. Works as a context manager too."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> DirLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def hold_lock(directory: Path) -> DirLock:
    """Take the lock of `directory`, which exists. Raises StoreInUse, naming the directory and the holder's pid.

    flock(2) belongs to the open file, so a second call refuses in the same process too. A child that is forked without
    exec inherits it.
    """
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sign(fd)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise StoreInUse(
            f"state_dir {directory} is in use by {f'process {holder}' if holder else 'another process'}",
            hint="stop that agent, or give this one a state_dir of its own",
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return DirLock(fd)


def _sign(fd: int) -> None:
    os.ftruncate(fd, 0)
    try:
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as exc:
        # The pid only serves the message above; an agent must start on a full disk, or nothing could be deleted.
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
