"""Reads what one network namespace holds: links, addresses, routes, queueing disciplines, and the way to an address."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

from towpath.kernel import inet, links, shape
from towpath.kernel.contract import LinkSeen, NetnsSeen, ShapeSeen
from towpath.kernel.netlink import Netlink
from towpath.model import Address

# No way there: the kernel has many words for it (man 7 rtnetlink has none).
NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENODEV})


def look(netlink: Netlink) -> NetnsSeen:
    """Everything, in the kernel's order."""
    read = [links.read_link(body) for kind, body in netlink.dump(links.list_links()) if kind == links.RTM_NEWLINK]
    names = {link.index: link.name for link, _ in read}
    addresses = [inet.read_address(body) for _, body in netlink.dump(inet.list_addresses())]
    routes = [pair for version in (4, 6) for body in main_table(netlink, version) for pair in inet.read_routes(body)]
    return NetnsSeen(
        tuple(replace(link, master=names.get(master, "")) if master else link for link, master in read),
        tuple((names[index], address) for index, address in addresses if index in names),
        tuple((names[index], route) for index, route in routes if index in names),
    )


def main_table(netlink: Netlink, version: int) -> list[bytes]:
    try:
        return [body for _, body in netlink.dump(inet.list_routes(version))]
    except FileNotFoundError:
        return []  # ENOENT: a namespace in which nothing was ever up has no main table yet


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
