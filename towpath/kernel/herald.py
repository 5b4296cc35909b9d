"""Tells the neighbours of a new container who has its addresses now (RFC 5227 section 3, RFC 4861 section 7.2.6).

Not at once and not on the thread that made the wire: a bridge port forwards a moment after both its ends are up, in the
kernel's own time, and closing a packet socket waits for a grace period. So the frames go out twice, a little later. The
socket is all that is kept: it belongs to the container's namespace and holds on to it until the second time.
"""

from __future__ import annotations

import logging
import queue
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from towpath.plan import Announce

log = logging.getLogger(__name__)

DELAYS = (0.01, 0.1)  # seconds after the wire is made
ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD
ARP_ETHERNET, ARP_REQUEST = 1, 1
IPPROTO_ICMPV6, NEIGHBOUR_ADVERTISEMENT, OPTION_TARGET_MAC = 58, 136, 2
OVERRIDE = 0x20000000
ALL_NODES = IPv6Address("ff02::1").packed
EVERYBODY, EVERY_NODE = b"\xff" * 6, bytes.fromhex("333300000001")


@dataclass(slots=True)
class Announcement:
    """Frames that leave through `link` of the namespace where `socket` was opened."""

    socket: socket.socket
    link: str
    frames: tuple[bytes, ...]
    due: float


def frames(op: Announce) -> tuple[bytes, ...]:
    """One Ethernet frame for each address."""
    mac = bytes.fromhex(op.mac.replace(":", ""))
    return tuple(arp(mac, a) if isinstance(a, IPv4Address) else advertisement(mac, a) for a in op.addresses)


def arp(mac: bytes, address: IPv4Address) -> bytes:
    """An ARP announcement: a request for the sender's own address."""
    packet = struct.pack("!HHBBH", ARP_ETHERNET, 0x0800, 6, 4, ARP_REQUEST)
    packet += mac + address.packed + bytes(6) + address.packed
    return EVERYBODY + mac + struct.pack("!H", ETH_P_ARP) + packet


def advertisement(mac: bytes, address: IPv6Address) -> bytes:
    """An unsolicited neighbour advertisement to all nodes, with the override flag."""
    body = struct.pack("!BBHI", NEIGHBOUR_ADVERTISEMENT, 0, 0, OVERRIDE) + address.packed
    body += struct.pack("!BB", OPTION_TARGET_MAC, 1) + mac
    pseudo = address.packed + ALL_NODES + struct.pack("!II", len(body), IPPROTO_ICMPV6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    head = struct.pack("!IHBB", 6 << 28, len(body), IPPROTO_ICMPV6, 255) + address.packed + ALL_NODES
    return EVERY_NODE + mac + struct.pack("!H", ETH_P_IPV6) + head + body


def checksum(data: bytes) -> int:
    """RFC 1071 over an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Herald:
    """A thread that sends announcements when they are due. Best effort: what fails is logged and hurts nobody."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Announcement | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def announce(self, op: Announce) -> None:
        """Announce from the namespace in which the calling thread is now."""
        if not op.mac or not op.addresses:
            return
        try:
            # No protocol: the socket receives nothing.
            door = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        except OSError as refusal:
            log.warning("%s: cannot announce its addresses: %s", op.link, refusal)
            return
        self._queue.put(Announcement(door, op.link, frames(op), time.monotonic() + DELAYS[0]))

    def start(self) -> None:
        """Start the thread; from one that is in the agent's namespace."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="towpath-herald", daemon=True)
                self._thread.start()

    def close(self) -> None:
        self._queue.put(None)

    def _serve(self) -> None:
        first: deque[Announcement] = deque()
        second: deque[Announcement] = deque()  # both in order of time, since every delay is the same
        while True:
            due = [line[0].due for line in (first, second) if line]
            try:
                new = self._queue.get(timeout=max(0.0, min(due) - time.monotonic()) if due else None)
                if new is None:
                    break
                first.append(new)
            except queue.Empty:
                pass
            self._send_due(first, second)
        for announcement in (*first, *second):
            announcement.socket.close()

    def _send_due(self, first: deque[Announcement], second: deque[Announcement]) -> None:
        now = time.monotonic()
        while first and first[0].due <= now:
            announcement = first.popleft()
            send(announcement)
            announcement.due += DELAYS[1] - DELAYS[0]
            second.append(announcement)
        while second and second[0].due <= now:
            announcement = second.popleft()
            send(announcement)
            announcement.socket.close()


def send(announcement: Announcement) -> None:
    try:
        for frame in announcement.frames:
            announcement.socket.sendto(frame, (announcement.link, 0))
    except OSError as refusal:  # mostly: the container is gone already
        log.debug("%s: cannot announce its addresses: %s", announcement.link, refusal)
