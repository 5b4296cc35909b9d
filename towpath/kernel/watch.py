"""Hears from the kernel that links or firewall rules changed, whoever did it; a burst is one word.

After the first message the sockets rest for a while and their small buffers overflow: that costs nothing, and an
overflow is a change like any other. So no rate of changes can keep the event loop busy.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Iterable

from towpath.kernel.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, SOL_NETLINK, split

NETLINK_ADD_MEMBERSHIP = 1
RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, NFNLGRP_NFTABLES = 1, 5, 7
# Not RTNLGRP_IPV6_IFADDR: every veth gets a link-local address of its own, and is a change of links already.
GROUPS = (
    ("links", NETLINK_ROUTE, RTNLGRP_LINK),
    ("addresses", NETLINK_ROUTE, RTNLGRP_IPV4_IFADDR),
    ("firewall", NETLINK_NETFILTER, NFNLGRP_NFTABLES),
)
# Containers come and go with neighbours and routes of their own: listen to these only with a long rest.
ROUTES = tuple(("routes", NETLINK_ROUTE, group) for group in (3, 7, 8, 11, 19))  # NEIGH, IPV4 and IPV6 ROUTE and RULE
REST = 0.1  # seconds between two looks at one socket
SMALL = 16384  # bytes of receive buffer: what a bridge says about some ports, not what a burst of ADDs says
RTM_NEWLINK, PORT = 16, bytes([socket.AF_BRIDGE])


def subscribe(protocol: int, group: int) -> socket.socket:
    """A non-blocking socket that hears one multicast group of the calling thread's network namespace."""
    ear = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
    ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    ear.bind((0, 0))
    ear.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    return ear


def drain(ear: socket.socket) -> bool:
    """Read everything that is there; whether any of it tells of a change. An overflow does: nobody knows of what."""
    told = False
    while True:
        try:
            told = tells(ear.recv(SMALL * 4)) or told
        except BlockingIOError:
            return told
        except OSError as loss:
            if loss.errno != errno.ENOBUFS:
                raise
            told = True


def tells(packet: bytes) -> bool:
    """Whether any message is more than a bridge talking about one of its ports, which it does for minutes."""
    return any(kind != RTM_NEWLINK or body[:1] != PORT for kind, _, _, body in split(packet))


async def changes(groups: Iterable[tuple[str, int, int]] = GROUPS, rest: float = REST) -> AsyncIterator[str]:
    """The word of a group ("links", "addresses", "firewall") each time, at most once per `rest` seconds; for ever."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[tuple[str, socket.socket]] = asyncio.Queue()
    ears: list[socket.socket] = []
    timers: set[asyncio.TimerHandle] = set()

    def listen(word: str, ear: socket.socket) -> None:
        loop.add_reader(ear, hear, word, ear)

    def hear(word: str, ear: socket.socket) -> None:
        loop.remove_reader(ear)
        heard.put_nowait((word, ear))

    try:
        for word, protocol, group in groups:
            ears.append(subscribe(protocol, group))
            listen(word, ears[-1])
        while True:
            word, ear = await heard.get()
            if drain(ear):
                yield word
            timers = {timer for timer in timers if timer.when() > loop.time()}
            timers.add(loop.call_later(rest, listen, word, ear))
    finally:
        for timer in timers:
            timer.cancel()
        for ear in ears:
            loop.remove_reader(ear)
            ear.close()
