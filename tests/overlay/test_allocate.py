"""DC/OS's allocation, value by value."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towpath.errors import Conflict, PoolEmpty
from towpath.overlay.allocate import admit, bridges, check_change, free_addresses, halves, lowest_block, vtep_mac
from towpath.overlay.config import DCOS, Overlay, OverlayConfig
from towpath.overlay.records import Member, Slice, Vtep, claims


def nodes(config: OverlayConfig, count: int) -> list[Member]:
    """The members of a cluster that grew from nothing."""
    taken: dict[str, str] = {}
    found = []
    for number in range(count):
        member = admit(config, Member(f"n{number}", IPv4Address("10.0.0.1") + number), None, taken)
        taken.update(dict.fromkeys(claims(member), member.name))
        found.append(member)
    return found


def test_the_first_two_nodes_of_dcos_get_what_dcos_gives_them() -> None:
    first, second = nodes(DCOS, 2)
    assert first.vtep == Vtep("70:b3:d5:80:00:01", IPv4Interface("44.128.0.1/20"), IPv6Interface("fd01:a::1/64"))
    assert second.vtep == Vtep("70:b3:d5:80:00:02", IPv4Interface("44.128.0.2/20"), IPv6Interface("fd01:a::2/64"))
    assert first.slices == (
        Slice("dcos", IPv4Network("9.0.0.0/24")),
        Slice("dcos6", subnet6=IPv6Network("fd01:b::/80")),
    )
    assert second.slices == (
        Slice("dcos", IPv4Network("9.0.1.0/24")),
        Slice("dcos6", subnet6=IPv6Network("fd01:b:0:0:1::/80")),
    )


def test_the_lower_half_is_cnis_and_the_upper_half_dockers() -> None:
    second = nodes(DCOS, 2)[1]
    dcos, dcos6 = DCOS.overlays
    assert bridges(dcos, second.slices[0]) == {
        "m-dcos": (IPv4Network("9.0.1.0/25"),),
        "d-dcos": (IPv4Network("9.0.1.128/25"),),
    }
    assert bridges(dcos6, second.slices[1]) == {
        "m-dcos6": (IPv6Network("fd01:b:0:0:1::/81"),),
        "d-dcos6": (IPv6Network("fd01:b::1:8000:0:0/81"),),
    }


def test_one_bridge_for_all_runtimes_has_the_whole_block() -> None:
    whole = replace(DCOS.overlays[0], split="none")
    assert bridges(whole, Slice("dcos", IPv4Network("9.0.1.0/24"))) == {"m-dcos": (IPv4Network("9.0.1.0/24"),)}


def test_seven_nodes_as_the_recorded_cluster_had_them() -> None:
    seventh = nodes(DCOS, 7)[6]
    assert (str(seventh.slices[0].subnet), str(seventh.vtep and seventh.vtep.ip)) == ("9.0.6.0/24", "44.128.0.7/20")


@pytest.mark.parametrize(
    ("pool", "bits", "taken", "want"),
    [
        pytest.param("9.0.0.0/8", 24, [], "9.0.0.0/24", id="block 0 is used"),
        pytest.param("9.0.0.0/8", 24, ["9.0.0.0/24"], "9.0.1.0/24", id="the next"),
        pytest.param("9.0.0.0/8", 24, ["9.0.1.0/24"], "9.0.0.0/24", id="a freed one first"),
        pytest.param("9.0.0.0/8", 24, ["9.0.2.0/24", "9.0.0.0/24"], "9.0.1.0/24", id="the lowest of the free"),
        pytest.param("9.0.0.0/8", 24, ["9.0.0.128/25"], "9.0.1.0/24", id="not over a smaller one"),
        pytest.param("9.0.0.0/8", 24, ["9.0.0.0/22"], "9.0.4.0/24", id="not inside a larger one"),
        pytest.param("9.0.0.0/8", 24, ["8.0.0.0/24", "10.0.0.0/24"], "9.0.0.0/24", id="what is elsewhere counts not"),
        pytest.param("10.0.0.0/24", 25, ["10.0.0.0/25"], "10.0.0.128/25", id="the last"),
        pytest.param("10.0.0.0/24", 25, ["10.0.0.0/25", "10.0.0.128/25"], None, id="used up"),
        pytest.param("10.0.0.0/24", 24, [], "10.0.0.0/24", id="the whole pool"),
        pytest.param("fd01:b::/64", 80, ["fd01:b::/80"], "fd01:b:0:0:1::/80", id="IPv6"),
        pytest.param("fd01::/60", 65, ["fd01::/65"], "fd01:0:0:0:8000::/65", id="IPv6, an odd length"),
    ],
)
def test_the_lowest_free_block(pool: str, bits: int, taken: list[str], want: str | None) -> None:
    whole: Any = ip_network(pool)
    found = lowest_block(whole, bits, map(ip_network, taken))
    assert found == (ip_network(want) if want else None)


@given(st.integers(0, 6), st.sets(st.integers(0, 63)))
def test_the_lowest_free_block_is_what_a_search_finds(more: int, places: set[int]) -> None:
    pool = IPv4Network("10.0.0.0/24")
    taken = [IPv4Network((int(pool.network_address) + 4 * place, 30)) for place in places]
    search = (b for b in pool.subnets(more) if not any(b.overlaps(t) for t in taken))
    assert lowest_block(pool, 24 + more, taken) == next(search, None)


def test_the_first_and_the_last_address_are_no_nodes() -> None:
    assert [str(a) for a in free_addresses(IPv4Network("10.0.0.0/30"), ())] == ["10.0.0.1", "10.0.0.2"]
    assert next(free_addresses(IPv6Network("fd01:a::/64"), ())) == IPv6Address("fd01:a::1")


@pytest.mark.parametrize(
    ("address", "want"),
    [
        pytest.param("44.128.0.1", "70:b3:d5:80:00:01", id="the low 24 bits"),
        pytest.param("10.255.254.253", "70:b3:d5:ff:fe:fd", id="all of them"),
        pytest.param("fd01:a::102", "70:b3:d5:00:01:02", id="IPv6"),
    ],
)
def test_a_mac_is_the_oui_and_the_address(address: str, want: str) -> None:
    assert vtep_mac("70:B3:D5:00:00:00", ip_address(address)) == want


def test_halves_of_an_odd_block() -> None:
    assert halves(IPv4Network("10.0.0.0/23")) == (IPv4Network("10.0.0.0/24"), IPv4Network("10.0.1.0/24"))


# --- what is held stays ----------------------------------------------------------------------------------------------


def test_a_node_that_comes_again_keeps_everything() -> None:
    first, second = nodes(DCOS, 2)
    taken = dict.fromkeys(claims(second), "n1")
    assert admit(DCOS, Member("n1", IPv4Address("10.0.0.77")), second, taken) == replace(
        second, ip=IPv4Address("10.0.0.77")
    )
    assert first.slices != second.slices


def test_a_cluster_that_gains_ipv6_gives_it_to_old_nodes() -> None:
    old = replace(DCOS, vtep_subnet6=None, overlays=DCOS.overlays[:1])
    member = nodes(old, 1)[0]
    again = admit(DCOS, member, member, dict.fromkeys(claims(member), "n0"))
    assert again.vtep == Vtep("70:b3:d5:80:00:01", IPv4Interface("44.128.0.1/20"), IPv6Interface("fd01:a::1/64"))
    assert [one.overlay for one in again.slices] == ["dcos", "dcos6"]


def test_a_cluster_that_gains_ipv4_never_gives_a_mac_twice() -> None:
    old = replace(DCOS, vtep_subnet=None, overlays=DCOS.overlays[1:])
    member = nodes(old, 1)[0]
    assert member.vtep == Vtep("70:b3:d5:00:00:01", None, IPv6Interface("fd01:a::1/64"))
    new = replace(DCOS, vtep_subnet=IPv4Network("10.0.0.0/20"))
    other = admit(new, Member("n1", IPv4Address("192.0.2.2")), None, dict.fromkeys(claims(member), "n0"))
    assert other.vtep == Vtep("70:b3:d5:00:00:02", IPv4Interface("10.0.0.2/20"), IPv6Interface("fd01:a::2/64"))


def test_an_overlay_that_was_removed_takes_its_block_along() -> None:
    member = nodes(DCOS, 1)[0]
    less = replace(DCOS, overlays=DCOS.overlays[1:])
    assert [one.overlay for one in admit(less, member, member, {}).slices] == ["dcos6"]


def test_a_disabled_overlay_gives_nothing() -> None:
    off = replace(DCOS, overlays=(DCOS.overlays[0], replace(DCOS.overlays[1], enabled=False)))
    assert [one.overlay for one in nodes(off, 1)[0].slices] == ["dcos"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(
            replace(DCOS, vtep_subnet=IPv4Network("44.128.0.0/30")), "tunnel addresses 44.128.0.0/30", id="vtep_subnet"
        ),
        pytest.param(
            replace(DCOS, overlays=(Overlay("tiny", IPv4Network("9.0.0.0/27"), 28),)),
            "pool 9.0.0.0/27 of overlay 'tiny' is used up: no /28 is left",
            id="overlay",
        ),
    ],
)
def test_a_pool_that_is_used_up_is_named(config: OverlayConfig, words: str) -> None:
    with pytest.raises(PoolEmpty, match=words):
        nodes(config, 3)


# --- changes of the configuration ------------------------------------------------------------------------------------


def test_overlays_come_and_go_while_nodes_hold_blocks_of_others() -> None:
    held = claims(nodes(DCOS, 1)[0])
    more = replace(DCOS, overlays=(*DCOS.overlays, Overlay("new", IPv4Network("10.0.0.0/8"), 24)))
    check_change(DCOS, more, held)
    check_change(more, DCOS, held)


@pytest.mark.parametrize(
    ("new", "words"),
    [
        pytest.param(replace(DCOS, vtep_subnet=IPv4Network("44.0.0.0/20")), "vtep_subnet is", id="tunnel addresses"),
        pytest.param(replace(DCOS, vtep_mac_oui="02:00:00:00:00:00"), "vtep_mac_oui is", id="MACs"),
        pytest.param(
            replace(DCOS, overlays=(replace(DCOS.overlays[0], prefix=25), DCOS.overlays[1])),
            "overlay 'dcos' has prefix 24",
            id="block size",
        ),
        pytest.param(
            replace(DCOS, overlays=(replace(DCOS.overlays[0], split="none"), DCOS.overlays[1])), "has split", id="split"
        ),
    ],
)
def test_what_nodes_hold_is_not_contradicted(new: OverlayConfig, words: str) -> None:
    held = claims(nodes(DCOS, 1)[0])
    with pytest.raises(Conflict, match=words):
        check_change(DCOS, new, held)
    check_change(DCOS, new, ())
