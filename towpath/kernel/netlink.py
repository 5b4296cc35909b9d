"""Speaks netlink: packs and reads messages (linux/netlink.h, RFC 3549), sends many in one call, collects every answer.

Nothing here knows a link or a route; `links`, `shape` and `read` do. A socket belongs to the network namespace in which
it was opened, for ever, so a thread may open one there, come back and go on using it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
NLMSG_ERROR, NLMSG_DONE, NLMSG_MIN_TYPE = 2, 3, 16
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLM_F_DUMP = 0x300
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200  # flags of an answer
NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF

SOL_NETLINK = 270
NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 10, 11, 12

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
ATTRIBUTE = struct.Struct("=HH")  # length, type
ERROR = struct.Struct("=i")
ROOM = 1 << 16
PATIENCE = 30.0  # seconds; the kernel answers at once, or after a grace period while somebody deletes many links

U8, U32, U64 = struct.Struct("=B"), struct.Struct("=I"), struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Message:
    """One request before it gets a sequence number: `body` is the family header and the attributes."""

    type: int
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What the kernel said to one request. errno 0 = done; text: its extended ACK; data: messages before the ACK."""

    errno: int
    text: str = ""
    data: tuple[bytes, ...] = ()


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes (linux/netlink.h NLA_ALIGN)."""
    return ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def nest(kind: int, *inner: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, b"".join(inner))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, U32.pack(value))


def u8(kind: int, value: int) -> bytes:
    return attribute(kind, U8.pack(value))


def attributes(data: bytes, start: int = 0) -> dict[int, bytes]:
    """The attributes of `data` from `start`; of several of one type the last."""
    return dict(attribute_list(data, start))


def attribute_list(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    while start + 4 <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, start)
        if length < 4:
            return
        yield kind & NLA_TYPE_MASK, data[start + 4 : start + length]
        start += (length + 3) & ~3


def word(payload: bytes) -> str:
    """A string attribute without its end mark."""
    return payload.rstrip(b"\0").decode(errors="replace")


def number(payload: bytes) -> int:
    """An unsigned attribute of any width, host order."""
    return int.from_bytes(payload, "little" if struct.pack("=H", 1) == b"\1\0" else "big")


class Netlink:
    """A blocking netlink socket, for one thread at a time."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            self._option(option)
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(PATIENCE), 0)
        )  # settimeout() would cost a poll for each receive
        self._socket.bind((0, 0))
        self._sequence = 0

    def _option(self, option: int) -> None:
        try:
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        except OSError as refusal:
            if refusal.errno != errno.ENOPROTOOPT:  # an older kernel: we only lose its texts
                raise

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, messages: Sequence[Message]) -> list[Answer]:
        """All messages in one call, answered one by one, in order. The kernel does the rest after one that fails."""
        first = self._sequence + 1
        self._sequence += len(messages)
        packets = []
        for place, message in enumerate(messages):
            length = HEADER.size + len(message.body)
            flags = message.flags | NLM_F_REQUEST | NLM_F_ACK
            packets += [HEADER.pack(length, message.type, flags, first + place, 0), message.body, b"\0" * (-length % 4)]
        self._socket.sendmsg(packets)
        return self._collect(first, len(messages))

    def ask(self, message: Message) -> Answer:
        return self.send((message,))[0]

    def must(self, message: Message) -> Answer:
        """`ask`, where a refusal is an OSError with the kernel's own text."""
        answer = self.ask(message)
        if answer.errno:
            raise OSError(answer.errno, answer.text or os.strerror(answer.errno))
        return answer

    def dump(self, message: Message, attempts: int = 4) -> list[tuple[int, bytes]]:
        """Everything the kernel lists: (type, body). Asks again where the list changed under our hands (DUMP_INTR)."""
        for _ in range(attempts):
            found, torn = self._dump_once(message)
            if not torn:
                return found
        return found

    def dump_raw(self, message: Message) -> bytes:
        """The bytes of a whole dump, for a search without parsing."""
        return b"".join(body for _, body in self.dump(message))

    def _dump_once(self, message: Message) -> tuple[list[tuple[int, bytes]], bool]:
        self._sequence += 1
        length = HEADER.size + len(message.body)
        flags = message.flags | NLM_F_REQUEST | NLM_F_DUMP
        self._socket.send(HEADER.pack(length, message.type, flags, self._sequence, 0) + message.body)
        found: list[tuple[int, bytes]] = []
        torn = False
        while True:
            for kind, flags, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue
                torn = torn or bool(flags & NLM_F_DUMP_INTR)
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    if (code := ERROR.unpack_from(body)[0] if len(body) >= 4 else 0) < 0:
                        raise OSError(-code, os.strerror(-code))
                    return found, torn
                found.append((kind, body))

    def _collect(self, first: int, count: int) -> list[Answer]:
        answers: dict[int, Answer] = {}
        data: dict[int, list[bytes]] = {}
        while len(answers) < count:
            for kind, flags, sequence, body in self._receive():
                if not first <= sequence < first + count:
                    continue  # left over from a request that was given up
                if kind == NLMSG_ERROR:
                    answers[sequence] = read_ack(flags, body, tuple(data.get(sequence, ())))
                elif kind >= NLMSG_MIN_TYPE:
                    data.setdefault(sequence, []).append(body)
        return [answers[first + place] for place in range(count)]

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            packet = self._socket.recv(ROOM)
        except BlockingIOError:
            raise TimeoutError(errno.ETIMEDOUT, f"netlink did not answer within {PATIENCE:.0f} s") from None
        return split(packet)


def split(packet: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The messages of one packet: (type, flags, sequence, body)."""
    start = 0
    while start + HEADER.size <= len(packet):
        length, kind, flags, sequence, _ = HEADER.unpack_from(packet, start)
        if length < HEADER.size:
            return
        yield kind, flags, sequence, packet[start + HEADER.size : start + length]
        start += (length + 3) & ~3


def read_ack(flags: int, body: bytes, data: tuple[bytes, ...] = ()) -> Answer:
    """Read struct nlmsgerr and, where present, the text of the extended ACK."""
    code = -ERROR.unpack_from(body)[0]
    if not flags & NLM_F_ACK_TLVS:
        return Answer(code, data=data)
    # The request's header follows the code; its payload too unless the kernel cut it off (CAP_ACK).
    echoed = HEADER.size if flags & NLM_F_CAPPED or not code else (HEADER.unpack_from(body, 4)[0] + 3) & ~3
    said = attributes(body, 4 + echoed).get(NLMSGERR_ATTR_MSG, b"")
    return Answer(code, word(said), data)
