"""The networks that a node makes of its slices: one for each bridge, in mode overlay."""

from __future__ import annotations

from collections.abc import Iterator

from towpath.model import Network, Pool, Subnet
from towpath.overlay import allocate
from towpath.overlay.config import Overlay, OverlayConfig
from towpath.overlay.records import Member
from towpath.ranges import parse_range

CNI, DOCKER = "m-", "d-"


def networks(config: OverlayConfig, own: Member, mtu: int, side: str = CNI) -> tuple[Network, ...]:
    """The networks of one side: CNI's, named as the overlay, or Docker's, named the same in a namespace of its own.

    An overlay that is not split has one network, which both sides name.
    """
    return tuple(_networks(config, own, mtu, side))


def _networks(config: OverlayConfig, own: Member, mtu: int, side: str) -> Iterator[Network]:
    for overlay in config.overlays:
        one = own.slice(overlay.name)
        if one is None:
            continue
        bridges = allocate.bridges(overlay, one)
        name = f"{side}{overlay.name}" if overlay.split == "half" else f"{CNI}{overlay.name}"
        yield network(overlay, name, bridges[name], mtu)


def network(overlay: Overlay, bridge: str, subnets: tuple[Subnet, ...], mtu: int) -> Network:
    """One network: an attachment gets one address of each subnet, the first of which is the bridge's own."""
    return Network(
        overlay.name,
        mode="overlay",
        bridge=bridge,
        pools=tuple(Pool((parse_range({"subnet": str(subnet)}),)) for subnet in subnets),
        masquerade=overlay.masquerade,
        isolation=overlay.isolation,
        mtu=mtu,
        source="overlay",
    )


def homes(config: OverlayConfig, own: Member) -> tuple[str, ...]:
    """Every bridge of this node behind which members of overlays live."""
    found: list[str] = []
    for overlay in config.overlays:
        if (one := own.slice(overlay.name)) is not None:
            found += allocate.bridges(overlay, one)
    return tuple(found)
