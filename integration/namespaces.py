"""A network namespace of the lab: made, entered for a moment, and always removed."""

from __future__ import annotations

import secrets
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from nsenter import Namespace

FOLDER = Path("/var/run/netns")
PREFIX = "tpt-"

# nsenter goes back to the namespace of the process's first thread, so two threads may not be on the way at once. What
# is done inside is short: to start a process, or to make a socket. Both keep the namespace they were made in.
_way = threading.Lock()


class CommandFailed(AssertionError):
    """A program of the lab ended with an exit status that was not wanted; the message holds all it said."""


class Netns:
    """One namespace below /var/run/netns, with `lo` up. Its name begins with `tpt-`, so that it can be told apart."""

    alive: ClassVar[set[str]] = set()  # names made by this process and not yet removed

    def __init__(self, hint: str = "") -> None:
        self.name = f"{PREFIX}{hint}{secrets.token_hex(4)}"
        subprocess.run(["ip", "netns", "add", self.name], check=True, capture_output=True)
        Netns.alive.add(self.name)
        self.run("ip", "link", "set", "lo", "up")

    @property
    def path(self) -> str:
        return str(FOLDER / self.name)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is in the namespace until the block ends. Only short things may be done in it."""
        with _way, Namespace(self.path, "net"):
            yield

    def start(self, *argv: str, env: Mapping[str, str] | None = None, **options: object) -> subprocess.Popen[bytes]:
        """Start a program that lives in this namespace. `options` are Popen's."""
        with self.inside():
            return subprocess.Popen(list(argv), env=env, **options)  # type: ignore[call-overload, no-any-return]

    def call(
        self, *argv: str, stdin: bytes = b"", env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program in this namespace to its end, whatever its exit status is."""
        pipe = subprocess.PIPE
        process = self.start(*argv, env=env, stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            out, err = process.communicate(stdin, timeout)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def run(self, *argv: str, stdin: str = "", timeout: float = 60) -> str:
        """Standard output of a program that must succeed. Raises CommandFailed."""
        done = self.call(*argv, stdin=stdin.encode(), timeout=timeout)
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise CommandFailed(f"{' '.join(argv)} in {self.name}: exit {done.returncode}\n{said}")
        return done.stdout.decode()

    def remove(self) -> None:
        """The name goes; the kernel takes down what is inside once nobody lives there any more. Twice is no error."""
        if self.name in Netns.alive:
            subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)
            Netns.alive.discard(self.name)
