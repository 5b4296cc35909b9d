"""Packs and reads rtnetlink's messages about addresses, routes and neighbours, both families alike (rtnetlink(7))."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface, ip_address, ip_network

from towpath.kernel.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    attribute,
    attributes,
    nest,
    number,
    u32,
)
from towpath.model import Address, Interface, Route, Subnet

ROUTE_PROTOCOL = 84  # who made a route or address, in `ip route` and `ip address`; free in linux/rtnetlink.h

RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_DELNEIGH = 29
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS, IFA_PROTO = 1, 2, 4, 8, 11
IFA_F_NODAD = 0x02
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_METRICS, RTA_MULTIPATH = 1, 4, 5, 6, 8, 9
RTA_TABLE, RTA_VIA = 15, 18
RTAX_MTU, RTAX_ADVMSS = 2, 8
NDA_DST = 1
RT_TABLE_MAIN, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE, RTN_UNICAST = 254, 0, 253, 255, 1
RTPROT_KERNEL = 2
RTNH_F_ONLINK, RTM_F_CLONED = 4, 0x200
IP6_RT_PRIO_USER = 1024  # what the kernel gives an IPv6 route that names no priority

IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst length, src length, tos, table, protocol, scope, type, flags
NDMSG = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
NEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, index


def family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def add_address(index: int, address: Interface, nodad: bool) -> Message:
    flags = NLM_F_CREATE | NLM_F_EXCL
    return Message(RTM_NEWADDR, flags, address_body(index, address, nodad) + attribute(IFA_PROTO, bytes([84])))


def drop_address(index: int, address: Interface) -> Message:
    return Message(RTM_DELADDR, 0, address_body(index, address, nodad=False))


def address_body(index: int, address: Interface, nodad: bool) -> bytes:
    packed = address.ip.packed
    body = IFADDR.pack(family(address.version), address.network.prefixlen, 0, RT_SCOPE_UNIVERSE, index)
    body += attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)
    if isinstance(address, IPv4Interface) and address.network.prefixlen < 31:
        body += attribute(IFA_BROADCAST, address.network.broadcast_address.packed)
    if isinstance(address, IPv6Interface) and nodad:
        body += u32(IFA_FLAGS, IFA_F_NODAD)
    return body


def add_route(index: int, route: Route, onlink: bool = False) -> Message:
    """A route through link `index`.

    NLM_F_APPEND: an equal route is refused with EEXIST, one with another next hop is set beside it.
    """
    table = route.table or RT_TABLE_MAIN
    scope = route.scope
    if scope is None:
        scope = RT_SCOPE_LINK if route.gw is None and route.dst.version == 4 else RT_SCOPE_UNIVERSE
    body = RTMSG.pack(
        family(route.dst.version),
        route.dst.prefixlen,
        0,
        0,
        table if table < 256 else 0,
        ROUTE_PROTOCOL,
        scope,
        RTN_UNICAST,
        RTNH_F_ONLINK if onlink else 0,
    )
    body += attribute(RTA_DST, route.dst.network_address.packed) if route.dst.prefixlen else b""
    body += u32(RTA_OIF, index) + next_hop(route)
    body += u32(RTA_PRIORITY, route.priority) if route.priority else b""
    body += u32(RTA_TABLE, table) if table > 255 else b""
    metrics = [u32(kind, value) for kind, value in ((RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)) if value]
    body += nest(RTA_METRICS, *metrics) if metrics else b""
    return Message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, body)


def drop_route(index: int, route: Route) -> Message:
    """Whatever protocol and scope it has; table, way and priority must be these (fib_table_delete, ip6_route_del)."""
    table = route.table or RT_TABLE_MAIN
    head = RTMSG.pack(
        family(route.dst.version),
        route.dst.prefixlen,
        0,
        0,
        table if table < 256 else 0,
        0,
        RT_SCOPE_NOWHERE,
        RTN_UNICAST,
        0,
    )
    body = head + (attribute(RTA_DST, route.dst.network_address.packed) if route.dst.prefixlen else b"")
    body += u32(RTA_OIF, index) + next_hop(route)
    body += u32(RTA_PRIORITY, route.priority) if route.priority else b""
    body += u32(RTA_TABLE, table) if table > 255 else b""
    return Message(RTM_DELROUTE, 0, body)


def next_hop(route: Route) -> bytes:
    if route.gw is None:
        return b""
    if route.gw.version == route.dst.version:
        return attribute(RTA_GATEWAY, route.gw.packed)
    return attribute(RTA_VIA, struct.pack("=H", family(route.gw.version)) + route.gw.packed)


def drop_neighbour(index: int, address: Address) -> Message:
    return Message(
        RTM_DELNEIGH, 0, NDMSG.pack(family(address.version), index, 0, 0, 0) + attribute(NDA_DST, address.packed)
    )


def find_route(address: Address) -> Message:
    """Ask which route the kernel would take to `address`."""
    bits = address.max_prefixlen
    head = RTMSG.pack(family(address.version), bits, 0, 0, 0, 0, 0, 0, 0)
    return Message(RTM_GETROUTE, 0, head + attribute(RTA_DST, address.packed))


def list_addresses() -> Message:
    return Message(RTM_GETADDR, 0, IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0))


def list_routes(version: int, table: int = RT_TABLE_MAIN) -> Message:
    """One table of one family. (The kernel filters where it can; read_routes leaves out the rest.)"""
    head = RTMSG.pack(family(version), 0, 0, 0, table, 0, 0, 0, 0)
    return Message(RTM_GETROUTE, 0, head)


# --- reading -----------------------------------------------------------------------------------------------------


def read_address(body: bytes) -> tuple[int, Interface]:
    """One RTM_NEWADDR: index of the link, and the address with its prefix length."""
    _, bits, _, _, index = IFADDR.unpack_from(body)
    found = attributes(body, IFADDR.size)
    packed = found.get(IFA_LOCAL) or found[IFA_ADDRESS]
    address = ip_address(packed)
    if isinstance(address, IPv4Address):
        return index, IPv4Interface((packed, bits))
    return index, IPv6Interface((packed, bits))


def made_by_kernel(body: bytes) -> bool:
    """Whether a route came with an address, and goes with it."""
    return body[5] == RTPROT_KERNEL


def read_routes(body: bytes, wanted: int = RT_TABLE_MAIN) -> list[tuple[int, Route]]:
    """One RTM_NEWROUTE of that table: (index of the link, route) for each next hop; a route of ours reads as asked.

    So what add_route fills in by itself (table main, the usual scope, IPv6's default priority) reads as not given.
    """
    af, bits, _, _, table, _, scope, kind, flags = RTMSG.unpack_from(body)
    found = attributes(body, RTMSG.size)
    table = number(found[RTA_TABLE]) if RTA_TABLE in found else table
    if kind != RTN_UNICAST or table != wanted or flags & RTM_F_CLONED:
        return []
    version = 4 if af == socket.AF_INET else 6
    dst = destination(version, found.get(RTA_DST), bits)
    metrics = attributes(found.get(RTA_METRICS, b""))
    priority = number(found.get(RTA_PRIORITY, b""))
    routes = []
    for index, hop in hops(found):
        gw = read_gateway(hop)
        usual = version == 6 or scope == (RT_SCOPE_LINK if gw is None else RT_SCOPE_UNIVERSE)
        route = Route(
            dst,
            gw,
            mtu=number(metrics.get(RTAX_MTU, b"")),
            advmss=number(metrics.get(RTAX_ADVMSS, b"")),
            priority=0 if version == 6 and priority == IP6_RT_PRIO_USER else priority,
            table=0 if table == RT_TABLE_MAIN else table,
            scope=None if usual else scope,
        )
        routes.append((index, route))
    return routes


def hops(found: dict[int, bytes]) -> list[tuple[int, dict[int, bytes]]]:
    """Index and attributes of each next hop: one, or those of a multipath route."""
    if RTA_MULTIPATH not in found:
        return [(number(found.get(RTA_OIF, b"")), found)]
    data, start, result = found[RTA_MULTIPATH], 0, []
    while start + NEXTHOP.size <= len(data):
        length, _, _, index = NEXTHOP.unpack_from(data, start)
        if length < NEXTHOP.size:
            break
        result.append((index, attributes(data[start : start + length], NEXTHOP.size)))
        start += (length + 3) & ~3
    return result


def destination(version: int, packed: bytes | None, bits: int) -> Subnet:
    return ip_network((packed or bytes(4 if version == 4 else 16), bits), strict=False)


def read_gateway(found: dict[int, bytes]) -> Address | None:
    packed = found.get(RTA_GATEWAY) or found.get(RTA_VIA, b"")[2:]
    return ip_address(packed) if packed else None


def read_device(body: bytes) -> int:
    """Index of the link that the answer to find_route names; 0 = none."""
    return number(attributes(body, RTMSG.size).get(RTA_OIF, b""))
