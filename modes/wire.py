"""The pieces of a wire that modes share: what happens inside the namespace, and how a wire is taken away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_network

from towpath.kernel.contract import NetnsSeen
from towpath.model import Attachment, Interface, Network, Route
from towpath.plan import (
    AddAddress,
    AddRoute,
    Announce,
    DropLink,
    ForgetNeighbours,
    LinkOp,
    Phase,
    Plan,
    SetLink,
    Sysctl,
)

DEFAULT = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}


def gateway_of(record: Attachment, version: int) -> Route | None:
    """The default route of one family: through the first gateway that a lease of that family names."""
    for lease in record.leases:
        if lease.address.version == version and lease.gateway is not None:
            return Route(DEFAULT[version], lease.gateway)
    return None


def container_routes(record: Attachment, network: Network) -> tuple[Route, ...]:
    """The record's routes (a missing gateway is the family's), then the default unless it was given already."""
    gateways = {v: gateway_of(record, v) for v in (4, 6)}
    routes: list[Route] = []
    for route in record.routes:
        default = gateways[route.dst.version]
        if route.gw is None and route.scope is None and default is not None:
            route = Route(route.dst, default.gw, route.mtu, route.advmss, route.priority, route.table, route.scope)
        if route not in routes:
            routes.append(route)
    for version, default in gateways.items():
        known = any(r.dst == DEFAULT[version] and r.table in (0, 254) for r in routes)
        if default and network.default_route and not known:
            routes.append(default)
    return tuple(routes)


def plan_inside(record: Attachment, network: Network) -> Phase:
    """Address, bring up and route the container's end, and tell the neighbours who has the address now."""
    ifname, v6 = record.key.ifname, any(lease.address.version == 6 for lease in record.leases)
    ops: list[LinkOp] = [SetLink("lo", up=True)]
    if v6:
        # Images and hosts that switch IPv6 off by default would refuse the address (EACCES).
        ops += [Sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "0", optional=True) for name in ("lo", ifname)]
        ops += [Sysctl(f"net/ipv6/conf/{ifname}/accept_dad", "1" if network.dad else "0", optional=True)]
        ops += [Sysctl(f"net/ipv6/conf/{ifname}/keep_addr_on_down", "1", optional=True)]
    ops += [AddAddress(ifname, lease.address, nodad=not network.dad) for lease in record.leases]
    if network.interface_up:
        ops.append(SetLink(ifname, up=True))
        ops += [AddRoute(ifname, route) for route in container_routes(record, network)]
        if record.leases:
            ops.append(Announce(ifname, record.mac, tuple(record.addresses)))
    return Phase("netns", tuple(ops), record.netns)


def plan_drop(record: Attachment) -> Plan:
    """The veth goes, and with it the container's end; stale neighbour entries of its addresses go too."""
    ops: list[LinkOp] = []
    if record.veth:
        ops.append(DropLink(record.veth))
    if record.home and record.leases:
        ops.append(ForgetNeighbours(record.home, tuple(record.addresses)))
    return (Phase("host", tuple(ops)),) if ops else ()


def check_inside(record: Attachment, network: Network, inside: NetnsSeen) -> Iterator[str]:
    """How the container's end differs from the record."""
    ifname = record.key.ifname
    link = inside.link(ifname)
    if link is None:
        yield f"interface {ifname} is missing in {record.netns}"
        return
    if link.kind != "veth":
        yield f"interface {ifname} is a {link.kind or 'plain'} link, not a veth"
    if record.mac and link.mac != record.mac:
        yield f"interface {ifname} has MAC {link.mac}, not {record.mac}"
    yield from missing_addresses(ifname, (lease.address for lease in record.leases), inside)
    if network.interface_up:
        held = {(route.dst, route.gw) for name, route in inside.routes if name == ifname}
        for route in container_routes(record, network):
            if route.table in (0, 254) and (route.dst, route.gw) not in held:
                yield f"route to {route.dst}{f' via {route.gw}' if route.gw else ''} is missing in {record.netns}"


def missing_addresses(link: str, wanted: Iterable[Interface], seen: NetnsSeen) -> Iterator[str]:
    held = {address for name, address in seen.addresses if name == link}
    for address in wanted:
        if address not in held:
            yield f"address {address} is missing on {link}"
