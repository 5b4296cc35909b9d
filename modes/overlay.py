"""Overlay mode: bridge mode on this node's slice of a cluster-wide pool; the tunnel to the other slices is the node's.

The network's row says what is particular: its bridge is m-<name> or d-<name>, its pools are the node's blocks, its MTU
is the tunnel's. Other nodes' blocks are routed, so nothing about them is in an attachment.
"""

from __future__ import annotations

from towpath.kernel.contract import NetnsSeen
from towpath.model import Network

from .bridge import Bridge

LEAST_IPV6 = 1280  # RFC 8200 section 5


class Overlay(Bridge):
    """See towpath.mode.Mode."""

    name = "overlay"

    def check_network(self, network: Network, seen: NetnsSeen) -> str:
        if not network.pools:
            return f"this node has no block of overlay {network.name!r}: it did not join the cluster yet"
        if network.vlan or network.trunk:
            return f"overlay {network.name!r} is routed: vlan and trunk have no meaning on it"
        six = any(span.subnet.version == 6 for pool in network.pools for span in pool.ranges)
        if six and 0 < network.mtu < LEAST_IPV6:
            return f"MTU {network.mtu} of overlay {network.name!r} is too small: IPv6 needs {LEAST_IPV6}"
        return super().check_network(network, seen)
