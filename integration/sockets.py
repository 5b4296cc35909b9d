"""Small servers and clients in namespaces of the lab: the sockets live there, the threads here."""

from __future__ import annotations

import selectors
import socket
import threading
from dataclasses import dataclass

from integration.namespaces import Netns

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@dataclass(frozen=True, slots=True)
class Answer:
    """Who answered, and from which address the server saw the question come."""

    server: str
    seen_from: str


class Unreachable(Exception):
    """No server answered: refused, no route, or silence."""


class Server:
    """Answers every connection and every datagram with `NAME PEER`, on all addresses of both families."""

    def __init__(self, netns: Netns, name: str, *, tcp: tuple[int, ...] = (), udp: tuple[int, ...] = ()) -> None:
        self.name = name
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._selector.register(self._ear, selectors.EVENT_READ)
        with netns.inside():
            for kind, ports in (("tcp", tcp), ("udp", udp)):
                for port in ports:
                    self._selector.register(listener(kind, port), selectors.EVENT_READ, kind)
        self._thread = threading.Thread(target=self._serve, name=f"server {name}", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                self._answer(sock, key.data)

    def _answer(self, sock: socket.socket, kind: str) -> None:
        try:
            if kind == "udp":
                _, peer = sock.recvfrom(2048)
                sock.sendto(self._text(peer), peer)
            else:
                connection, peer = sock.accept()
                with connection:
                    connection.sendall(self._text(peer))
        except OSError:
            return  # the client went away, or the address it came through did

    def _text(self, peer: tuple[str, int]) -> bytes:
        return f"{self.name} {peer[0].removeprefix('::ffff:')}".encode()

    def close(self) -> None:
        self._bell.send(b"!")
        self._thread.join(5)
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._bell.close()
        self._selector.close()


def listener(kind: str, port: int) -> socket.socket:
    """A socket on `port` of both families, in the namespace that the caller is in."""
    sock = socket.socket(socket.AF_INET6, KINDS[kind])
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("::", port))
    if kind == "tcp":
        sock.listen(64)
    return sock


def client(netns: Netns, address: str, kind: str = "tcp") -> socket.socket:
    """An unconnected socket of the address's family that lives in `netns`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with netns.inside():
        return socket.socket(family, KINDS[kind])


def ask(netns: Netns, address: str, port: int, kind: str = "tcp", *, wait: float = 2.0, source: str = "") -> Answer:
    """Ask the server at address:port from inside `netns`. Raises Unreachable after at most `wait` seconds."""
    with client(netns, address, kind) as sock:
        sock.settimeout(wait)
        try:
            if source:
                sock.bind((source, 0))
            sock.connect((address, port))
            if kind == "udp":
                sock.send(b"?")
            words = sock.recv(2048).decode().split()
        except OSError as exc:
            raise Unreachable(f"{kind} {address}:{port} from {netns.name}: {exc}") from exc
        if len(words) != 2:
            raise Unreachable(f"{kind} {address}:{port} from {netns.name}: closed without an answer")
        return Answer(*words)


def reaches(netns: Netns, address: str, port: int, kind: str = "tcp", *, wait: float = 0.4) -> bool:
    """Whether somebody answers within `wait` seconds."""
    try:
        ask(netns, address, port, kind, wait=wait)
    except Unreachable:
        return False
    return True
