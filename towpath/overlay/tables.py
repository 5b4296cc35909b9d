"""What a node's kernel should hold so that it reaches every other node's part of the overlays, and how it differs.

Of each other node, in each family that both have a tunnel address of (dcos-net's four, and the same for IPv6):

    neighbour   tunnel address → MAC, permanent                on the tunnel device
    fdb         MAC → the node's address on the underlay       on the tunnel device
    route       each block of the node → its tunnel address    main table
    route       the node's own addresses → its tunnel address  table 42

and of each overlay a rule: what comes from its pool asks table 42 first. So a container reaches a host's own address
through the tunnel, and the answer comes back the same way. Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from towpath.errors import BadConfig
from towpath.kernel.contract import NetnsSeen
from towpath.model import Address, Interface, Route, Subnet
from towpath.overlay.config import LEAST_MTU, OverlayConfig
from towpath.overlay.records import Member
from towpath.plan import (
    AddAddress,
    AddFdb,
    AddNeighbour,
    AddPolicyRule,
    AddRoute,
    DropAddress,
    DropFdb,
    DropNeighbour,
    DropPolicyRule,
    DropRoute,
    EnsureVxlan,
    LinkOp,
    Op,
    Sysctl,
    TunnelEntry,
)

PRIORITY = 10042  # of the policy rules: after the local table, before the main one
HEADERS = {4: 50, 6: 70}  # bytes: outer IP, UDP, VXLAN (RFC 7348 section 5), inner Ethernet
MAIN = 254
IP6_USUAL = 1024  # priority of an IPv6 route that names none


@dataclass(frozen=True, slots=True)
class Difference:
    """add comes first: an entry that is replaced is never missing in between."""

    add: tuple[Op, ...] = ()
    drop: tuple[Op, ...] = ()

    def __len__(self) -> int:
        return len(self.add) + len(self.drop)

    @property
    def ops(self) -> tuple[Op, ...]:
        return self.add + self.drop


Tables = dict[object, TunnelEntry]  # key → entry: of one key the kernel holds one


# --- wanted ----------------------------------------------------------------------------------------------------------


def family(config: OverlayConfig, own: Member) -> int:
    """The address family in which this node tunnels: as configured, else IPv4 where the node has it."""
    return config.underlay or (4 if own.ip is not None else 6)


def wanted(config: OverlayConfig, own: Member, members: Iterable[Member]) -> Tables:
    """Everything, by key. Of two nodes that claim one key (a damaged table) the last by name counts."""
    found: Tables = {key(rule): rule for rule in policy_rules(config)}
    for member in sorted(members, key=lambda member: member.name):
        found.update((key(entry), entry) for entry in entries(config, own, member))
    return found


def policy_rules(config: OverlayConfig) -> Iterator[AddPolicyRule]:
    for overlay in config.overlays:
        if overlay.enabled:
            for pool, _ in overlay.pools:
                yield AddPolicyRule(pool, config.table, PRIORITY)


def entries(config: OverlayConfig, own: Member, member: Member) -> Iterator[TunnelEntry]:
    """What leads to one other node; nothing where it has no tunnel yet, or no address of the underlay's family."""
    to = member.at(family(config, own))
    if member.name == own.name or member.vtep is None or own.vtep is None or to is None:
        return
    link = config.device
    yield AddFdb(link, member.vtep.mac, to)
    for version in (4, 6):
        hop = member.vtep.of(version)
        if hop is None or own.vtep.of(version) is None:
            continue
        yield AddNeighbour(link, hop.ip, member.vtep.mac)
        for one in member.slices:
            for block in one.blocks:
                if block.version == version:
                    yield AddRoute(link, Route(block, hop.ip))
        if (address := member.at(version)) is not None:
            yield AddRoute(link, Route(_host(address), hop.ip, table=config.table))


def _host(address: Address) -> Subnet:
    if address.version == 4:
        return IPv4Network((int(address), 32))
    return IPv6Network((int(address), 128))


# --- the device ------------------------------------------------------------------------------------------------------


def device(config: OverlayConfig, own: Member, mtu: int) -> tuple[LinkOp, ...]:
    """The tunnel device with its addresses. Done again it changes nothing. Raises BadConfig as `local` does."""
    if own.vtep is None:
        return ()
    name = config.device
    ops: list[LinkOp] = [EnsureVxlan(name, config.vni, config.port, local(config, own), own.vtep.mac, mtu)]
    ops.append(Sysctl(f"net/ipv6/conf/{name}/accept_ra", "0", optional=True))
    if own.vtep.ip6 is not None:
        ops.append(Sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "0", optional=True))
    ops += [AddAddress(name, address) for address in addresses(own)]
    ops += [Sysctl("net/ipv4/ip_forward", "1")] if own.vtep.ip else []
    ops += [Sysctl("net/ipv6/conf/all/forwarding", "1")] if own.vtep.ip6 else []
    return tuple(ops)


def addresses(own: Member) -> tuple[Interface, ...]:
    vtep = own.vtep
    return tuple(a for a in (vtep.ip, vtep.ip6) if a is not None) if vtep else ()


def strange_addresses(config: OverlayConfig, own: Member, seen: NetnsSeen) -> tuple[DropAddress, ...]:
    """Addresses on the tunnel device that are not the node's (any more)."""
    held = (address for link, address in seen.addresses if link == config.device)
    return tuple(
        DropAddress(config.device, address)
        for address in held
        if address not in addresses(own) and not address.ip.is_link_local
    )


def local(config: OverlayConfig, own: Member) -> Address:
    """The node's end of the tunnel on the underlay. Raises BadConfig where it has no address of that family."""
    version = family(config, own)
    address = own.at(version)
    if address is None:
        raise BadConfig(f"node {own.name!r} has no IPv{version} address, and the tunnel's underlay is IPv{version}")
    return address


def mtu(config: OverlayConfig, own: Member, seen: NetnsSeen) -> int:
    """Of the tunnel device and of everything behind it: as configured, else what the underlay's link leaves.

    Raises BadConfig naming the numbers where the underlay cannot carry what is configured, or too little for IPv6.
    """
    address, version = local(config, own), family(config, own)
    name = next((link for link, held in seen.addresses if held.ip == address), "")
    link = seen.link(name)
    if link is None:
        raise BadConfig(f"no link of this host has the address {address} of node {own.name!r}")
    room = link.mtu - HEADERS[version]
    least = LEAST_MTU[6 if config.has_ipv6 else 4]
    if config.vtep_mtu > room:
        raise BadConfig(f"vtep_mtu {config.vtep_mtu} does not fit: {link.name} has MTU {link.mtu}, which leaves {room}")
    if room < least:
        raise BadConfig(f"{link.name} has MTU {link.mtu}, which leaves {room} to overlays: they need {least}")
    return config.vtep_mtu or room


# --- difference ------------------------------------------------------------------------------------------------------


def key(entry: TunnelEntry) -> object:
    """What the kernel holds one of: an entry with the same key replaces."""
    match entry:
        case AddNeighbour():
            return (AddNeighbour, entry.link, entry.address)
        case AddFdb():
            return (AddFdb, entry.link, entry.mac)
    return entry


def difference(config: OverlayConfig, tables: Tables, seen: Iterable[TunnelEntry]) -> Difference:
    """What brings the kernel to `tables`; what is foreign goes where it concerns us (see `ours`)."""
    return change(tables, ours(config, tables, seen))


def change(tables: Mapping[object, TunnelEntry], held: Iterable[TunnelEntry]) -> Difference:
    """Wanted minus held, and held minus wanted. What a new entry of the same key replaces needs no drop."""
    there = frozenset(held)
    add = sorted((entry for entry in tables.values() if entry not in there), key=_order)
    gone = sorted((entry for entry in there if key(entry) not in tables), key=_order, reverse=True)
    return Difference(tuple(add), tuple(map(undo, gone)))


def ours(config: OverlayConfig, tables: Tables, seen: Iterable[TunnelEntry]) -> Iterator[TunnelEntry]:
    """What was seen that is ours to judge.

    All on the tunnel device; our rules for our table; and of routes through other links those that take our place.
    """
    places = {_place(entry.route) for entry in tables.values() if isinstance(entry, AddRoute)}
    for entry in seen:
        match entry:
            case AddPolicyRule():
                mine = entry.table == config.table
            case AddRoute():
                mine = entry.link == config.device or (_place(entry.route) in places and _wins(entry.route))
            case _:
                mine = entry.link == config.device
        if mine:
            yield entry


def _place(route: Route) -> tuple[Subnet, int]:
    return route.dst, route.table or MAIN


def _wins(route: Route) -> bool:
    """Whether the kernel would prefer a foreign route to one of ours, which names no priority."""
    return route.priority == 0 or (route.dst.version == 6 and route.priority <= IP6_USUAL)


_RANKS = {AddFdb: 0, AddNeighbour: 1, AddRoute: 2, AddPolicyRule: 3}


def _order(entry: TunnelEntry) -> int:
    """A route is worth something when its next hop can be reached."""
    return _RANKS[type(entry)]


def undo(entry: TunnelEntry) -> Op:
    match entry:
        case AddNeighbour():
            return DropNeighbour(entry.link, entry.address)
        case AddFdb():
            return DropFdb(entry.link, entry.mac, entry.to)
        case AddRoute():
            return DropRoute(entry.link, entry.route)
        case AddPolicyRule():
            return DropPolicyRule(entry.source, entry.table, entry.priority)


def step(
    config: OverlayConfig, own: Member, tables: Tables, old: Member | None, new: Member | None
) -> tuple[Tables, Difference]:
    """What one node's new row (None = it is gone) changes: only that node is computed, however many there are.

    tables: what is wanted so far. An entry of the old row that another node's has replaced is that node's, and stays.
    """
    before = {key(entry): entry for entry in entries(config, own, old)} if old else {}
    after = {key(entry): entry for entry in entries(config, own, new)} if new else {}
    held = {name: entry for name, entry in before.items() if tables.get(name) == entry}
    result = {**tables, **after}
    for name in held.keys() - after.keys():
        del result[name]
    return result, change(after, held.values())
