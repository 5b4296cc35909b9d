"""Namespaces of a process of ours: made with unshare, entered with setns, furnished with bind mounts.

Calls libc through ctypes: `os.unshare` and `os.setns` came with Python 3.12. Every function changes the calling process
(or its mount namespace) and belongs into a child that is about to exec, or into a process that has one thread only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from errno import EINVAL, ENOENT
from pathlib import Path

CLONE_NEWNS = 0x00020000  # linux/sched.h
CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000  # linux/mount.h
MS_REC = 0x4000
MS_SLAVE = 0x80000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
SIOCGIFFLAGS = 0x8913  # linux/sockios.h
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: object, about: str = "") -> None:
    if getattr(_libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}", about or None)


def unshare(flags: int) -> None:
    _call("unshare", ctypes.c_int(flags))


def enter(path: str, kind: int) -> None:
    """Move this thread into the namespace at `path`; for a mount namespace the process must have one thread."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", ctypes.c_int(fd), ctypes.c_int(kind), about=path)
    finally:
        os.close(fd)


def mount(source: str, target: str, flags: int) -> None:
    args = (source.encode(), target.encode(), None, ctypes.c_ulong(flags), None)
    _call("mount", *args, about=target)


def unmount(target: str) -> None:
    """Gone afterwards, also while in use; what is no mount point or does not exist is gone already."""
    try:
        _call("umount2", os.fsencode(target), ctypes.c_int(MNT_DETACH), about=target)
    except OSError as exc:
        if exc.errno not in (EINVAL, ENOENT):  # EINVAL: not a mount point, see umount2(2)
            raise


def prctl(option: int, value: int) -> None:
    _call("prctl", ctypes.c_int(option), *(ctypes.c_ulong(v) for v in (value, 0, 0, 0)))


def hold_netns(pid: int, path: Path) -> None:
    """Give the network namespace of `pid` a name that outlives it: bind-mounted at `path`, as `ip netns` does."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.touch(mode=0o444, exist_ok=False)
    mount(f"/proc/{pid}/ns/net", str(path), MS_BIND)


def drop_netns(path: Path) -> None:
    """Take the name away; the namespace ends with its last process."""
    unmount(str(path))
    path.unlink(missing_ok=True)


def mounted_below(folder: Path, mountinfo: str) -> list[str]:
    """Mount points in that folder, from the text of /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    points = (line.split(" ", 5)[4] for line in mountinfo.splitlines())
    decoded = (point.encode().decode("unicode_escape") for point in points)  # a space is written \040
    return [point for point in decoded if Path(point).parent == folder]


def private_mounts(held: Path) -> None:
    """A mount namespace of this process's own: the host's changes come in, ours never get out.

    The copy also copied the names of other runs' network namespaces in `held`, which would keep those alive for as
    long as we live: they are let go.
    """
    unshare(CLONE_NEWNS)
    mount("none", "/", MS_REC | MS_SLAVE)
    for point in mounted_below(held, Path("/proc/self/mountinfo").read_text()):
        unmount(point)


def cover(target: str, source: Path) -> bool:
    """Show `source` at `target` in this mount namespace. False where the host has no such file to cover."""
    real = os.path.realpath(target)  # /etc/resolv.conf is often a link into /run
    if not Path(real).exists():
        return False
    mount(str(source), real, MS_BIND)
    return True


def loopback_up() -> None:
    """Bring `lo` up in the current network namespace: a command expects 127.0.0.1 to answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        ask = struct.pack("16sh14x", b"lo", 0)  # struct ifreq: name, flags (netdevice(7))
        flags: int = struct.unpack_from("16sh", fcntl.ioctl(control, SIOCGIFFLAGS, ask))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def join(pid: int, *, net: bool) -> None:
    """Enter the mount namespace of `pid`, and its network namespace too; the working folder stays where it exists."""
    here = Path.cwd()
    root = f"/proc/{pid}/ns"
    if net:
        enter(f"{root}/net", CLONE_NEWNET)
    enter(f"{root}/mnt", CLONE_NEWNS)
    with contextlib.suppress(OSError):  # setns left us at its root; a folder that only we see is no reason to fail
        os.chdir(here)
