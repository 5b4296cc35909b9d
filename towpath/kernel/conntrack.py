"""Forgets UDP flows: a client that keeps its source port would go on to where a published port led before (ctnetlink).

TCP needs none of this: its flows end, and a stray packet is answered with a reset.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from towpath.kernel.netlink import (
    NETLINK_NETFILTER,
    Message,
    Netlink,
    attribute,
    attributes,
    nest,
    u8,
)
from towpath.model import Address, PortMap

log = logging.getLogger(__name__)

# linux/netfilter/nfnetlink_conntrack.h
SUBSYSTEM = 1
GET, DELETE, GET_STATS = (SUBSYSTEM << 8 | n for n in (1, 2, 5))
TUPLE_ORIG, TUPLE_REPLY, ZONE, FILTER = 1, 2, 18, 25
TUPLE_IP, TUPLE_PROTO = 1, 2
SOURCE, DESTINATION = {4: 1, 6: 3}, {4: 2, 6: 4}  # CTA_IP_V4_SRC and twins
PROTO_NUM, PROTO_DST_PORT = 1, 3
STATS_ENTRIES = 1
FILTER_ORIG, FILTER_REPLY = 1, 2
IP_SRC, BY_PROTO, BY_DST_PORT = 1 << 0, 1 << 3, 1 << 5  # net/netfilter/nf_internals.h
FAMILIES = {4: 2, 6: 10}  # AF_INET, AF_INET6
UDP = 17


@dataclass(frozen=True, slots=True)
class Search:
    """One dump that the kernel filters (5.8 and later; earlier ones list everything, which `matches` sorts out)."""

    version: int
    port: int = 0  # the original destination port
    source: Address | None = None  # who opened the flow, or (reply) who answers it
    reply: bool = False

    def message(self) -> Message:
        proto = u8(PROTO_NUM, UDP)
        flags = BY_PROTO
        inner = b""
        if self.port:
            proto += attribute(PROTO_DST_PORT, self.port.to_bytes(2, "big"))
            flags |= BY_DST_PORT
        if self.source is not None:
            inner = nest(TUPLE_IP, attribute(SOURCE[self.version], self.source.packed))
            flags |= IP_SRC
        which, side = (TUPLE_REPLY, FILTER_REPLY) if self.reply else (TUPLE_ORIG, FILTER_ORIG)
        body = nest(which, inner, nest(TUPLE_PROTO, proto))
        body += nest(FILTER, attribute(side, struct.pack("=I", flags)))
        return Message(GET, 0, _genmsg(self.version) + body)

    def matches(self, flow: dict[int, bytes]) -> bool:
        one = attributes(flow.get(TUPLE_REPLY if self.reply else TUPLE_ORIG, b""))
        proto, ip = attributes(one.get(TUPLE_PROTO, b"")), attributes(one.get(TUPLE_IP, b""))
        return (
            proto.get(PROTO_NUM) == bytes((UDP,))
            and (not self.port or proto.get(PROTO_DST_PORT) == self.port.to_bytes(2, "big"))
            and (self.source is None or ip.get(SOURCE[self.version]) == self.source.packed)
        )


def searches(ports: Iterable[PortMap], addresses: Iterable[Address]) -> Iterator[Search]:
    """Which flows are to be forgotten: to each published UDP port, from and to each address."""
    numbers = {
        (version, port.host_port)
        for port in ports
        if port.proto == "udp"
        for version in (4, 6)
        if port.host_ip is None or port.host_ip.version == version
    }
    for version, number in sorted(numbers):
        yield Search(version, port=number)
    for address in dict.fromkeys(addresses):
        yield Search(address.version, source=address)
        yield Search(address.version, source=address, reply=True)


class Flows(Netlink):
    """A ctnetlink socket in the calling thread's network namespace.

    It is kept: closing a netfilter socket may wait for what nftables is still freeing (nftbatch.Tables says why).
    """

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)

    def entries(self) -> int:
        """How many flows of any kind this namespace tracks; -1 where the kernel does not say."""
        answer = self.ask(Message(GET_STATS, 0, _genmsg(0)))
        count = attributes(answer.data[0], 4).get(STATS_ENTRIES) if answer.data else None
        return -1 if answer.errno or count is None else int.from_bytes(count, "big")

    def forget(self, search: Search) -> int:
        """Delete the flows found; returns how many."""
        doomed = []
        for _, body in self.dump(search.message()):
            flow = attributes(body, 4)
            if search.matches(flow):
                zone = attribute(ZONE, flow[ZONE]) if ZONE in flow else b""
                tuple_ = nest(TUPLE_ORIG, flow[TUPLE_ORIG])
                doomed.append(Message(DELETE, 0, _genmsg(body[0], raw=True) + tuple_ + zone))
        for start in range(0, len(doomed), 100):  # each is answered: a few at a time, that no answer is lost
            for answer in self.send(doomed[start : start + 100]):
                if answer.errno not in (0, errno.ENOENT):  # it ended by itself meanwhile
                    raise OSError(answer.errno, answer.text or os.strerror(answer.errno))
        return len(doomed)


def _genmsg(version: int, *, raw: bool = False) -> bytes:
    return struct.pack(">BBH", version if raw else FAMILIES.get(version, 0), 0, 0)


class Conntrack:
    """Serves one caller at a time, on one kept socket."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flows: Flows | None = None
        self._netns = 0

    def flush(self, ports: tuple[PortMap, ...], addresses: tuple[Address, ...]) -> int:
        """Forget UDP flows to these published ports and to and from these container addresses; returns how many.

        Never raises: what stays is a delay for a client, no reason to refuse a container. It is logged.
        """
        wanted = tuple(searches(ports, addresses))
        if not wanted:
            return 0
        with self._lock:
            try:
                flows = self._open()
                return sum(flows.forget(search) for search in wanted) if flows.entries() else 0
            except OSError as refusal:
                self._close()
                log.warning("UDP flows were not forgotten", extra={"why": str(refusal)})
                return 0

    def close(self) -> None:
        with self._lock:
            self._close()

    def _open(self) -> Flows:
        netns = os.stat("/proc/thread-self/ns/net").st_ino  # noqa: PTH116
        if self._flows is None or netns != self._netns:
            self._close()
            self._flows, self._netns = Flows(), netns
        return self._flows

    def _close(self) -> None:
        if self._flows is not None:
            self._flows.close()
            self._flows = None


_conntrack = Conntrack()


def flush(ports: tuple[PortMap, ...], addresses: tuple[Address, ...]) -> int:
    """`Conntrack.flush` on a socket that the process keeps."""
    return _conntrack.flush(ports, addresses)
