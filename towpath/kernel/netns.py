"""Enters network namespaces: a thread goes in, does its work and comes back, or it dies (namespaces(7), setns(2))."""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from towpath.errors import BadNetns

CLONE_NEWNET = 0x40000000
NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)
OWN = "/proc/thread-self/ns/net"


class Lost(BaseException):
    """This thread could not return to its own namespace: it must end, whatever handlers are around it."""


if sys.version_info >= (3, 12):

    def setns(fd: int) -> None:
        os.setns(fd, CLONE_NEWNET)

else:
    _libc = ctypes.CDLL(None, use_errno=True)

    def setns(fd: int) -> None:
        if _libc.setns(fd, CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def open_netns(path: str) -> int:
    """A file descriptor of the network namespace at `path`; raises BadNetns naming the path and what is wrong."""
    try:
        # A look before the open: opening a FIFO or a device that somebody named here would block or have effects.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            raise BadNetns(f"{path!r} is not a network namespace")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as refusal:
        why = refusal.strerror if isinstance(refusal, OSError) and refusal.strerror else str(refusal)
        raise BadNetns(f"network namespace {path!r} cannot be opened: {why}") from None
    if not is_netns(fd):
        os.close(fd)
        raise BadNetns(f"{path!r} is not a network namespace")
    return fd


def is_netns(fd: int) -> bool:
    try:
        return fcntl.ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False  # ENOTTY: a plain file, such as the mount point that a namespace leaves behind


def netns_id(path: str) -> int:
    """Inode of the network namespace at `path`; 0 where there is none."""
    try:
        fd = open_netns(path)
    except BadNetns:
        return 0
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


@contextmanager
def inside(fd: int, home: int) -> Iterator[None]:
    """The calling thread is in the namespace `fd` within the block and in `home` after it; Lost where it is not.

    Never from the main thread: /proc/self and every thread born later would follow it.
    """
    setns(fd)
    try:
        yield
    finally:
        try:
            setns(home)
        except OSError as refusal:
            raise Lost("cannot return to the agent's network namespace") from refusal
