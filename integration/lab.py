"""A whole node in a namespace of its own: uplink, agent, executables, containers; and what it leaves behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import yaml

from integration.callers import Exec, Json
from integration.namespaces import CommandFailed, Netns
from integration.sockets import Answer, Server, ask

TOWPATH = str(Path(sys.executable).parent / "towpath")
REFERENCE = "/usr/lib/cni"  # Debian's containernetworking-plugins
UPLINK = "192.0.2.1"
OUTSIDE = "192.0.2.2"
UPLINK6 = "2001:db8::1"
OUTSIDE6 = "2001:db8::2"


class Container:
    """A namespace with a container id, and servers in it."""

    def __init__(self, hint: str = "c") -> None:
        self.netns = Netns(f"{hint}-")
        self.id = self.netns.name
        self.servers: list[Server] = []
        self.gone = False

    @property
    def path(self) -> str:
        return self.netns.path

    def serve(self, *, tcp: tuple[int, ...] = (), udp: tuple[int, ...] = ()) -> Server:
        self.servers.append(Server(self.netns, self.id, tcp=tcp, udp=udp))
        return self.servers[-1]

    def ask(self, address: str, port: int, kind: str = "tcp", *, wait: float = 2.0) -> Answer:
        return ask(self.netns, address, port, kind, wait=wait)

    def link(self, ifname: str = "eth0") -> Json | None:
        """The interface as `ip -d -j` shows it; None = there is none."""
        return links(self.netns).get(ifname)

    def addresses(self, ifname: str = "eth0") -> list[str]:
        """Global addresses of the interface with prefix."""
        link = links(self.netns, "addr").get(ifname, {})
        return [f"{a['local']}/{a['prefixlen']}" for a in link.get("addr_info", ()) if a["scope"] == "global"]

    def remove(self) -> None:
        """The container dies: its servers close and its namespace goes."""
        for server in self.servers:
            server.close()
        self.servers.clear()
        self.netns.remove()
        self.gone = True


def links(netns: Netns, what: str = "link") -> dict[str, Json]:
    """Links of a namespace by name, as `ip -d -j` shows them (what="addr": with addresses)."""
    return {link["ifname"]: link for link in json.loads(netns.run("ip", "-d", "-j", what, "show") or "[]")}


class UnixHTTP(HTTPConnection):
    """http.client over a unix socket."""

    def __init__(self, path: str, timeout: float = 10) -> None:
        super().__init__("towpath", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Agent:
    """One `towpath agent` process on a host; it can be stopped, killed, and started again on the same state."""

    def __init__(self, netns: Netns, folder: Path, settings: Mapping[str, Any]) -> None:
        self.netns = netns
        self.socket = str(folder / "agent.sock")
        self.state = folder / "state"
        self.log = folder / "agent.log"
        self.config = folder / "towpath.yaml"
        self.process: subprocess.Popen[bytes] | None = None
        self.config.write_text(yaml.safe_dump({"state_dir": str(self.state), "socket": self.socket, **settings}))

    def start(self, *, wait: float = 20, wrap: tuple[str, ...] = ()) -> float:
        """Start it (`wrap`: by this program) and wait until it serves; returns the seconds. Raises CommandFailed."""
        begin = time.monotonic()
        with self.log.open("ab") as log:
            # setpriv: where the tests themselves are killed, their agents go too
            self.process = self.netns.start(
                "setpriv",
                "--pdeathsig",
                "KILL",
                *wrap,
                TOWPATH,
                "agent",
                "--config",
                str(self.config),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() - begin > wait:
                self.kill()
                raise CommandFailed(f"the agent does not serve:\n{self.tail()}")
            time.sleep(0.01)
        return time.monotonic() - begin

    def _answers(self) -> bool:
        try:
            self.get("/v1/status")
        except OSError:
            return False
        return True

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def get(self, path: str) -> Any:
        """JSON of one GET of the control API."""
        return self.request("GET", path)

    def request(self, method: str, path: str, body: object = None) -> Any:
        """JSON of one request of the control API. Raises CommandFailed where the agent says no."""
        connection = UnixHTTP(self.socket)
        with contextlib.closing(connection):
            connection.request(method, path, body=None if body is None else json.dumps(body))
            response = connection.getresponse()
            text = response.read()
        if response.status >= 400:
            raise CommandFailed(f"{method} {path}: {response.status} {text.decode(errors='replace')}")
        return json.loads(text) if text else None

    def forget(self, network: str) -> None:
        """Remove a network's row; no agent, or no such row, is no error."""
        if self.process is None:
            return
        if network in {row["name"] for row in self.get("/v1/networks")}:
            self.request("DELETE", f"/v1/networks/{network}")

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: it gets no chance to tidy up."""
        self._end(signal.SIGKILL)

    def _end(self, sign: signal.Signals) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(sign)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        self.process = None

    def restart(self) -> float:
        self.stop()
        return self.start()

    def tail(self, size: int = 6000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else ""


class Host:
    """A node: namespace, uplink 192.0.2.1 to the `outside` 192.0.2.2, folder of its own, agent, executables.

    settings: keys of the agent's configuration beside state_dir and socket.
    """

    def __init__(self, **settings: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tpt-"))
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        self.netns = Netns("host-")
        self.outside = Netns("out-")
        self.containers: list[Container] = []
        self.servers: list[Server] = []
        self.numbers = itertools.cycle(range(1, 200))  # of its networks
        self.agent = Agent(self.netns, self.folder, settings)
        self._wire()

    def _wire(self) -> None:
        run = self.netns.run
        run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "uplink", "netns", self.outside.name)
        ends = ((self.netns, UPLINK, UPLINK6), (self.outside, OUTSIDE, OUTSIDE6))
        for netns, v4, v6 in ends:
            netns.run("ip", "link", "set", "uplink", "up")
            netns.run("ip", "addr", "add", f"{v4}/24", "dev", "uplink")
            netns.run("ip", "addr", "add", f"{v6}/64", "dev", "uplink", "nodad")
        run("ip", "route", "add", "default", "via", OUTSIDE)
        run("ip", "-6", "route", "add", "default", "via", OUTSIDE6)

    def start(self) -> Host:
        """Install the executables, start the agent."""
        self.towpath("cni", "install", str(self.bin))
        self.agent.start()
        return self

    def towpath(self, *argv: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
        """Run the `towpath` command on this host against its agent."""
        done = self.netns.call(TOWPATH, *argv, env=self.env, timeout=timeout)
        if check and done.returncode:
            raise CommandFailed(
                f"towpath {' '.join(argv)}: exit {done.returncode}\n{(done.stdout + done.stderr).decode()}"
            )
        return done

    @property
    def env(self) -> dict[str, str]:
        path = "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "TOWPATH_SOCKET": self.agent.socket, "LC_ALL": "C.UTF-8"}

    def exec(self, *folders: str) -> Exec:
        """A starter of executables: ours first, then Debian's reference plugins."""
        return Exec(self.netns, folders or (str(self.bin), REFERENCE), {"TOWPATH_SOCKET": self.agent.socket})

    def container(self, hint: str = "c") -> Container:
        self.containers.append(Container(hint))
        return self.containers[-1]

    def serve(self, *, tcp: tuple[int, ...] = (), udp: tuple[int, ...] = ()) -> Server:
        """A server on the host itself."""
        self.servers.append(Server(self.netns, "host", tcp=tcp, udp=udp))
        return self.servers[-1]

    def sysctl(self, path: str, value: str | None = None) -> str:
        """Read, or write, a file below /proc/sys as this namespace sees it."""
        file = Path("/proc/sys") / path
        with self.netns.inside():
            if value is not None:
                file.write_text(value)
            return file.read_text().strip()

    def close(self) -> None:
        """Everything of this host is gone afterwards, whatever failed before."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            stack.callback(self.outside.remove)
            stack.callback(self.netns.remove)
            for server in self.servers:
                stack.callback(server.close)
            for container in self.containers:
                stack.callback(container.remove)
            stack.callback(self.agent.kill)
