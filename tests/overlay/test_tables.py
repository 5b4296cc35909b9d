"""Wanted tables and their difference from the kernel's: pure, at any size."""

from __future__ import annotations

import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.overlay.cluster import grown
from towpath.errors import BadConfig
from towpath.kernel.contract import LinkSeen, NetnsSeen
from towpath.model import Route
from towpath.overlay.config import DCOS, OverlayConfig
from towpath.overlay.records import Member
from towpath.overlay.tables import (
    Tables,
    change,
    device,
    difference,
    entries,
    key,
    mtu,
    step,
    strange_addresses,
    wanted,
)
from towpath.plan import (
    AddAddress,
    AddFdb,
    AddNeighbour,
    AddPolicyRule,
    AddRoute,
    DropAddress,
    DropFdb,
    DropNeighbour,
    DropRoute,
    EnsureVxlan,
    Op,
    TunnelEntry,
)

FIRST, SECOND, THIRD = grown(3)
FAR = "70:b3:d5:80:00:02"
VTEP = "vtep1024"


def test_what_leads_to_one_node_is_what_dcos_net_wrote_and_its_twin_in_ipv6() -> None:
    assert set(entries(DCOS, FIRST, SECOND)) == {
        AddNeighbour(VTEP, IPv4Address("44.128.0.2"), FAR),
        AddFdb(VTEP, FAR, IPv4Address("10.0.0.2")),
        AddRoute(VTEP, Route(IPv4Network("9.0.1.0/24"), IPv4Address("44.128.0.2"))),
        AddRoute(VTEP, Route(IPv4Network("10.0.0.2/32"), IPv4Address("44.128.0.2"), table=42)),
        AddNeighbour(VTEP, IPv6Address("fd01:a::2"), FAR),
        AddRoute(VTEP, Route(IPv6Network("fd01:b:0:0:1::/80"), IPv6Address("fd01:a::2"))),
        AddRoute(VTEP, Route(IPv6Network("2001:db8::2/128"), IPv6Address("fd01:a::2"), table=42)),
    }


def test_every_pool_has_its_rule() -> None:
    rules = [entry for entry in wanted(DCOS, FIRST, []).values() if isinstance(entry, AddPolicyRule)]
    assert [(str(rule.source), rule.table) for rule in rules] == [("9.0.0.0/8", 42), ("fd01:b::/64", 42)]


@pytest.mark.parametrize(
    ("own", "member"),
    [
        pytest.param(FIRST, FIRST, id="itself"),
        pytest.param(FIRST, replace(SECOND, vtep=None), id="a node that has no tunnel yet"),
        pytest.param(replace(FIRST, vtep=None), SECOND, id="before this node has one"),
        pytest.param(FIRST, replace(SECOND, ip=None), id="a node without an address of the underlay's family"),
    ],
)
def test_nothing_leads_to(own: Member, member: Member) -> None:
    assert list(entries(DCOS, own, member)) == []


SIX = replace(DCOS, vtep_subnet=None, overlays=DCOS.overlays[1:])


def test_a_cluster_of_ipv6_only_has_forwarding_entries_too() -> None:
    first, second = grown(2, SIX, (6,))
    found = set(entries(SIX, first, second))
    assert AddFdb(VTEP, "70:b3:d5:00:00:02", IPv6Address("2001:db8::2")) in found
    assert len(found) == 4


def test_the_underlay_of_a_dual_stack_cluster_can_be_ipv6() -> None:
    config = replace(DCOS, underlay=6)
    assert AddFdb(VTEP, FAR, IPv6Address("2001:db8::2")) in set(entries(config, FIRST, SECOND))


# --- the device ------------------------------------------------------------------------------------------------------


def test_the_device_has_the_nodes_tunnel_addresses() -> None:
    ops = device(DCOS, FIRST, 1450)
    assert ops[0] == EnsureVxlan(VTEP, 1024, 64000, IPv4Address("10.0.0.1"), "70:b3:d5:80:00:01", 1450)
    assert [str(op.address) for op in ops if isinstance(op, AddAddress)] == ["44.128.0.1/20", "fd01:a::1/64"]


def host(mtu: int) -> NetnsSeen:
    eth0 = LinkSeen("eth0", 2, "", "02:00:00:00:00:09", mtu, up=True)
    held = (IPv4Interface("10.0.0.1/24"), IPv6Interface("2001:db8::1/64"))
    return NetnsSeen((eth0,), tuple(("eth0", address) for address in held), ())


@pytest.mark.parametrize(
    ("underlay", "changes", "want"),
    [
        pytest.param(1500, {}, 1450, id="less the header"),
        pytest.param(9000, {}, 8950, id="jumbo"),
        pytest.param(1500, {"underlay": 6}, 1430, id="IPv6 has a larger one"),
        pytest.param(1500, {"vtep_mtu": 1420}, 1420, id="as configured"),
    ],
)
def test_the_mtu_is_what_the_underlay_leaves(underlay: int, changes: dict[str, Any], want: int) -> None:
    assert mtu(replace(DCOS, **changes), FIRST, host(underlay)) == want


@pytest.mark.parametrize(
    ("config", "own", "seen", "words"),
    [
        pytest.param(DCOS, FIRST, host(1300), "leaves 1250 to overlays: they need 1280", id="too small for IPv6"),
        pytest.param(replace(DCOS, vtep_mtu=1480), FIRST, host(1500), "vtep_mtu 1480 does not fit", id="too large"),
        pytest.param(DCOS, SECOND, host(1500), "no link of this host has the address 10.0.0.2", id="another host"),
        pytest.param(SIX, replace(FIRST, ip6=None, ip=None), host(1500), "has no IPv6 address", id="no address"),
    ],
)
def test_an_underlay_that_cannot_carry_it_is_named(
    config: OverlayConfig, own: Member, seen: NetnsSeen, words: str
) -> None:
    with pytest.raises(BadConfig, match=words):
        mtu(config, own, seen)


def test_addresses_that_are_not_the_nodes_leave_the_device() -> None:
    held = (IPv4Interface("44.128.0.1/20"), IPv4Interface("44.128.0.9/20"), IPv6Interface("fe80::1/64"))
    seen = NetnsSeen((), tuple((VTEP, address) for address in held), ())
    assert strange_addresses(DCOS, FIRST, seen) == (DropAddress(VTEP, IPv4Interface("44.128.0.9/20")),)


# --- difference ------------------------------------------------------------------------------------------------------

ROUTE = AddRoute(VTEP, Route(IPv4Network("9.0.1.0/24"), IPv4Address("44.128.0.2")))
TABLES = wanted(DCOS, FIRST, [FIRST, SECOND])
HELD = frozenset(TABLES.values())


def test_a_kernel_that_holds_it_all_is_left_alone() -> None:
    assert len(difference(DCOS, TABLES, HELD)) == 0


def test_an_empty_kernel_gets_next_hops_before_routes() -> None:
    kinds = [type(op) for op in difference(DCOS, TABLES, ()).add]
    assert len(kinds) == len(TABLES)
    assert kinds.index(AddRoute) > max(i for i, kind in enumerate(kinds) if kind in (AddFdb, AddNeighbour))


@pytest.mark.parametrize(
    ("foreign", "drop"),
    [
        pytest.param(
            AddFdb(VTEP, "02:00:00:00:00:77", IPv4Address("10.0.0.9")),
            DropFdb(VTEP, "02:00:00:00:00:77", IPv4Address("10.0.0.9")),
            id="a forwarding entry that nobody wants",
        ),
        pytest.param(
            AddNeighbour(VTEP, IPv4Address("44.128.0.77"), FAR),
            DropNeighbour(VTEP, IPv4Address("44.128.0.77")),
            id="a neighbour that nobody wants",
        ),
        pytest.param(
            AddRoute(VTEP, Route(IPv4Network("9.9.9.0/24"), IPv4Address("44.128.0.2"))),
            DropRoute(VTEP, Route(IPv4Network("9.9.9.0/24"), IPv4Address("44.128.0.2"))),
            id="a route into the tunnel",
        ),
        pytest.param(
            replace(ROUTE, link="eth0"), DropRoute("eth0", ROUTE.route), id="a route through another link in our place"
        ),
        pytest.param(
            AddRoute("eth0", Route(IPv6Network("fd01:b:0:0:1::/80"), priority=512)),
            DropRoute("eth0", Route(IPv6Network("fd01:b:0:0:1::/80"), priority=512)),
            id="one in IPv6 that the kernel would prefer",
        ),
    ],
)
def test_what_is_foreign_goes(foreign: TunnelEntry, drop: Op) -> None:
    assert difference(DCOS, TABLES, HELD | {foreign}).ops == (drop,)


@pytest.mark.parametrize(
    "foreign",
    [
        pytest.param(AddNeighbour("eth0", IPv4Address("10.0.0.9"), FAR), id="another link's neighbour"),
        pytest.param(AddRoute("eth0", Route(IPv4Network("10.9.0.0/24"))), id="a route elsewhere"),
        pytest.param(AddRoute("eth0", Route(IPv4Network("9.0.1.0/25"))), id="a route to a part of a block"),
        pytest.param(replace(ROUTE, link="eth0", route=replace(ROUTE.route, priority=9)), id="one that loses"),
        pytest.param(AddRoute("eth0", Route(IPv4Network("10.7.0.0/24"), table=42)), id="the table's other routes"),
        pytest.param(AddPolicyRule(IPv4Network("10.0.0.0/8"), 7, 10), id="a rule for another table"),
    ],
)
def test_what_concerns_us_not_stays(foreign: TunnelEntry) -> None:
    assert len(difference(DCOS, TABLES, HELD | {foreign})) == 0


def test_what_is_replaced_is_not_dropped() -> None:
    moved = replace(SECOND, ip=IPv4Address("10.0.0.99"))
    found = difference(DCOS, wanted(DCOS, FIRST, [moved]), HELD)
    assert AddFdb(VTEP, FAR, IPv4Address("10.0.0.99")) in found.add
    assert [type(op) for op in found.drop] == [DropRoute], "only the route to the old address"


# --- one node at a time ----------------------------------------------------------------------------------------------


def apply(held: frozenset[TunnelEntry], found: tuple[TunnelEntry, ...], drop: tuple[Op, ...]) -> frozenset[TunnelEntry]:
    """What a kernel holds afterwards."""
    tables: Tables = {key(entry): entry for entry in held}
    tables.update((key(entry), entry) for entry in found)
    for op in drop:
        match op:
            case DropNeighbour():
                tables.pop((AddNeighbour, op.link, op.address), None)
            case DropFdb():
                tables.pop((AddFdb, op.link, op.mac), None)
            case DropRoute():
                tables.pop(AddRoute(op.link, op.route), None)
    return frozenset(tables.values())


POOL = grown(5)
STATES = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([None, 0, 1, 2])), max_size=12)


@given(STATES)
def test_steps_lead_where_the_whole_computation_does(steps: list[tuple[int, int | None]]) -> None:
    """Nodes come, go, and take over the tunnel addresses and blocks of others."""
    own, members = POOL[0], {member.name: member for member in POOL[:2]}
    tables = wanted(DCOS, own, members.values())
    kernel = frozenset(tables.values())
    for number, given_ in steps:
        name = POOL[number].name
        source = None if given_ is None else POOL[1 + (number + given_) % 4]
        taken = {m.vtep.mac for m in members.values() if m.vtep and m.name != name}
        if source is not None and source.vtep is not None and source.vtep.mac in taken:
            continue  # rows never name one MAC twice at the same time
        new = replace(source, name=name, ip=POOL[number].ip, ip6=POOL[number].ip6) if source else None
        old = members.pop(name, None)
        if new:
            members[name] = new
        tables, found = step(DCOS, own, tables, old, new)
        kernel = apply(kernel, found.add, found.drop)  # type: ignore[arg-type]
        assert tables == wanted(DCOS, own, members.values())
        assert kernel == frozenset(tables.values())


# --- size ------------------------------------------------------------------------------------------------------------


def test_tables_of_1000_nodes_take_at_most_200_ms_and_one_step_5_ms() -> None:
    members = grown(1000)
    best = min(_timed(lambda: wanted(DCOS, members[0], members)) for _ in range(3))
    tables = wanted(DCOS, members[0], members)
    assert len(tables) == 2 + 999 * 7
    assert best <= 0.2
    gone = min(_timed(lambda: step(DCOS, members[0], tables, members[500], None)) for _ in range(3))
    assert gone <= 0.005
    assert len(change(tables, tables.values())) == 0


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
