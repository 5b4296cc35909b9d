"""Runs the iptables programs: reading whole tables and writing them in one go, in the calling thread's namespace."""

from __future__ import annotations

import subprocess

from towpath.errors import PhaseFailed, Unavailable

PREFIX = {4: "ip", 6: "ip6"}
PATIENCE = 30  # seconds; the lock of the legacy variant may be held by others


def save(version: int, table: str = "") -> str:
    """What iptables-save prints of one table, or of all. Raises PhaseFailed, or Unavailable where it is missing."""
    return _run(f"{PREFIX[version]}tables-save", *(("-t", table) if table else ()), because="reading the host's rules")


def restore(version: int, text: str, because: object) -> None:
    """Write `text` beside what is there, one transaction per table. Raises PhaseFailed naming `because`."""
    _run(f"{PREFIX[version]}tables-restore", "-w", str(PATIENCE), "--noflush", text=text, because=because)


def _run(program: str, *arguments: str, because: object, text: str = "") -> str:
    try:
        done = subprocess.run(
            [program, *arguments], input=text.encode(), capture_output=True, timeout=2 * PATIENCE, check=False
        )
    except FileNotFoundError:
        raise Unavailable(f"the program {program} is missing", hint="install it: apt-get install iptables") from None
    except subprocess.TimeoutExpired:
        raise PhaseFailed("firewall", because, 0, f"{program} did not end within {2 * PATIENCE} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise PhaseFailed("firewall", because, 0, said or f"{program} ended with code {done.returncode}")
    return done.stdout.decode(errors="replace")
