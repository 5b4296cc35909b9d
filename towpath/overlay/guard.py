"""The firewall rules that an overlay brings to a node, whatever is attached: pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from towpath.model import Address
from towpath.overlay.config import OverlayConfig
from towpath.overlay.networks import homes
from towpath.overlay.records import Member
from towpath.plan import Bar, Guard, KeepSource, Peer, Rule

OWNER = "overlay"


def rules(
    config: OverlayConfig, own: Member, members: Iterable[Member], bridges: Iterable[str] = ()
) -> frozenset[Rule]:
    """All of them. bridges: those of the node's other networks, whose containers may not reach the tunnel either."""
    return frozenset(_rules(config, own, members, {*homes(config, own), *bridges}))


def _rules(config: OverlayConfig, own: Member, members: Iterable[Member], bridges: set[str]) -> Iterator[Rule]:
    yield Guard(config.port, OWNER)
    for member in members:
        yield from peers(config, member.addresses)
    for bridge in bridges:
        yield Bar(bridge, config.port, OWNER)
    for link in (config.device, *homes(config, own)):
        yield KeepSource(link, OWNER)


def peers(config: OverlayConfig, addresses: Iterable[Address]) -> frozenset[Rule]:
    return frozenset(Peer(address, config.port, OWNER) for address in addresses)
