"""Bridge mode as plans: what an attachment and a network make, as data."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest

from modes.bridge import Bridge, bridge_mac
from modes.wire import container_routes
from tests.requests import network
from towpath.kernel.contract import LinkSeen, NetnsSeen
from towpath.model import Attachment, Key, Lease, Network, Route
from towpath.plan import (
    AddAddress,
    AddRoute,
    AddVeth,
    Announce,
    DropLink,
    EnsureBridge,
    Plan,
    PortVlans,
    SetLink,
    Sysctl,
)

KEY = Key("cni", "shop", "c1", "eth0")
V4 = Lease(ip_interface("10.1.0.2/24"), ip_address("10.1.0.1"), 0)
V6 = Lease(ip_interface("fd00::2/64"), ip_address("fd00::1"), 1)


def record(*leases: Lease, **changes: Any) -> Attachment:
    made = Attachment(
        KEY,
        mode="bridge",
        parts=("wire", "address"),
        netns="/run/netns/a",
        veth=KEY.veth(),
        home="br-shop",
        mac=KEY.mac(),
        leases=leases or (V4,),
    )
    return replace(made, **changes)


def ops(plan: Plan, kind: type) -> list[Any]:
    return [op for phase in plan for op in phase.ops if isinstance(op, kind)]


def test_a_network_is_a_bridge_with_every_gateway_and_forwarding_on() -> None:
    plan = Bridge().plan_network(network("10.1.0.0/24", "fd00::/64"))
    assert ops(plan, EnsureBridge)[0].name == "br-shop"
    assert [str(op.address) for op in ops(plan, AddAddress)] == ["10.1.0.1/24", "fd00::1/64"]
    assert {op.path for op in ops(plan, Sysctl)} >= {"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"}


def test_a_network_that_is_no_gateway_leaves_the_bridge_bare() -> None:
    plan = Bridge().plan_network(network(gateway=False))
    assert ops(plan, AddAddress) == []
    assert "net/ipv4/ip_forward" not in {op.path for op in ops(plan, Sysctl)}


def test_the_mac_of_a_bridge_is_local_unicast_and_always_the_same() -> None:
    mac = bridge_mac(network())
    assert mac == bridge_mac(network(mtu=1400))
    assert int(mac[:2], 16) & 0b11 == 0b10


def test_an_attachment_is_a_veth_born_in_the_namespace_then_addressed_and_routed() -> None:
    plan = Bridge().plan_attach(record(), network())
    veth = ops(plan, AddVeth)[0]
    assert (veth.master, veth.peer, veth.netns, veth.hairpin) == ("br-shop", "eth0", "/run/netns/a", True)
    assert [phase.where for phase in plan] == ["host", "netns"]
    inside = [type(op) for op in plan[1].ops]
    assert inside == [SetLink, AddAddress, SetLink, AddRoute, Announce]


@pytest.mark.parametrize(
    ("changes", "isolated"),
    [
        pytest.param({}, False, id="open"),
        pytest.param({"isolation": "same-network"}, False, id="same-network is no port isolation"),
        pytest.param({"isolation": "isolated"}, True, id="isolated is"),
    ],
)
def test_isolation_isolates_the_bridge_port(changes: dict[str, str], isolated: bool) -> None:
    assert ops(Bridge().plan_attach(record(**changes), network()), AddVeth)[0].isolated is isolated


def test_vlans_are_set_on_the_port() -> None:
    plan = Bridge().plan_attach(record(), network(vlan=100))
    assert ops(plan, PortVlans)[0].pvid == 100
    assert ops(Bridge().plan_network(network(vlan=100)), EnsureBridge)[0].vlan_filtering


def test_a_detach_names_only_the_host_end() -> None:
    plan = Bridge().plan_detach(record())
    assert ops(plan, DropLink) == [DropLink(KEY.veth())]


DEFAULT = ip_network("0.0.0.0/0")
GIVEN = Route(DEFAULT, ip_address("10.1.0.254"))


@pytest.mark.parametrize(
    ("routes", "default", "want"),
    [
        pytest.param((), True, (Route(DEFAULT, ip_address("10.1.0.1")),), id="the gateway's"),
        pytest.param((), False, (), id="none where no default is wanted"),
        pytest.param((GIVEN,), True, (GIVEN,), id="B5: not twice where one was given"),
        pytest.param(
            (Route(DEFAULT),), True, (Route(DEFAULT, ip_address("10.1.0.1")),), id="B5: no gw means the gateway"
        ),
    ],
)
def test_default_routes(routes: tuple[Route, ...], default: bool, want: tuple[Route, ...]) -> None:
    assert container_routes(record(routes=routes), network(default_route=default)) == want


def test_both_families_get_their_default() -> None:
    routes = container_routes(record(V4, V6), network("10.1.0.0/24", "fd00::/64"))
    assert [str(route.dst) for route in routes] == ["0.0.0.0/0", "::/0"]


def seen(*addresses: str, kind: str = "bridge") -> NetnsSeen:
    link = LinkSeen("br-shop", 7, kind, "02:00:00:00:00:01", 1500, True)
    return NetnsSeen((link,), tuple(("br-shop", ip_interface(text)) for text in addresses), ())


@pytest.mark.parametrize(
    ("row", "what", "words"),
    [
        pytest.param(network(), seen(kind="veth"), "already exists but is not a bridge", id="B2: another kind of link"),
        pytest.param(network(), seen("10.2.0.1/24"), "already has an IP address different from", id="B8: another v4"),
        pytest.param(network(), seen("10.1.0.1/24"), "", id="B8: the same address is fine"),
        pytest.param(network("fd00::/64"), seen("fd01::1/64"), "", id="B8: v6 that does not overlap is fine"),
        pytest.param(network("fd00::/64"), seen("fd00::9/64"), "already has an IP", id="B8: v6 that overlaps"),
        pytest.param(network(force_address=True), seen("10.2.0.1/24"), "", id="B8: forceAddress replaces"),
        pytest.param(network(gateway=False), seen("10.2.0.1/24"), "", id="no gateway, no clash"),
    ],
)
def test_what_stands_in_the_way_of_a_network(row: Network, what: NetnsSeen, words: str) -> None:
    reason = Bridge().check_network(row, what)
    assert words in reason
    assert bool(reason) is bool(words)


def test_forced_addresses_replace_what_is_in_the_way() -> None:
    assert Bridge().replace_addresses(network(), seen("10.2.0.1/24"))[0].ops
    assert Bridge().replace_addresses(network(), seen("10.1.0.1/24")) == ()
