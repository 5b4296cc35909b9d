"""The sets and maps of our nftables tables, and their elements: packed as the kernel wants them, or as text for `nft`.

A key or value of several fields is a concatenation: every field is padded to four bytes (registers of 32 bits).
Elements are kept packed, for two of them are compared far more often than one is printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from towpath.errors import BadConfig
from towpath.model import PROTOCOLS, Address

INET, BRIDGE, FRAMES = "inet towpath", "bridge towpath", "bridge towpath_iptables"
IFNAME_ROOM = 16  # linux/if.h IFNAMSIZ

Field = Address | int | str


@dataclass(frozen=True, slots=True)
class Declared:
    """A set, a map (value: field types) or a verdict map (value: ("verdict",)) of one of our tables."""

    table: str
    key: tuple[str, ...]
    value: tuple[str, ...] = ()


def _twins(name: str, key: tuple[str, ...], value: tuple[str, ...] = ()) -> dict[str, Declared]:
    """One for each address family: `addr` stands for its address type, `#` for its number."""
    return {
        name.replace("#", str(version)): Declared(
            INET,
            tuple(field.replace("addr", f"ipv{version}_addr") for field in key),
            tuple(field.replace("addr", f"ipv{version}_addr") for field in value),
        )
        for version in (4, 6)
    }


# Keys of the second family of sets name a published port as the first packet of a connection shows it in postrouting:
# [the address that was asked for,] the container's address, protocol, the port that was asked for.
SETS: dict[str, Declared] = {
    **_twins("dnat#", ("addr", "inet_proto", "inet_service"), ("addr", "inet_service")),
    **_twins("dnat#_any", ("inet_proto", "inet_service"), ("addr", "inet_service")),
    **_twins("snat#", ("addr", "addr", "inet_proto", "inet_service"), ("verdict",)),
    **_twins("snat#_any", ("addr", "inet_proto", "inet_service"), ("verdict",)),
    **_twins("hairpin#", ("addr", "addr", "inet_proto", "inet_service", "ifname")),
    **_twins("hairpin#_any", ("addr", "inet_proto", "inet_service", "ifname")),
    **_twins("masq#", ("addr",)),
    **_twins("masq#_home", ("addr", "ifname")),
    **_twins("members#", ("ifname", "addr")),
    **_twins("fence#", ("ifname", "addr")),
    **_twins("isolate#", ("ifname", "addr")),
    **_twins("inner#", ("addr",)),
    **_twins("peers#", ("addr", "inet_service")),
    "inner_links": Declared(INET, ("ifname",)),
    "guarded": Declared(INET, ("inet_proto", "inet_service")),
    "barred": Declared(INET, ("ifname", "inet_service")),
    "homes": Declared(INET, ("ifname",)),
    "within": Declared(INET, ("ifname", "ifname")),
    "fenced": Declared(INET, ("ifname",)),
    "isolated": Declared(INET, ("ifname",)),
    "pinned": Declared(BRIDGE, ("ifname",)),
    "macs": Declared(BRIDGE, ("ifname", "ether_addr")),
    "pinned_iptables": Declared(FRAMES, ("ifname",)),
    "macs_iptables": Declared(FRAMES, ("ifname", "ether_addr")),
}

# An element of the left set stays as long as one of the right sets has a key that begins with the same interface.
CLAIMS: dict[str, tuple[str, ...]] = {
    "homes": ("members4", "members6"),
    "within": ("members4", "members6"),
    "fenced": ("fence4", "fence6", "isolate4", "isolate6"),
    "isolated": ("isolate4", "isolate6"),
    "pinned": ("macs",),
    "pinned_iptables": ("macs_iptables",),
}


@dataclass(frozen=True, slots=True)
class Element:
    """`key` and `value` as the kernel has them; of a verdict map the value is the name of the chain to go to."""

    set: str
    key: bytes
    value: bytes = b""

    def __str__(self) -> str:
        return f"{self.set} {{ {phrase(self)} }}"


def element(name: str, key: Iterable[Field], value: Iterable[Field] = ()) -> Element:
    declared = SETS[name]
    packed = b"".join(_pack(kind, field) for kind, field in zip(declared.key, key, strict=True))
    return Element(
        name, packed, b"".join(_pack(kind, field) for kind, field in zip(declared.value, value, strict=True))
    )


def phrase(item: Element) -> str:
    """The element in the syntax of nft(8), e.g. `tcp . 80 : 10.0.0.2 . 8080`."""
    declared = SETS[item.set]
    words = " . ".join(_unpack(declared.key, item.key))
    if declared.value == ("verdict",):
        return f"{words} : goto {item.value.decode()}"
    return f"{words} : {' . '.join(_unpack(declared.value, item.value))}" if declared.value else words


def declaration(name: str) -> str:
    """How `nft` is told of a set or map."""
    declared = SETS[name]
    kind = "map" if declared.value else "set"
    value = f" : {' . '.join(declared.value)}" if declared.value else ""
    return f"{kind} {name} {{ type {' . '.join(declared.key)}{value}; }}"


# --- fields ----------------------------------------------------------------------------------------------------------

_ROOM = {"ipv4_addr": 4, "ipv6_addr": 16, "inet_proto": 4, "inet_service": 4, "ifname": IFNAME_ROOM, "ether_addr": 8}
_PLAIN = re.compile(r"[\w.@\-]+\Z", re.ASCII)
_NUMBERS = {number: name for name, number in PROTOCOLS.items()}


def _pack(kind: str, field: Field) -> bytes:
    if isinstance(field, IPv4Address | IPv6Address):
        return field.packed
    if kind == "inet_service":
        return int(field).to_bytes(2, "big") + b"\0\0"
    if kind == "inet_proto":
        return bytes((PROTOCOLS[str(field)], 0, 0, 0))
    if kind == "ether_addr":
        return bytes.fromhex(str(field).replace(":", "")).ljust(8, b"\0")
    if kind == "ifname":
        return interface(str(field))
    return str(field).encode()


def interface(name: str) -> bytes:
    """Raises BadConfig for a name that nft(8) could not write: no quotes, and a star (or iptables' plus) means any."""
    if not _PLAIN.match(name):
        raise BadConfig(f"interface name {name!r} cannot be written in the syntax of nftables")
    return name.encode().ljust(IFNAME_ROOM, b"\0")


def _unpack(kinds: tuple[str, ...], data: bytes) -> list[str]:
    words, start = [], 0
    for kind in kinds:
        room = _ROOM[kind]
        words.append(_WORDS[kind](data[start : start + room]))
        start += room
    return words


_WORDS: dict[str, Callable[[bytes], str]] = {
    "ipv4_addr": lambda data: str(ip_address(data)),
    "ipv6_addr": lambda data: str(ip_address(data)),
    "inet_proto": lambda data: _NUMBERS.get(data[0], str(data[0])),
    "inet_service": lambda data: str(int.from_bytes(data[:2], "big")),
    "ifname": lambda data: f'"{data.rstrip(bytes(1)).decode()}"',
    "ether_addr": lambda data: data[:6].hex(":"),
}
