"""Reads and writes kernel settings below /proc/sys; what is under net/ belongs to the calling thread's namespace.

The kernel resolves /proc/sys/net by the network namespace of the thread that opens the file, so a thread that went into
a container's namespace reads and writes the container's settings by the same paths.
In a container /proc/sys is often mounted read-only: then a procfs of our own, attached nowhere (fsmount(2)), is used.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading

from towpath.errors import BadConfig

FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432  # syscall numbers, the same on every architecture; Linux 5.2
FSCONFIG_CMD_CREATE, FSMOUNT_CLOEXEC = 6, 1

_lock = threading.Lock()
_private: list[int] = []  # the root of our own procfs, once it was needed


def write(path: str, value: str) -> None:
    """Write `value` to /proc/sys/<path>. Raises OSError; ENOENT where there is no such setting."""
    wanted = value.encode() + b"\n"
    try:
        _write("/proc/sys/" + checked(path), wanted, None)
    except OSError as refusal:
        if refusal.errno != errno.EROFS:
            raise
        if read(path) == value:
            return
        _write("sys/" + path, wanted, private_procfs())


def read(path: str) -> str | None:
    """Value of /proc/sys/<path> without the newline; None where there is no such setting."""
    try:
        fd = os.open("/proc/sys/" + checked(path), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, 4096).decode(errors="replace").rstrip("\n")
    finally:
        os.close(fd)


def checked(path: str) -> str:
    """`path` unless it would leave /proc/sys: settings come from users' network configurations."""
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise BadConfig(f"sysctl {path!r} is not a path below /proc/sys")
    return path


def _write(path: str, value: bytes, root: int | None) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=root)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)


def private_procfs() -> int:
    """Descriptor of the root of a writable procfs that only this process sees; mounted at the first call."""
    with _lock:
        if not _private:
            _private.append(_mount_procfs())
        return _private[0]


def _mount_procfs() -> int:
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        result: int = libc.syscall(number, *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot mount a private procfs: {os.strerror(code)}")
        return result

    context = call(FSOPEN, b"proc", 1)
    try:
        call(FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return call(FSMOUNT, context, FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
