"""A host with two bridges, three containers and an uplink, and small servers and clients in each, for firewall tests.

c0 10.1.0.10, c1 10.1.0.11 on br0     c2 10.2.0.10 on br1     c3 192.0.2.2 is the world outside
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, TypeVar

from tests.kernel.box import Box, box
from towpath.kernel.conntrack import Conntrack
from towpath.kernel.contract import Firewall
from towpath.kernel.iptables import Iptables
from towpath.kernel.netns import open_netns, setns
from towpath.kernel.nft import Nftables
from towpath.plan import AddRule, DropRule, Rule

T = TypeVar("T")
HOST, OUTSIDE = -1, 3
UPLINK = {4: "192.0.2.1", 6: "2001:db8::1"}
SECOND = {4: "192.0.2.3", 6: "2001:db8::3"}
WORLD = {4: "192.0.2.2", 6: "2001:db8::2"}
GATEWAY = {4: "10.1.0.1", 6: "fd01::1"}
PLACES = [("br0", 1, 0x10), ("br0", 1, 0x11), ("br1", 2, 0x10)]  # home, subnet, last part of the address
KINDS = {"tcp": (socket.SOCK_STREAM, 0), "udp": (socket.SOCK_DGRAM, 0), "sctp": (socket.SOCK_STREAM, 132)}
PATIENCE, QUIET = 2.0, 0.12  # seconds that a client waits for an answer that is to come, and for one that is not


def of(container: int, version: int = 4) -> IPv4Address | IPv6Address:
    """The address of a container."""
    _, subnet, last = PLACES[container]
    return ip_address(f"10.{subnet}.0.{last:x}" if version == 4 else f"fd0{subnet}::{last:x}")


def mac_of(container: int) -> str:
    return f"02:00:00:00:02:{container:02x}"


@dataclass
class Server:
    """Answers on one port with its name and who asked; over TCP and SCTP to each connection, over UDP each datagram."""

    name: str
    sock: socket.socket

    def answer(self) -> None:
        try:
            if self.sock.type == socket.SOCK_DGRAM:
                _, peer = self.sock.recvfrom(100)
                self.sock.sendto(self.text(peer), peer)
            else:
                connection, peer = self.sock.accept()
                with connection:
                    connection.sendall(self.text(peer))
        except OSError:
            return  # the client gave up

    def text(self, peer: Any) -> bytes:
        return f"{self.name} {peer[0].removeprefix('::ffff:')}".encode()


class Lab:
    """`wall` is the back end under test; what it does happens in the host's namespace."""

    def __init__(self, host: Box, wall: Firewall) -> None:
        self.host = host
        self.wall = wall
        self.conntrack = Conntrack()
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait until all neighbours are known: the ports of a new bridge do not forward from the first moment on."""
        for address in [of(n, v) for n in range(len(PLACES)) for v in (4, 6)] + [WORLD[4], WORLD[6]]:
            for _ in range(20):
                with self.client(HOST, str(address)) as sock:
                    if sock.connect_ex((str(address), 9)) == errno.ECONNREFUSED:
                        break
            else:
                raise AssertionError(f"{address} cannot be reached")

    # --- the firewall ------------------------------------------------------------------------------------------------

    def add(self, *rules: Rule) -> None:
        self.host.inside(lambda: self.wall.commit(tuple(map(AddRule, rules))))

    def drop(self, *rules: Rule) -> None:
        self.host.inside(lambda: self.wall.commit(tuple(map(DropRule, rules))))

    @contextmanager
    def having(self, *rules: Rule) -> Iterator[None]:
        """The rules hold within the block; after it the ruleset is what it was, and no flow is remembered."""
        self.host.inside(lambda: self.wall.heal(()))
        before = self.ruleset()
        self.add(*rules)
        try:
            yield
        finally:
            self.drop(*rules)
            self.host.run("conntrack", "-F", check=False)
        left = [line for line in self.ruleset() if line not in before]
        assert not [line for line in left if "10.1.0.1" in line or "CNI-DN" in line or "br0" in line], left

    def heal(self, *rules: Rule) -> int:
        return self.host.inside(lambda: self.wall.heal(rules))

    def seen(self) -> frozenset[object]:
        return self.host.inside(self.wall.seen)

    def ruleset(self) -> list[str]:
        """What nft prints; where iptables works, its rules are in there too."""
        return self.host.run("nft", "-s", "list", "ruleset").splitlines()

    def set(self, path: str, value: str) -> bool:
        """Write a kernel setting of the host; False where it has none of that name."""
        return not subprocess.run(
            ["/usr/bin/nsenter", f"--net=/run/netns/{self.host.host}", "sh", "-c", f"echo {value} > /proc/sys/{path}"],
            capture_output=True,
            check=False,
        ).returncode

    # --- traffic -----------------------------------------------------------------------------------------------------

    def at(self, place: int, work: Callable[[], T]) -> T:
        """What `work` returns in a namespace: in a thread that goes there and dies."""
        name = self.host.host if place == HOST else self.host.containers[place]
        found: list[T] = []
        failed: list[BaseException] = []

        def go() -> None:
            fd = open_netns(f"/run/netns/{name}")
            try:
                setns(fd)
                found.append(work())
            except BaseException as failure:
                failed.append(failure)
            finally:
                os.close(fd)

        thread = threading.Thread(target=go)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    def serve(self, place: int, *ports: int, kind: str = "tcp", name: str = "") -> None:
        """A server on all addresses of both families; it lives as long as the lab."""

        def listen(port: int) -> socket.socket:
            sock = socket.socket(socket.AF_INET6, *KINDS[kind])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::", port))
            if kind != "udp":
                sock.listen()
            return sock

        for port in ports:
            server = Server(name or f"c{place}", self.at(place, lambda port=port: listen(port)))  # type: ignore[misc]
            self._selector.register(server.sock, selectors.EVENT_READ, server)
        self._bell.send(b".")

    def client(
        self, place: int, address: str, kind: str = "tcp", source: int = 0, wait: float = PATIENCE
    ) -> socket.socket:
        def make() -> socket.socket:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family, *KINDS[kind])
            sock.settimeout(wait)
            if source:
                sock.bind(("::" if ":" in address else "0.0.0.0", source))
            return sock

        return self.at(place, make)

    def silent(self, place: int, address: object, port: int, kind: str = "tcp") -> bool:
        """Whether no answer comes."""
        return self.ask(place, address, port, kind, wait=QUIET) is None

    def ask(self, place: int, address: object, port: int, kind: str = "tcp", wait: float = PATIENCE) -> str | None:
        """`<server> <who it saw>`; None where there is no answer."""
        with self.client(place, str(address), kind, wait=wait) as sock:
            try:
                sock.connect((str(address), port))
                if kind == "udp":
                    sock.send(b"?")
                return sock.recv(100).decode() or None
            except OSError:
                return None

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    key.data.answer()
                elif self._ear.recv(1) == b"!":
                    return

    def close(self) -> None:
        self._bell.send(b"!")
        self._thread.join(5)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._bell.close()
        self.conntrack.close()
        self.wall.close()  # type: ignore[attr-defined]


def backend(name: str) -> Firewall:
    return Iptables() if name == "iptables" else Nftables(plain=name == "plain nft")


@contextmanager
def lab(name: str) -> Iterator[Lab]:
    with box(4) as host:
        host.run("sh", "-c", "\n".join(("set -e", *_wiring(host))))
        made = Lab(host, backend(name))
        try:
            made.settle()
            yield made
        finally:
            made.close()


def _wiring(host: Box) -> Iterator[str]:
    for bridge, subnet in (("br0", 1), ("br1", 2)):
        yield f"ip link add {bridge} up type bridge"
        yield f"ip addr add 10.{subnet}.0.1/16 dev {bridge}; ip addr add fd0{subnet}::1/64 dev {bridge} nodad"
    for number, (bridge, subnet, _) in enumerate(PLACES):
        yield f"ip link add v{number} type veth peer name eth0 address {mac_of(number)} netns {host.containers[number]}"
        yield f"ip link set v{number} up master {bridge}; bridge link set dev v{number} hairpin on"
        yield from _inside(host.containers[number], (f"{of(number)}/16", f"{of(number, 6)}/64"))
        yield from _routes(host.containers[number], (f"10.{subnet}.0.1", f"fd0{subnet}::1"))
    yield f"ip link add up0 type veth peer name eth0 netns {host.containers[OUTSIDE]}; ip link set up0 up"
    for address in (
        f"{UPLINK[4]}/24",
        f"{SECOND[4]}/24",
        f"{UPLINK[6]}/64 nodad",
        f"{SECOND[6]}/64 nodad preferred_lft 0",
    ):
        yield f"ip addr add dev up0 {address}"
    yield from _inside(host.containers[OUTSIDE], (f"{WORLD[4]}/24", f"{WORLD[6]}/64", "198.51.100.1/32"))
    yield f"ip -n {host.containers[OUTSIDE]} route add 10.0.0.0/8 via {UPLINK[4]}"
    yield f"ip -n {host.containers[OUTSIDE]} -6 route add fd00::/8 via {UPLINK[6]}"
    yield "ip link set lo up"
    for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/br0/route_localnet"):
        yield f"echo 1 > /proc/sys/net/{setting}"


def _inside(name: str, addresses: tuple[str, ...]) -> Iterator[str]:
    yield f"ip -n {name} link set lo up; ip -n {name} link set eth0 up"
    for address in addresses:
        yield f"ip -n {name} addr add {address} dev eth0 {'nodad' if ':' in address else ''}"


def _routes(name: str, gateways: tuple[str, str]) -> Iterator[str]:
    yield f"ip -n {name} route add default via {gateways[0]}; ip -n {name} -6 route add default via {gateways[1]}"
