"""Talks nf_tables to the kernel: adds and deletes elements in one batch, and reads back what our tables hold.

A batch (linux/netfilter/nfnetlink.h) is all or nothing; the kernel goes on after a message that fails, so that every
refusal is heard. Only the last message asks for an answer: a batch of thousands would drown us in them.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from towpath.kernel import netlink
from towpath.kernel.netlink import (
    HEADER,
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    Message,
    Netlink,
    attribute,
    attribute_list,
    attributes,
    nest,
    text,
    word,
)
from towpath.kernel.nftset import SETS, Element

# linux/netfilter/nfnetlink.h and nf_tables.h
BATCH_BEGIN, BATCH_END, SUBSYSTEM = 0x10, 0x11, 10
GETTABLE, GETCHAIN, GETRULE, GETSET, NEWSETELEM, GETSETELEM, DELSETELEM = (
    SUBSYSTEM << 8 | n for n in (1, 4, 7, 10, 12, 13, 14)
)
FAMILIES = {"inet": 1, "ip": 2, "bridge": 7, "ip6": 10}
ELEM_LIST_TABLE, ELEM_LIST_SET, ELEM_LIST_ELEMENTS, LIST_ELEM = 1, 2, 3, 1
ELEM_KEY, ELEM_DATA, DATA_VALUE, DATA_VERDICT = 1, 2, 1, 2
VERDICT_CODE, VERDICT_CHAIN = 1, 2
GOTO = struct.pack(">i", -4)
TABLE_NAME = 1
CHAIN_TABLE, CHAIN_NAME, CHAIN_POLICY = 1, 3, 5
SET_TABLE, SET_NAME, SET_FLAGS = 1, 2, 3
SET_ANONYMOUS, SET_MAP = 0x1, 0x8
RULE_TABLE, RULE_CHAIN, RULE_HANDLE, RULE_USERDATA = 1, 2, 3, 7
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
AT_ONCE = 16  # requests that are answered one by one: each answer takes a page or two of the socket's receive buffer
BUFFER = 200_000  # bytes that a socket takes without being asked to grow (net.core.wmem_default is 212,992)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The kernel said `errno` to one change of a batch; place: its index, -1 = the batch itself."""

    place: int
    errno: int
    text: str = ""


@dataclass(slots=True)
class Structure:
    """What one table is made of, but for its elements. absent: there is no such table."""

    absent: bool = True
    chains: set[str] = field(default_factory=set)
    sets: dict[str, bool] = field(default_factory=dict)  # named ones: whether it is a map
    rules: Counter[str] = field(default_factory=Counter)  # by chain
    comments: dict[str, tuple[str, int]] = field(default_factory=dict)  # of rules: text → chain, handle


def _genmsg(family: int, resource: int = 0) -> bytes:
    return struct.pack(">BBH", family, 0, resource)  # struct nfgenmsg; res_id in network order


def _place(table: str) -> tuple[int, str]:
    family, name = table.split()
    return FAMILIES[family], name


def _list_body(name: str, *inner: bytes) -> bytes:
    family, table = _place(SETS[name].table)
    return _genmsg(family) + text(ELEM_LIST_TABLE, table) + text(ELEM_LIST_SET, name) + b"".join(inner)


def _element_body(item: Element, value: bool = True) -> bytes:
    inner = nest(ELEM_KEY, attribute(DATA_VALUE, item.key))
    if value and item.value:
        inner += nest(ELEM_DATA, _data(item))
    return _list_body(item.set, nest(ELEM_LIST_ELEMENTS, nest(LIST_ELEM, inner)))


def _data(item: Element) -> bytes:
    if SETS[item.set].value == ("verdict",):
        return nest(DATA_VERDICT, attribute(VERDICT_CODE, GOTO), attribute(VERDICT_CHAIN, item.value + b"\0"))
    return attribute(DATA_VALUE, item.value)


def elements_of(name: str, body: bytes) -> Iterator[Element]:
    """The elements in one NEWSETELEM message."""
    listed = attributes(body, 4).get(ELEM_LIST_ELEMENTS, b"")
    for _, raw in attribute_list(listed):
        found = attributes(raw)
        key = attributes(found[ELEM_KEY])[DATA_VALUE]
        yield Element(name, key, _value(found[ELEM_DATA]) if ELEM_DATA in found else b"")


def _value(data: bytes) -> bytes:
    found = attributes(data)
    if DATA_VALUE in found:
        return found[DATA_VALUE]
    return attributes(found[DATA_VERDICT]).get(VERDICT_CHAIN, b"").rstrip(b"\0")


class Tables(Netlink):
    """A netfilter socket in the calling thread's network namespace.

    Keep it open: closing any netfilter socket waits until what was deleted before is freed, 15 ms of grace period
    (nft_rcv_nl_event), while a batch that deletes elements takes 0.1 ms.
    """

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)

    # --- changing ----------------------------------------------------------------------------------------------------

    def transact(self, drop: Sequence[Element], add: Sequence[Element]) -> list[Refusal]:
        """Delete, then add, all or nothing; returns why not (places count `drop` first). What is there may be added."""
        messages = [Message(DELSETELEM, 0, _element_body(item, value=False)) for item in drop]
        messages += [Message(NEWSETELEM, NLM_F_CREATE, _element_body(item)) for item in add]
        return self._batch(messages) if messages else []

    def _batch(self, messages: Sequence[Message]) -> list[Refusal]:
        first = self._sequence + 2
        last = first + len(messages) - 1
        self._sequence = last + 1
        packet = [HEADER.pack(20, BATCH_BEGIN, NLM_F_REQUEST, first - 1, 0), _genmsg(0, SUBSYSTEM)]
        for sequence, message in enumerate(messages, first):
            flags = message.flags | NLM_F_REQUEST | (NLM_F_ACK if sequence == last else 0)
            packet += [HEADER.pack(HEADER.size + len(message.body), message.type, flags, sequence, 0), message.body]
        packet += [HEADER.pack(20, BATCH_END, NLM_F_REQUEST, last + 1, 0), _genmsg(0, SUBSYSTEM)]
        self._send_all(b"".join(packet))
        return self._refusals(first, last)

    def _send_all(self, packet: bytes) -> None:
        if len(packet) > BUFFER // 2:
            # Each refusal takes a buffer of its own on its way back: leave room for as many as there are messages.
            self._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, len(packet) * 2)
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, len(packet) * 16)
        self._socket.sendall(packet)

    def _refusals(self, first: int, last: int) -> list[Refusal]:
        found: list[Refusal] = []
        while True:
            for kind, flags, sequence, body in self._receive():
                if kind != NLMSG_ERROR or not first - 1 <= sequence <= last + 1:
                    continue
                answer = netlink.read_ack(flags, body)
                if answer.errno:
                    place = sequence - first if first <= sequence <= last else -1
                    found.append(Refusal(place, answer.errno, answer.text))
                if sequence == last or (answer.errno and not first <= sequence <= last):
                    return found

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, items: Iterable[Element]) -> list[Element | None]:
        """The element that each key has now, None = none (or no such set)."""
        if not (wanted := list(items)):
            return []
        messages = [Message(GETSETELEM, 0, _element_body(item, value=False)) for item in wanted]
        answers = []
        for start in range(0, len(messages), AT_ONCE):
            answers += self.send(messages[start : start + AT_ONCE])
        found: list[Element | None] = []
        for item, answer in zip(wanted, answers, strict=True):
            if answer.errno not in (0, errno.ENOENT):
                raise OSError(answer.errno, answer.text or os.strerror(answer.errno))
            found.append(next((e for body in answer.data for e in elements_of(item.set, body)), None))
        return found

    def elements(self, name: str) -> Iterator[Element]:
        """All elements of one set; none where there is no such set."""
        for body in self._elements_raw(name):
            yield from elements_of(name, body)

    def count(self, name: str, part: bytes) -> int:
        """How many elements of a set hold `part` in their key: a search in what the kernel sends, unparsed."""
        return sum(body.count(part) for body in self._elements_raw(name))

    def _elements_raw(self, name: str) -> list[bytes]:
        return [body for _, body in self._list(Message(GETSETELEM, 0, _list_body(name)))]

    def _list(self, message: Message) -> list[tuple[int, bytes]]:
        try:
            return self.dump(message)
        except OSError as refusal:
            if refusal.errno != errno.ENOENT:
                raise
            return []

    def policy(self, table: str, chain: str) -> int | None:
        """Policy of a chain: 0 = drop, 1 = accept (also of one that has none); None where there is no such chain."""
        family, name = _place(table)
        body = _genmsg(family) + text(CHAIN_TABLE, name) + text(CHAIN_NAME, chain)
        answer = self.ask(Message(GETCHAIN, 0, body))
        if not answer.data:
            return None
        raw = attributes(answer.data[0], 4).get(CHAIN_POLICY)
        return 1 if raw is None else int.from_bytes(raw, "big")

    def structure(self, table: str) -> Structure:
        """What `table` ("inet towpath") is made of."""
        family, name = _place(table)
        answer = self.ask(Message(GETTABLE, 0, _genmsg(family) + text(TABLE_NAME, name)))
        seen = Structure()
        if answer.errno == errno.ENOENT:
            return seen
        if answer.errno:
            raise OSError(answer.errno, answer.text or os.strerror(answer.errno))
        seen.absent = False
        mine = name.encode() + b"\0"
        for found in self._attributes(GETCHAIN, family, CHAIN_TABLE, mine):
            seen.chains.add(word(found[CHAIN_NAME]))
        for found in self._attributes(GETSET, family, SET_TABLE, mine):
            if not (flags := int.from_bytes(found.get(SET_FLAGS, b""), "big")) & SET_ANONYMOUS:
                seen.sets[word(found[SET_NAME])] = bool(flags & SET_MAP)
        for found in self._attributes(GETRULE, family, RULE_TABLE, mine):
            _note_rule(seen, found)
        return seen

    def _attributes(self, kind: int, family: int, table: int, name: bytes) -> Iterator[dict[int, bytes]]:
        for _, body in self._list(Message(kind, 0, _genmsg(family) + attribute(table, name))):
            found = attributes(body, 4)
            if found.get(table) == name:
                yield found


def _note_rule(seen: Structure, found: dict[int, bytes]) -> None:
    chain = word(found[RULE_CHAIN])
    seen.rules[chain] += 1
    data = found.get(RULE_USERDATA, b"")
    if data[:1] == b"\0" and len(data) > 2:  # libnftnl's own form: type 0 is the comment, then length, then text
        handle = int.from_bytes(found[RULE_HANDLE], "big")
        seen.comments[word(data[2 : 2 + data[1]])] = chain, handle
