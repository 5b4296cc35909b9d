"""The rows of the cluster tables that overlays stand on.

nodes/<name>                    Member   the node's own row: where it is, and what it was given
subnets/<overlay>/<block>       Claim    whose block it is
vteps/<address>, vteps/<mac>    Claim    whose tunnel address, whose MAC
overlay/config                  OverlayConfig

A node's row and its claims are written in one transaction, so they never disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

from towpath.model import Address, Interface, Subnet

NODES, SUBNETS, VTEPS, CONFIG = "nodes/", "subnets/", "vteps/", "overlay/config"


@dataclass(frozen=True, slots=True)
class Claim:
    node: str
    v: int = 1


@dataclass(frozen=True, slots=True)
class Vtep:
    """A node's end of the tunnel: one MAC, and an address of each family that the cluster has."""

    mac: str
    ip: IPv4Interface | None = None
    ip6: IPv6Interface | None = None

    def of(self, version: int) -> Interface | None:
        return self.ip if version == 4 else self.ip6


@dataclass(frozen=True, slots=True)
class Slice:
    """The blocks of one overlay that belong to one node."""

    overlay: str
    subnet: IPv4Network | None = None
    subnet6: IPv6Network | None = None

    @property
    def blocks(self) -> tuple[Subnet, ...]:
        return tuple(block for block in (self.subnet, self.subnet6) if block is not None)


@dataclass(frozen=True, slots=True)
class Member:
    """One node: its addresses on the underlay, and what the cluster gave it (vtep None = nothing yet)."""

    name: str
    ip: IPv4Address | None = None
    ip6: IPv6Address | None = None
    vtep: Vtep | None = None
    slices: tuple[Slice, ...] = ()
    v: int = 1

    @property
    def addresses(self) -> tuple[Address, ...]:
        return tuple(address for address in (self.ip, self.ip6) if address is not None)

    def at(self, version: int) -> Address | None:
        return self.ip if version == 4 else self.ip6

    def slice(self, overlay: str) -> Slice | None:
        return next((one for one in self.slices if one.overlay == overlay), None)


def node_row(name: str) -> str:
    return f"{NODES}{name}"


def claims(member: Member) -> tuple[str, ...]:
    """The keys of everything that the node was given."""
    found = [f"{SUBNETS}{one.overlay}/{block}" for one in member.slices for block in one.blocks]
    if member.vtep is not None:
        found += [f"{VTEPS}{address.ip}" for address in (member.vtep.ip, member.vtep.ip6) if address is not None]
        found.append(f"{VTEPS}{member.vtep.mac}")
    return tuple(found)
