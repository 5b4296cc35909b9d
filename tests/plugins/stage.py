"""What an executable meets on its way: a small agent that answers as told, and a caller with a bare environment."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

STAND_IN = """#!/bin/sh
# In place of the interpreter with towpath: tells how it was called, and answers with status 3.
echo "$TOWPATH_PLUGIN $CNI_COMMAND $*"
exec cat - >&2
exit 3
"""
Answer = Callable[[socket.socket], None]


@dataclass(frozen=True)
class Call:
    """One request as the agent read it."""

    head: bytes
    body: bytes

    @property
    def fields(self) -> dict[str, str]:
        lines = self.head.decode().split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @property
    def env(self) -> list[bytes]:
        return self.body.partition(b"\0\0")[0].split(b"\0")

    @property
    def stdin(self) -> bytes:
        return self.body.partition(b"\0\0")[2]


def reply(stdout: bytes, status: int = 0) -> bytes:
    """An answer as the agent gives it; field names come in any case (RFC 9110 section 5.1)."""
    head = f"HTTP/1.1 200 OK\r\nserver: x\r\nCONTENT-LENGTH: {len(stdout)}\r\nx-exit:  {status} \r\n\r\n"
    return head.encode() + stdout


def say(*pieces: bytes) -> Answer:
    """Send the pieces one by one and leave."""

    def answer(peer: socket.socket) -> None:
        for piece in pieces:
            peer.sendall(piece)

    return answer


class Agent:
    """Reads each request whole and answers with the next of `answers`, the last one for ever."""

    def __init__(self, path: Path, *answers: Answer) -> None:
        self.calls: list[Call] = []
        self._answers = list(answers)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # shutdown ends accept
            while True:
                peer, _ = self._socket.accept()
                with peer, contextlib.suppress(OSError):
                    self._read(peer)
                    (self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])(peer)

    def _read(self, peer: socket.socket) -> None:
        got = b""
        while b"\r\n\r\n" not in got:
            got += peer.recv(65536)
        head, _, first = got.partition(b"\r\n\r\n")
        chunks, size = [first], len(first)
        while size < int(Call(head, b"").fields["content-length"]):
            chunks.append(peer.recv(65536))
            size += len(chunks[-1])
        self.calls.append(Call(head, b"".join(chunks)))


def call(
    executable: Path, command: str = "ADD", stdin: bytes = b"", env: Mapping[bytes, bytes] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run the executable with this environment and nothing else."""
    whole = {b"CNI_COMMAND": command.encode(), **(env or {})}
    return subprocess.run([executable], env=whole, input=stdin, capture_output=True, timeout=30, check=False)
