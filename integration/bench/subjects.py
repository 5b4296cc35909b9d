"""What is measured: the reference chain and ours, as sequences of executables started by posix_spawn and waited for."""

from __future__ import annotations

import itertools
import json
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from integration.callers import PATH, Json, encode, variables
from integration.lab import REFERENCE, Container, Host
from integration.namespaces import CommandFailed

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Call:
    """One executable to be started: its path, its CNI_* variables and its standard input."""

    program: str
    env: dict[str, str]
    stdin: bytes


Calls = Generator[Call, bytes, None]


@dataclass(slots=True)
class Subject(ABC):
    """A network and how containers join it. `folder` holds its executables; `taken`: host port per container."""

    host: Host
    name: str
    number: int
    folder: str
    ports: bool = True
    masquerade: bool = True
    extra: Json = field(default_factory=dict)
    results: dict[str, Json] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    @property
    def bridge(self) -> str:
        return f"tb{self.number}"

    def wire(self, kind: str, ipam: Json) -> Json:
        ipam = {**ipam, "ranges": [[{"subnet": f"10.{self.number}.0.0/16"}]]}
        keys = {"bridge": self.bridge, "isGateway": True, "ipMasq": self.masquerade, "ipam": ipam, **self.extra}
        return {"cniVersion": "0.4.0", "name": self.name, "type": kind, **keys}

    def with_port(self, config: Json, container: str) -> Json:
        """The configuration with one published TCP port, the same at ADD and DEL."""
        if not self.ports:
            return config
        outer = self.taken.setdefault(container, 10_000 + next(_numbers) % 50_000)
        mapping = [{"hostPort": outer, "containerPort": 80, "protocol": "tcp"}]
        return {**config, "runtimeConfig": {"portMappings": mapping}}

    def call(self, verb: str, config: Json, container: Container, folder: str) -> Call:
        env = {**variables(verb, container.id, container.path, "eth0"), "PATH": PATH, "CNI_PATH": folder}
        env["TOWPATH_SOCKET"] = self.host.agent.socket
        return Call(f"{folder}/{config['type']}", env, encode(config))

    @abstractmethod
    def calls(self, verb: str, container: Container) -> Calls:
        """The executables that one ADD or DEL starts, in order."""


class Reference(Subject):
    """bridge + host-local, and portmap behind it where ports are wanted: two executables per ADD and per DEL."""

    def calls(self, verb: str, container: Container) -> Calls:
        wire = self.wire("bridge", {"type": "host-local", "dataDir": str(self.host.folder / "host-local")})
        mapper = {"cniVersion": "0.4.0", "name": self.name, "type": "portmap"}
        if verb == "ADD":
            self.results[container.id] = json.loads((yield self.call(verb, wire, container, REFERENCE)))
        result = {"prevResult": self.results[container.id]}
        if self.ports:
            config = self.with_port({**mapper, **result}, container.id)
            yield self.call(verb, config, container, REFERENCE)
        if verb == "DEL":
            yield self.call(verb, {**wire, **result}, container, REFERENCE)


class Ours(Subject):
    """towpath-bridge in one call."""

    def calls(self, verb: str, container: Container) -> Calls:
        wire = self.wire("towpath-bridge", {"type": "towpath-ipam"})
        config = self.with_port({**wire, "capabilities": {"portMappings": True}}, container.id)
        if verb == "DEL":
            config["prevResult"] = self.results[container.id]
        out = yield self.call(verb, config, container, self.folder)
        if verb == "ADD":
            self.results[container.id] = json.loads(out)


class Files:
    """Standard input and output of executables as files, so that nothing but the executable is in the time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def prepare(self, call: Call, slot: int) -> tuple[str, str]:
        stdin, stdout = str(self.folder / f"in{slot}"), str(self.folder / f"out{slot}")
        Path(stdin).write_bytes(call.stdin)
        return stdin, stdout

    def start(self, call: Call, stdin: str, stdout: str) -> int:
        """The process id. stderr goes to /dev/null: errors of CNI are on standard output."""
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, stdin, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
        ]
        return os.posix_spawn(call.program, [call.program], call.env, file_actions=actions)

    def finish(self, call: Call, status: int, stdout: str) -> bytes:
        said = Path(stdout).read_bytes()
        if status:
            verb = call.env["CNI_COMMAND"]
            raise CommandFailed(f"{verb} {call.program}: {said.decode(errors='replace')}")
        return said

    def run(self, call: Call) -> tuple[bytes, float]:
        """Output and seconds from just before posix_spawn to the end of wait."""
        stdin, stdout = self.prepare(call, 0)
        begin = time.perf_counter()
        _, status = os.waitpid(self.start(call, stdin, stdout), 0)
        seconds = time.perf_counter() - begin
        return self.finish(call, status, stdout), seconds


def one(files: Files, subject: Subject, verb: str, container: Container) -> float:
    """Seconds that all executables of one ADD or DEL took."""
    calls, total = subject.calls(verb, container), 0.0
    try:
        call = next(calls)
        while True:
            said, seconds = files.run(call)
            total += seconds
            call = calls.send(said)
    except StopIteration:
        return total


def many(files: Files, subject: Subject, verb: str, containers: Iterable[Container], width: int) -> float:
    """Seconds until all containers are through, `width` of them at once."""
    waiting = deque(subject.calls(verb, container) for container in containers)
    running: dict[int, tuple[Calls, Call, str, int]] = {}
    slots = list(range(1, width + 1))

    def start(calls: Calls, call: Call, slot: int) -> None:
        stdin, stdout = files.prepare(call, slot)
        running[files.start(call, stdin, stdout)] = (calls, call, stdout, slot)

    begin = time.perf_counter()
    while waiting or running:
        while waiting and slots:
            calls = waiting.popleft()
            start(calls, next(calls), slots.pop())
        pid, status = os.waitpid(-1, 0)
        calls, call, stdout, slot = running.pop(pid)
        try:
            start(calls, calls.send(files.finish(call, status, stdout)), slot)
        except StopIteration:
            slots.append(slot)
    return time.perf_counter() - begin
