"""The tunnel's port and the addresses of overlays' members on a true kernel, on each firewall back end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface

import pytest

from tests.netns.firewall_lab import HOST, OUTSIDE, UPLINK, WORLD, Lab, lab, of
from towpath.plan import Accept, Bar, Guard, KeepSource, Masquerade, Peer, Rule

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

FAMILIES = [pytest.param(4, id="IPv4"), pytest.param(6, id="IPv6")]
PORT, OTHER = 64000, 64001
GUARD = Guard(PORT, "tunnel")


@pytest.fixture(scope="module", params=["nftables", "plain nft", "iptables"])
def room(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with lab(request.param) as made:
        for place in (HOST, 2, OUTSIDE):
            made.serve(place, 80)
            made.serve(place, PORT, OTHER, kind="udp")
        yield made


def masquerade(container: int, version: int, inner: bool) -> Masquerade:
    interface = ip_interface(f"{of(container, version)}/{16 if version == 4 else 64}")
    return Masquerade(interface, "br0", f"c{container}", inner)


def peer(version: int) -> Peer:
    return Peer(ip_address(WORLD[version]), PORT, "tunnel")


@pytest.mark.parametrize("version", FAMILIES)
def test_members_keep_their_address_towards_members_only(room: Lab, version: int) -> None:
    inner, plain = masquerade(0, version, inner=True), masquerade(1, version, inner=False)
    gateway = "10.2.0.1" if version == 4 else "fd02::1"
    with room.having(inner, plain, KeepSource("br1", "overlay")):
        assert room.ask(0, of(2, version), 80) == f"c2 {of(0, version)}"
        assert room.ask(1, of(2, version), 80) == f"c2 {gateway}", "no member: nobody there knows the way back"
        assert room.ask(0, WORLD[version], 80) == f"c3 {UPLINK[version]}"
    with room.having(inner):
        assert room.ask(0, of(2, version), 80) == f"c2 {gateway}", "no link is an inner one"


@pytest.mark.parametrize("version", FAMILIES)
def test_a_guarded_port_takes_datagrams_of_peers_only(room: Lab, version: int) -> None:
    assert room.ask(OUTSIDE, UPLINK[version], PORT, "udp")
    with room.having(GUARD):
        assert room.silent(OUTSIDE, UPLINK[version], PORT, "udp")
        assert room.ask(OUTSIDE, UPLINK[version], OTHER, "udp"), "another port"
        room.add(peer(version))
        assert room.ask(OUTSIDE, UPLINK[version], PORT, "udp")
        room.drop(peer(version))
        assert room.silent(OUTSIDE, UPLINK[version], PORT, "udp")


@pytest.mark.parametrize("version", FAMILIES)
def test_a_peer_that_comes_before_the_guard_is_a_peer(room: Lab, version: int) -> None:
    with room.having(peer(version), GUARD):
        assert room.ask(OUTSIDE, UPLINK[version], PORT, "udp")
        assert room.silent(0, UPLINK[version], PORT, "udp")


@pytest.mark.parametrize("version", FAMILIES)
def test_what_lives_behind_a_bar_sends_nothing_to_the_port(room: Lab, version: int) -> None:
    member = Accept(of(0, version), "br0", "c0")
    spoofed = Peer(of(0, version), PORT, "tunnel")  # a container that has a peer's address
    with room.having(member, GUARD, spoofed, Bar("br0", PORT, "br0")):
        assert room.silent(0, UPLINK[version], PORT, "udp"), "to the node"
        assert room.silent(0, WORLD[version], PORT, "udp"), "beyond it"
        assert room.ask(0, WORLD[version], OTHER, "udp")
        assert room.ask(2, WORLD[version], PORT, "udp"), "another bridge"


def test_heal_brings_them_back_and_takes_strangers_away(room: Lab) -> None:
    rules: tuple[Rule, ...] = (
        GUARD,
        peer(4),
        peer(6),
        Bar("br0", PORT, "br0"),
        KeepSource("br1", "overlay"),
        masquerade(0, 4, inner=True),
    )
    room.heal()
    assert room.heal(*rules) > 0
    assert room.heal(*rules) == 0
    assert room.host.inside(lambda: room.wall.fingerprints(rules)) <= room.seen()
    room.add(Peer(ip_address("192.0.2.66"), PORT, "stranger"))
    assert room.heal(*rules) > 0
    assert room.heal(*rules) == 0
    assert room.heal() > 0
    assert not any("64000" in line for line in room.ruleset())
