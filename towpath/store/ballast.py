"""A file that takes up room for nothing, so that a full disk has some left for deletes: they free the rest."""

from __future__ import annotations

import errno
import os
from pathlib import Path

SIZE = 1 << 20  # bytes
FULL = (errno.ENOSPC, errno.EDQUOT)


class Ballast:
    """<dir>/ballast. held: it is there with all its blocks."""

    def __init__(self, directory: Path, size: int = SIZE) -> None:
        self._directory = directory
        self._path = directory / "ballast"
        self._size = size
        self.held = False

    def open(self) -> None:
        """Find it, or make it where there is room."""
        try:
            self.held = self._path.stat().st_blocks * 512 >= self._size
        except FileNotFoundError:
            self.held = False
        self.take()

    def take(self) -> bool:
        """Be held if there is room for it and as much again, lest it come and go; returns whether it is."""
        if not self.held and self._room() >= 2 * self._size:
            self.held = self._allocate()
        return self.held

    def drop(self) -> bool:
        """Give the room back; returns False where there was none to give."""
        had = self.held
        self.held = False
        self._path.unlink(missing_ok=True)
        return had

    def _room(self) -> int:
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize

    def _allocate(self) -> bool:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self._size)
        except OSError as exc:
            if exc.errno not in FULL:
                raise
            self._path.unlink()
            return False
        finally:
            os.close(fd)
        return True
