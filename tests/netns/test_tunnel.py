"""VXLAN devices, their neighbours and forwarding entries, and policy rules as a true kernel takes them."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_interface, ip_network
from typing import Any

import pytest

from tests.kernel.box import Box, box
from towpath.errors import PhaseFailed
from towpath.kernel import inet, links
from towpath.model import Route
from towpath.plan import (
    AddAddress,
    AddFdb,
    AddNeighbour,
    AddPolicyRule,
    AddRoute,
    DropFdb,
    DropNeighbour,
    DropPolicyRule,
    DropRoute,
    EnsureBridge,
    EnsureVxlan,
    Op,
    TunnelEntry,
)

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

MAC, FAR = "70:b3:d5:80:00:01", "70:b3:d5:80:00:02"
VXLAN = EnsureVxlan("vtep1024", 1024, 64000, ip_address("192.0.2.1"), MAC, mtu=1450)
NEIGHBOURS = (
    AddNeighbour("vtep1024", ip_address("44.128.0.2"), FAR),
    AddNeighbour("vtep1024", ip_address("fd01:a::2"), FAR),
)
FDB = AddFdb("vtep1024", FAR, ip_address("192.0.2.2"))
ROUTES = (
    AddRoute("vtep1024", Route(ip_network("9.0.1.0/24"), ip_address("44.128.0.2"))),
    AddRoute("vtep1024", Route(ip_network("fd01:b:0:0:1::/80"), ip_address("fd01:a::2"))),
    AddRoute("vtep1024", Route(ip_network("192.0.2.2/32"), ip_address("44.128.0.2"), table=42)),
    AddRoute("vtep1024", Route(ip_network("2001:db8::2/128"), ip_address("fd01:a::2"), table=42)),
)
RULES = (
    AddPolicyRule(ip_network("9.0.0.0/8"), 42, 10042),
    AddPolicyRule(ip_network("fd01:b::/64"), 42, 10042),
)
ENTRIES: tuple[TunnelEntry, ...] = (*NEIGHBOURS, FDB, *ROUTES, *RULES)


@pytest.fixture
def host() -> Iterator[Box]:
    with box(0) as made:
        made.do(
            VXLAN,
            AddAddress("vtep1024", ip_interface("44.128.0.1/20")),
            AddAddress("vtep1024", ip_interface("fd01:a::1/64")),
        )
        yield made


def entries(host: Box) -> frozenset[TunnelEntry]:
    return host.wait(lambda: host.kernel.tunnel_entries("vtep1024", 42))


def by_pyroute2(host: Box) -> dict[str, Any]:
    """What another implementation of netlink reads."""

    def read() -> dict[str, Any]:
        from pyroute2 import IPRoute

        with IPRoute() as ip:
            index = ip.link_lookup(ifname="vtep1024")[0]
            link = ip.get_links(index)[0]
            data = dict(link.get("IFLA_LINKINFO").get("IFLA_INFO_DATA")["attrs"])
            neighbours = [n for af in (2, 10) for n in ip.get_neighbours(family=af) if n["ifindex"] == index]
            return {
                "link": (link.get("IFLA_LINKINFO").get("IFLA_INFO_KIND"), link.get("IFLA_ADDRESS"), link["state"]),
                "mtu": link.get("IFLA_MTU"),
                "alias": link.get("IFLA_IFALIAS"),
                "vxlan": {key: data.get(f"IFLA_VXLAN_{key}") for key in ("ID", "PORT", "LOCAL", "LEARNING", "GROUP")},
                "neighbours": {
                    (n.get("NDA_DST"), n.get("NDA_LLADDR"), n.get("NDA_PROTOCOL"))
                    for n in neighbours
                    if n["state"] & 0x80
                },
                "fdb": {
                    (n.get("NDA_LLADDR"), n.get("NDA_DST"), n["state"]) for n in ip.fdb("dump") if n["ifindex"] == index
                },
                "routes": {
                    (r.get("RTA_TABLE"), f"{r.get('RTA_DST')}/{r['dst_len']}", r.get("RTA_GATEWAY"))
                    for af in (socket.AF_INET, socket.AF_INET6)
                    for r in ip.get_routes(family=af)
                    if r["proto"] == inet.ROUTE_PROTOCOL
                },
                "rules": {
                    (f"{r.get('FRA_SRC')}/{r['src_len']}", r.get("FRA_TABLE"), r.get("FRA_PRIORITY"))
                    for af in (socket.AF_INET, socket.AF_INET6)
                    for r in ip.get_rules(family=af)
                    if r.get("FRA_PROTOCOL") == inet.ROUTE_PROTOCOL
                },
            }

    return host.inside(read)


def test_a_tunnel_is_what_pyroute2_reads(host: Box) -> None:
    host.do(*ENTRIES)
    seen = by_pyroute2(host)
    assert seen["link"] == ("vxlan", MAC, "up")
    assert (seen["mtu"], seen["alias"]) == (1450, links.ALIAS)
    assert seen["vxlan"] == {"ID": 1024, "PORT": 64000, "LOCAL": "192.0.2.1", "LEARNING": 0, "GROUP": None}
    assert seen["neighbours"] == {("44.128.0.2", FAR, 84), ("fd01:a::2", FAR, 84)}
    assert seen["fdb"] == {(FAR, "192.0.2.2", 0xC0)}
    assert seen["routes"] == {
        (254, "9.0.1.0/24", "44.128.0.2"),
        (254, "fd01:b:0:0:1::/80", "fd01:a::2"),
        (42, "192.0.2.2/32", "44.128.0.2"),
        (42, "2001:db8::2/128", "fd01:a::2"),
    }
    assert seen["rules"] == {("9.0.0.0/8", 42, 10042), ("fd01:b::/64", 42, 10042)}


def test_what_was_written_is_read_back_and_can_be_written_again(host: Box) -> None:
    assert entries(host) == frozenset()
    host.do(*ENTRIES)
    host.do(*ENTRIES)
    assert entries(host) == frozenset(ENTRIES)


def test_everything_goes_one_by_one_and_twice(host: Box) -> None:
    host.do(*ENTRIES)
    drops: tuple[Op, ...] = (
        *(DropNeighbour(n.link, n.address) for n in NEIGHBOURS),
        DropFdb(FDB.link, FDB.mac, FDB.to),
        *(DropRoute(r.link, r.route) for r in ROUTES),
        *(DropPolicyRule(r.source, r.table, r.priority) for r in RULES),
    )
    for _ in range(2):
        host.do(*drops)
        assert entries(host) == frozenset()


def test_an_entry_is_replaced_by_another_of_its_key(host: Box) -> None:
    host.do(FDB, NEIGHBOURS[0])
    host.do(replace(FDB, to=ip_address("192.0.2.9")), replace(NEIGHBOURS[0], mac=MAC))
    assert entries(host) == {replace(FDB, to=ip_address("192.0.2.9")), replace(NEIGHBOURS[0], mac=MAC)}


def test_dropping_a_forwarding_entry_spares_one_that_leads_elsewhere(host: Box) -> None:
    host.do(FDB)
    host.do(DropFdb(FDB.link, FDB.mac, ip_address("192.0.2.9")))
    assert entries(host) == {FDB}


def test_dropping_a_route_spares_one_by_another_way(host: Box) -> None:
    other = replace(ROUTES[0], route=replace(ROUTES[0].route, gw=ip_address("44.128.0.3")))
    host.do(ROUTES[0], other)
    host.do(DropRoute(ROUTES[0].link, ROUTES[0].route))
    assert entries(host) == {other}


def test_a_foreign_rule_is_not_ours(host: Box) -> None:
    host.run("ip", "rule", "add", "from", "9.0.0.0/8", "lookup", "42", "priority", "10042")
    assert entries(host) == frozenset()


def test_a_route_that_somebody_else_made_is_seen_with_its_link(host: Box) -> None:
    host.do(EnsureBridge("br-x", "02:00:00:00:00:01"), AddAddress("br-x", ip_interface("10.5.0.1/24")))
    host.run("ip", "route", "add", "9.0.1.0/24", "via", "10.5.0.2")
    assert entries(host) == {AddRoute("br-x", Route(ip_network("9.0.1.0/24"), ip_address("10.5.0.2")))}


def test_the_device_again_changes_nothing(host: Box) -> None:
    host.do(*ENTRIES)
    before = by_pyroute2(host)
    host.do(VXLAN)
    assert by_pyroute2(host) == before


def test_another_mtu_is_set_on_the_living_device(host: Box) -> None:
    host.do(*ENTRIES)
    host.do(replace(VXLAN, mtu=1400))
    assert by_pyroute2(host)["mtu"] == 1400
    assert entries(host) == frozenset(ENTRIES)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"mac": FAR}, id="MAC"),
        pytest.param({"vni": 7}, id="network identifier"),
        pytest.param({"port": 4789}, id="port"),
        pytest.param({"local": ip_address("192.0.2.7")}, id="local address"),
        pytest.param({"local": ip_address("2001:db8::1")}, id="family of the underlay"),
    ],
)
def test_a_device_that_differs_is_made_anew(host: Box, change: dict[str, Any]) -> None:
    host.do(NEIGHBOURS[0])
    wanted = replace(VXLAN, **change)
    host.do(wanted)
    assert entries(host) == frozenset()
    link = host.wait(lambda: host.kernel.link("vtep1024"))
    assert link is not None
    assert (link.mac, link.up) == (wanted.mac, True)
    index = link.index
    host.do(wanted)
    again = host.wait(lambda: host.kernel.link("vtep1024"))
    assert again is not None
    assert again.index == index, "what is as wanted is left alone"


def test_a_name_that_belongs_to_another_kind_of_link_is_refused(host: Box) -> None:
    host.do(EnsureBridge("br-x", "02:00:00:00:00:01"))
    with pytest.raises(PhaseFailed, match="is not a VXLAN device") as caught:
        host.do(replace(VXLAN, name="br-x"))
    assert caught.value.errno == errno.EEXIST


def test_thousands_of_entries_in_one_phase(host: Box) -> None:
    """More than a socket takes in one call, and more answers than fit into its buffer."""
    many = tuple(
        AddRoute("vtep1024", Route(IPv4Network((int(IPv4Address("9.0.0.0")) + 256 * n, 24)), IPv4Address("44.128.0.2")))
        for n in range(5000)
    )
    host.do(*many)
    assert entries(host) == frozenset(many)
