"""etcd members on loopback for the tests: started in a temporary folder, killed when the tests are over."""

from __future__ import annotations

import atexit
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

MISSING = "etcd is not installed (apt-get install etcd-server)"
START_LIMIT = 15.0


def installed() -> bool:
    return shutil.which("etcd") is not None


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Member:
    """One etcd process. Its folder stays when it is killed, so that it can be started again."""

    def __init__(self, folder: Path, name: str, extra: Sequence[str] = ()) -> None:
        self.name = name
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.peer = f"http://127.0.0.1:{free_port()}"
        self._folder = folder / name
        self._extra = extra
        self._process: subprocess.Popen[bytes] | None = None
        self.scheme = "https" if "--client-cert-auth" in extra else "http"

    def start(self, cluster: str) -> None:
        url = f"{self.scheme}://{self.endpoint}"
        log = self._folder.with_suffix(".log").open("ab")
        command: list[str | Path] = [
            "etcd",
            "--name",
            self.name,
            "--data-dir",
            self._folder,
            "--unsafe-no-fsync",
            "--logger",
            "zap",
        ]
        command += ["--log-level", "error", "--listen-client-urls", url, "--advertise-client-urls", url]
        command += ["--listen-peer-urls", self.peer, "--initial-advertise-peer-urls", self.peer]
        command += [
            "--initial-cluster",
            cluster,
            "--heartbeat-interval",
            "50",
            "--election-timeout",
            "500",
            *self._extra,
        ]
        self._process = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
        self._process = None

    def pause(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"http://{self.endpoint}{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=2) as answer:
            said: dict[str, Any] = json.load(answer)
        return said


class Engine:
    """A cluster of `size` members."""

    def __init__(self, size: int, extra: Sequence[str] = ()) -> None:
        self._temp = tempfile.TemporaryDirectory(prefix="towpath-etcd-")
        self.members = [Member(Path(self._temp.name), f"m{n}", extra) for n in range(size)]

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self.members)

    def start(self) -> None:
        for member in self.members:
            member.start(self.cluster)

    @property
    def cluster(self) -> str:
        return ",".join(f"{member.name}={member.peer}" for member in self.members)

    def wait(self) -> None:
        """Until every member knows a leader."""
        end = time.monotonic() + START_LIMIT
        for member in self.members:
            while not self._ready(member):
                assert time.monotonic() < end, f"etcd member {member.name} does not come up"
                time.sleep(0.05)

    def leader(self) -> Member:
        for member in self.members:
            said = member.post("/v3/maintenance/status", {})
            if said["leader"] == said["header"]["member_id"]:
                return member
        raise AssertionError("no member leads")

    def stop(self) -> None:
        for member in self.members:
            member.kill()
        self._temp.cleanup()

    @staticmethod
    def _ready(member: Member) -> bool:
        try:
            return "leader" in member.post("/v3/maintenance/status", {})
        except (OSError, urllib.error.URLError):
            return False


@cache
def one_member() -> Member:
    """The engine of the tests that need no faults: started once per run."""
    engine = Engine(1)
    atexit.register(engine.stop)
    engine.start()
    engine.wait()
    return engine.members[0]


def fresh_origin(member: Member) -> int:
    """Where a store can begin as if nobody had written before: no old lease will end meanwhile."""
    for lease in member.post("/v3/lease/leases", {}).get("leases", ()):
        member.post("/v3/lease/revoke", {"ID": lease["ID"]})
    return int(member.post("/v3/kv/range", {"key": "AA=="})["header"]["revision"])
