"""Reads what one network namespace holds: links, addresses, routes, queueing disciplines, and the way to an address."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace

from towpath.kernel import inet, links, shape, tunnel
from towpath.kernel.contract import LinkSeen, NetnsSeen, ShapeSeen
from towpath.kernel.netlink import Netlink
from towpath.model import Address
from towpath.plan import AddRoute, TunnelEntry

# No way there: the kernel has many words for it (man 7 rtnetlink has none).
NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENODEV})


def look(netlink: Netlink) -> NetnsSeen:
    """Everything, in the kernel's order."""
    read = [links.read_link(body) for kind, body in netlink.dump(links.list_links()) if kind == links.RTM_NEWLINK]
    names = {link.index: link.name for link, _ in read}
    addresses = [inet.read_address(body) for _, body in netlink.dump(inet.list_addresses())]
    routes = [pair for version in (4, 6) for body in whole_table(netlink, version) for pair in inet.read_routes(body)]
    return NetnsSeen(
        tuple(replace(link, master=names.get(master, "")) if master else link for link, master in read),
        tuple((names[index], address) for index, address in addresses if index in names),
        tuple((names[index], route) for index, route in routes if index in names),
    )


def whole_table(netlink: Netlink, version: int, table: int = inet.RT_TABLE_MAIN) -> list[bytes]:
    try:
        return [body for _, body in netlink.dump(inet.list_routes(version, table))]
    except FileNotFoundError:
        return []  # ENOENT: a table is born with its first route, the main one with the first link that is up


def tunnel_entries(netlink: Netlink, name: str, table: int) -> frozenset[TunnelEntry]:
    """What leads into tunnel device `name`, and what keeps others from it: see contract.Kernel.tunnel_entries."""
    names: dict[int, str] = {}
    found: set[TunnelEntry] = set()
    if link := find_link(netlink, name):
        found.update(_neighbours(netlink, link))
        names[link.index] = name
    for version in (4, 6):
        for kind, body in netlink.dump(tunnel.list_rules(version)):
            if kind == tunnel.RTM_NEWRULE and (rule := tunnel.read_rule(body)):
                found.add(rule)
        for number in (inet.RT_TABLE_MAIN, table):
            for body in whole_table(netlink, version, number):
                if not inet.made_by_kernel(body):
                    found.update(
                        AddRoute(
                            names[index] if index in names else names.setdefault(index, name_of(netlink, index)), r
                        )
                        for index, r in inet.read_routes(body, number)
                    )
    return frozenset(found)


def _neighbours(netlink: Netlink, link: LinkSeen) -> Iterator[TunnelEntry]:
    for version in (4, 6):
        for _, body in netlink.dump(tunnel.list_neighbours(link.index, inet.family(version))):
            if neighbour := tunnel.read_neighbour(link.name, link.index, body):
                yield neighbour
    for _, body in netlink.dump(tunnel.list_neighbours(link.index, links.AF_BRIDGE)):
        if entry := tunnel.read_fdb(link.name, link.index, body):
            yield entry


def find_link(netlink: Netlink, name: str) -> LinkSeen | None:
    answer = netlink.ask(links.get_link(name))
    if answer.errno == errno.ENODEV:
        return None
    if answer.errno:
        raise OSError(answer.errno, answer.text or os.strerror(answer.errno))
    link, master = links.read_link(answer.data[0])
    return replace(link, master=name_of(netlink, master)) if master else link


def name_of(netlink: Netlink, index: int) -> str:
    """Name of the link with that index; "" where it went meanwhile."""
    answer = netlink.ask(links.get_link_at(index))
    return "" if answer.errno else links.read_link(answer.data[0])[0].name


def route_device(netlink: Netlink, address: Address) -> str:
    """Name of the link through which `address` is reached; "" where there is no route."""
    answer = netlink.ask(inet.find_route(address))
    if answer.errno in NO_ROUTE:
        return ""
    if answer.errno:
        raise OSError(answer.errno, answer.text or os.strerror(answer.errno))
    index = inet.read_device(answer.data[0])
    return name_of(netlink, index) if index else ""


def shapes(netlink: Netlink, name: str) -> tuple[ShapeSeen, ...]:
    """Queueing disciplines of a link, root first; none where there is no such link."""
    link = find_link(netlink, name)
    if link is None:
        return ()
    bodies = [body for _, body in netlink.dump(shape.list_disciplines(link.index))]
    return shape.read_shapes(name, link.index, bodies)
