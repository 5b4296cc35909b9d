"""Members of a cluster that grew from nothing, without a store."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from towpath.overlay.allocate import admit
from towpath.overlay.config import DCOS, OverlayConfig
from towpath.overlay.records import Member, claims


def who(number: int, versions: tuple[int, ...] = (4, 6)) -> Member:
    ip = IPv4Address("10.0.0.1") + number if 4 in versions else None
    ip6 = IPv6Address("2001:db8::1") + number if 6 in versions else None
    return Member(f"n{number:04}", ip, ip6)


def grown(count: int, config: OverlayConfig = DCOS, versions: tuple[int, ...] = (4, 6)) -> list[Member]:
    taken: dict[str, str] = {}
    found = []
    for number in range(count):
        member = admit(config, who(number, versions), None, taken)
        taken.update(dict.fromkeys(claims(member), member.name))
        found.append(member)
    return found
