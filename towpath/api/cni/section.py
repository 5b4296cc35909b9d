"""Typed reading of JSON objects that others wrote: every complaint names the key and the value it found.

A wrong type is code 6 (the reference fails to decode it), a value of the right type that cannot work is code 7.
`null` counts as absent, as it does for the Go plug-ins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network
from typing import Any, TypeVar

from towpath.errors import BadConfig, Undecodable
from towpath.model import Address, Interface, Subnet

T = TypeVar("T")
SHOWN = 120  # characters of a wrong value that an error repeats
MAC = re.compile(r"[0-9a-f]{2}([:-][0-9a-f]{2}){5}\Z")


def shown(value: object) -> str:
    """The value as JSON, short enough for one line."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class Section:
    """One JSON object and where it stands (`where` is "" for the whole configuration, else e.g. "ipam")."""

    __slots__ = ("raw", "where")

    def __init__(self, raw: Mapping[str, Any], where: str = "") -> None:
        self.raw = raw
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def __bool__(self) -> bool:
        return bool(self.raw)

    def at(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def wrong(self, key: str, why: str) -> BadConfig:
        """The error for a value that cannot work; raise it."""
        return BadConfig(f"{self.at(key)} {shown(self.raw.get(key))} {why}")

    def _get(self, key: str, kind: type[T], name: str, default: T) -> T:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise Undecodable(f"{self.at(key)} {shown(value)} is not {name}")
        return value

    def text(self, key: str, default: str = "") -> str:
        value = self._get(key, str, "a string", default)
        if "\0" in value:
            raise self.wrong(key, "holds a zero byte")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return self._get(key, bool, "true or false", default)

    def number(self, key: str, default: int = 0, *, low: int = 0, high: int = 2**32 - 1) -> int:
        value = self._get(key, int, "a whole number", default)
        if key in self and not low <= value <= high:
            raise self.wrong(key, f"is not within {low} to {high}")
        return value

    def section(self, key: str) -> Section:
        """The object below `key`; an empty one where it is absent."""
        nothing: dict[str, Any] = {}
        return Section(self._get(key, dict, "an object", nothing), self.at(key))

    def items(self, key: str) -> list[Any]:
        nothing: list[Any] = []
        return self._get(key, list, "a list", nothing)

    def sections(self, key: str) -> Iterator[Section]:
        """The objects of the list below `key`."""
        for index, item in enumerate(self.items(key)):
            where = f"{self.at(key)}[{index}]"
            if not isinstance(item, dict):
                raise Undecodable(f"{where} {shown(item)} is not an object")
            yield Section(item, where)

    def texts(self, key: str) -> tuple[str, ...]:
        for index, item in enumerate(self.items(key)):
            if not isinstance(item, str):
                raise Undecodable(f"{self.at(key)}[{index}] {shown(item)} is not a string")
        return tuple(self.items(key))

    def choice(self, key: str, allowed: tuple[str, ...], default: str = "") -> str:
        value = self.text(key, default) or default
        if value not in allowed:
            raise self.wrong(key, f"is not one of {', '.join(filter(None, allowed))}")
        return value

    def _parsed(self, key: str, parse: Callable[[str], T], name: str) -> T:
        try:
            return parse(self.text(key))
        except ValueError as exc:
            raise self.wrong(key, f"is not {name}") from exc

    def address(self, key: str) -> Address | None:
        """An IP address; None where the key is absent or empty."""
        return self._parsed(key, plain_address, "an IP address") if self.text(key) else None

    def interface(self, key: str) -> Interface:
        """An address with prefix length."""
        return self._parsed(key, interface, "an address with prefix length")

    def subnet(self, key: str) -> Subnet:
        return self._parsed(key, lambda text: ip_network(text, strict=False), "a subnet")

    def mac(self, key: str) -> str:
        """A unicast MAC address in the kernel's spelling; "" where absent or empty."""
        return check_mac(self.at(key), self.text(key))


def plain_address(text: str) -> Address:
    """Read an IP address. Raises ValueError, also for one with a zone: it means nothing in another namespace."""
    address: IPv4Address | IPv6Address = ip_address(text)
    if "%" in text:
        raise ValueError(text)
    return address


def interface(text: str) -> Interface:
    if "/" not in text or "%" in text:
        raise ValueError(text)
    return ip_interface(text)


def check_mac(where: str, text: str) -> str:
    """`text` in lower case with colons, if it is a unicast MAC address; "" stays "". Raises BadConfig."""
    mac = text.lower()
    if not mac:
        return ""
    if not MAC.match(mac) or int(mac[1], 16) & 1 or set(mac) <= set("0:-"):
        raise BadConfig(f"{where} {shown(text)} is not a unicast MAC address")
    return mac.replace("-", ":")
