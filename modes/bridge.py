"""Bridge mode: one Linux bridge per network, one veth per container; the bridge is the gateway."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Interface, ip_interface

from towpath.kernel.contract import NetnsSeen
from towpath.model import Attachment, Interface, Network
from towpath.plan import (
    AddAddress,
    AddVeth,
    DropAddress,
    DropLink,
    EnsureBridge,
    LinkOp,
    Phase,
    Plan,
    PlugPort,
    PortVlans,
    Sysctl,
)

from .wire import check_inside, missing_addresses, plan_drop, plan_inside


def bridge_mac(network: Network) -> str:
    """The bridge's own address, derived from its name: the same again after the bridge was made anew."""
    digest = hashlib.sha1(f"bridge {network.device}".encode(), usedforsecurity=False).hexdigest()
    return ":".join(["02", *(digest[i : i + 2] for i in range(0, 10, 2))])


def gateways(network: Network) -> tuple[Interface, ...]:
    """The bridge's addresses: the gateway of each range, with its subnet's prefix; none where it is no gateway."""
    if not network.gateway:
        return ()
    found: dict[Interface, None] = {}
    for pool in network.pools:
        for span in pool.ranges:
            if span.gateway is not None:
                found[ip_interface(f"{span.gateway}/{span.subnet.prefixlen}")] = None
    return tuple(found)


def forwarding(addresses: Iterable[Interface]) -> Iterator[LinkOp]:
    versions = {address.version for address in addresses}
    if 4 in versions:
        yield Sysctl("net/ipv4/ip_forward", "1")
    if 6 in versions:
        yield Sysctl("net/ipv6/conf/all/forwarding", "1")


def strangers(network: Network, seen: NetnsSeen) -> list[Interface]:
    """Global addresses on the bridge that stand in the way of ours: another IPv4 one, or an IPv6 one that overlaps."""
    wanted = gateways(network)
    found = []
    for link, address in seen.addresses:
        if link != network.device or address in wanted or address.ip.is_link_local:
            continue
        for ours in wanted:
            clash = isinstance(address, IPv4Interface) or address.network.overlaps(ours.network)
            if ours.version == address.version and clash:
                found.append(address)
                break
    return found


def isolated(record: Attachment, network: Network) -> bool:
    """Whether frames of other isolated ports do not reach this one."""
    return network.port_isolation or record.isolation == "isolated"


def port_vlans(record: Attachment, network: Network) -> tuple[PortVlans, ...]:
    if not (network.vlan or network.trunk):
        return ()
    return (PortVlans(record.veth, network.vlan, network.trunk, network.preserve_default_vlan),)


class Bridge:
    """See towpath.mode.Mode."""

    name = "bridge"
    needs_netns = True

    def home(self, network: Network) -> str:
        return network.device

    def plan_network(self, network: Network) -> Plan:
        device, addresses = network.device, gateways(network)
        bridge = EnsureBridge(
            device,
            bridge_mac(network),
            mtu=network.mtu,
            vlan_filtering=bool(network.vlan or network.trunk),
            promiscuous=network.promiscuous,
        )
        ops: list[LinkOp] = [bridge, Sysctl(f"net/ipv6/conf/{device}/accept_ra", "0", optional=True)]
        if any(a.version == 6 for a in addresses):
            ops.append(Sysctl(f"net/ipv6/conf/{device}/disable_ipv6", "0", optional=True))
        ops += [AddAddress(device, address) for address in addresses]
        ops += forwarding(addresses)
        return (Phase("host", tuple(ops)),)

    def check_network(self, network: Network, seen: NetnsSeen) -> str:
        link = seen.link(network.device)
        if link is not None and link.kind != "bridge":
            return f'"{network.device}" already exists but is not a bridge: it is a {link.kind or "plain link"}'
        if not network.force_address and (foreign := strangers(network, seen)):
            return f'"{network.device}" already has an IP address different from {gateways(network)[0]}: {foreign[0]}'
        return ""

    def network_is_up(self, network: Network, seen: NetnsSeen) -> bool:
        link = seen.link(network.device)
        if link is None or not link.up:
            return False
        return not any(True for _ in missing_addresses(network.device, gateways(network), seen))

    def replace_addresses(self, network: Network, seen: NetnsSeen) -> Plan:
        """forceAddress: addresses in the way leave the bridge."""
        ops = tuple(DropAddress(network.device, address) for address in strangers(network, seen))
        return (Phase("host", ops),) if ops else ()

    def plan_drop_network(self, network: Network) -> Plan:
        return (Phase("host", (DropLink(network.device),)),)

    def plan_attach(self, record: Attachment, network: Network) -> Plan:
        veth = AddVeth(
            record.veth,
            record.key.ifname,
            record.netns,
            record.mac,
            master=record.home,
            mtu=network.mtu,
            hairpin=network.hairpin,
            isolated=isolated(record, network),
            host_mac=record.key.host_mac(),
        )
        return (Phase("host", (veth, *port_vlans(record, network))), plan_inside(record, network))

    def plan_plug(self, record: Attachment, network: Network) -> Plan:
        port = PlugPort(record.veth, record.home, network.hairpin, isolated(record, network))
        return (Phase("host", (port, *port_vlans(record, network))),)

    def plan_detach(self, record: Attachment) -> Plan:
        return plan_drop(record)

    def check(self, record: Attachment, network: Network, node: NetnsSeen, inside: NetnsSeen) -> Iterator[str]:
        bridge = node.link(record.home)
        if bridge is None:
            yield f"bridge {record.home} is missing"
        elif bridge.kind != "bridge":
            yield f"{record.home} is a {bridge.kind or 'plain link'}, not a bridge"
        elif network.promiscuous and not bridge.promiscuous:
            yield f"bridge {record.home} is not promiscuous"
        veth = node.link(record.veth)
        if veth is None:
            yield f"host interface {record.veth} is missing"
        elif veth.master != record.home:
            yield f"host interface {record.veth} is not a port of {record.home} (master: {veth.master or 'none'})"
        yield from check_inside(record, network, inside)
