"""Isolation, masquerade and pinned MACs on a true kernel (rows FW1-FW4, B17, B21), on each back end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import ip_interface

import pytest

from tests.netns.firewall_lab import HOST, OUTSIDE, PLACES, UPLINK, WORLD, Lab, lab, mac_of, of
from towpath.model import PortMap
from towpath.plan import Accept, Fence, Masquerade, PinMac, Publish, Rule

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

FAMILIES = [pytest.param(4, id="IPv4"), pytest.param(6, id="IPv6")]


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def room(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with lab(request.param) as made:
        for place in (0, 1, 2, OUTSIDE):
            made.serve(place, 80)
        made.set("net/bridge/bridge-nf-call-iptables", "0")
        made.set("net/bridge/bridge-nf-call-ip6tables", "0")
        yield made


def member(container: int, version: int = 4, policy: str = "open") -> tuple[Rule, ...]:
    address, home = of(container, version), PLACES[container][0]
    accept = Accept(address, home, f"c{container}")
    return (accept,) if policy == "open" else (accept, Fence(address, home, policy, f"c{container}"))


@pytest.mark.parametrize(
    ("one", "two", "version", "crossing"),
    [
        pytest.param("open", "open", 4, True, id="both open"),
        pytest.param("same-network", "open", 4, False, id="FW1 one fenced, other open"),
        pytest.param("open", "same-network", 4, False, id="FW1 one open, other fenced"),
        pytest.param("same-network", "same-network", 6, False, id="FW1 both fenced, IPv6"),
        pytest.param("isolated", "open", 4, False, id="FW2 one isolated"),
    ],
)
def test_members_of_two_networks(room: Lab, one: str, two: str, version: int, crossing: bool) -> None:
    with room.having(*member(0, version, one), *member(1, version, one), *member(2, version, two)):
        assert room.silent(0, of(2, version), 80) != crossing
        assert room.silent(2, of(0, version), 80) != crossing
        assert room.ask(0, of(1, version), 80), "of one network, over the bridge"
        assert room.ask(0, WORLD[version], 80), "to the world, and its answers"
        assert room.ask(OUTSIDE, of(0, version), 80), "from the world"
        assert room.ask(HOST, of(0, version), 80), "from the host"
    assert room.ask(0, of(2, version), 80)


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("policy", ["same-network", "isolated"])
def test_fw2_frames_that_br_netfilter_shows_are_judged_by_the_policy(room: Lab, version: int, policy: str) -> None:
    name = f"net/bridge/bridge-nf-call-ip{'6' if version == 6 else ''}tables"
    if not room.set(name, "1"):
        pytest.skip(f"this kernel has no br_netfilter ({name})")
    try:
        with room.having(*member(0, version, policy), *member(1, version, policy)):
            assert room.silent(0, of(1, version), 80) != (policy == "same-network")
            assert room.ask(0, WORLD[version], 80)
    finally:
        room.set(name, "0")


def test_fw1_a_published_port_passes_the_fence(room: Lab) -> None:
    rules = (*member(0, policy="isolated"), *member(2, policy="isolated"))
    with room.having(*rules, Publish(PortMap(8080, 80), of(0), "br0", "c0")):
        assert room.ask(2, UPLINK[4], 8080)
        assert room.ask(1, UPLINK[4], 8080)
        assert room.silent(2, of(0), 80)


def test_an_address_of_its_own_choice_does_not_help_a_container_over_the_fence(room: Lab) -> None:
    with room.having(*member(0, policy="same-network"), *member(2)):
        room.host.run("ip", "addr", "replace", "10.2.9.9/16", "dev", "eth0", container=2)
        room.host.run("ip", "route", "replace", "default", "via", "10.2.0.1", "src", "10.2.9.9", container=2)
        try:
            assert room.silent(2, of(0), 80)
            assert room.ask(2, WORLD[4], 80)
        finally:
            room.host.run("ip", "route", "replace", "default", "via", "10.2.0.1", container=2)
            room.host.run("ip", "addr", "del", "10.2.9.9/16", "dev", "eth0", container=2)


def test_the_fence_stands_until_the_last_member_has_gone(room: Lab) -> None:
    first, second = member(0, policy="same-network"), member(1, policy="same-network")
    with room.having(*first, *second, *member(2)):
        room.drop(*first)
        assert room.silent(2, of(1), 80)
        assert room.wall.fingerprints(second) <= room.seen()
        room.drop(*second)
        assert room.ask(2, of(1), 80)


def test_fw3_the_administrators_chain_is_asked_first_and_survives_healing(room: Lab) -> None:
    rules = (*member(0, policy="same-network"), *member(2, policy="same-network"))
    with room.having(*rules):
        if room.wall.name == "iptables":
            room.host.run("iptables", "-A", "CNI-ADMIN", "-s", str(of(2)), "-d", str(of(0)), "-j", "ACCEPT")
            ours = "iptables -F CNI-ISOLATION-STAGE-2"
        else:
            rule = f"ip saddr {of(2)} ip daddr {of(0)} accept"
            room.host.run("nft", f"add rule inet towpath user_forward {rule}")
            ours = "nft flush chain inet towpath between"
        assert room.ask(2, of(0), 80)
        assert room.silent(0, of(2), 80)
        assert room.heal(*rules) == 0
        room.host.run(*ours.split())
        assert room.heal(*rules) > 0
        assert room.ask(2, of(0), 80), "the administrator's rule is still there"
        assert room.silent(0, of(2), 80)
        admin = "iptables -F CNI-ADMIN" if room.wall.name == "iptables" else "nft flush chain inet towpath user_forward"
        room.host.run(*admin.split())


@pytest.mark.parametrize("docker", [pytest.param(False, id="FW4"), pytest.param(True, id="FW4 with Docker's chains")])
@pytest.mark.parametrize("name", ["nftables", "iptables"])
def test_where_the_host_forwards_nothing_members_are_forwarded(name: str, docker: bool) -> None:
    with lab(name) as room:
        room.serve(0, 80)
        room.serve(OUTSIDE, 80)
        room.host.run("iptables", "-P", "FORWARD", "DROP")
        if docker:
            for words in ("-N DOCKER-USER", "-I FORWARD -j DOCKER-USER", "-A FORWARD -i br0 -j DROP"):
                room.host.run("iptables", *words.split())
        with room.having(Publish(PortMap(8080, 80), of(0), "br0", "c0"), *member(0)):
            assert room.ask(0, WORLD[4], 80)
            assert room.ask(OUTSIDE, UPLINK[4], 8080)
            assert room.silent(2, WORLD[4], 80), "who is no member is not"
        assert room.silent(0, WORLD[4], 80)


def test_a_policy_that_comes_later_is_met_by_healing_and_leaves_no_trace_when_it_goes() -> None:
    with lab("nftables") as room:
        room.serve(OUTSIDE, 80)
        rules = (*member(0), *member(2, policy="same-network"))
        with room.having(*rules):
            room.host.run("iptables", "-P", "FORWARD", "DROP")
            assert room.silent(0, WORLD[4], 80)
            assert (room.heal(*rules), room.heal(*rules)) == (1, 0)
            assert room.ask(0, WORLD[4], 80)
            room.host.run("iptables", "-P", "FORWARD", "ACCEPT")
            assert (room.heal(*rules), room.heal(*rules)) == (1, 0)
            assert "TOWPATH" not in room.host.run("iptables-save")


@pytest.mark.parametrize("version", FAMILIES)
def test_b17_what_leaves_has_the_nodes_address_and_what_stays_keeps_its_own(room: Lab, version: int) -> None:
    prefix = 16 if version == 4 else 64
    with room.having(Masquerade(ip_interface(f"{of(0, version)}/{prefix}"), "br0", "c0")):
        assert room.ask(0, WORLD[version], 80) == f"c{OUTSIDE} {UPLINK[version]}"
        assert room.ask(0, of(1, version), 80) == f"c1 {of(0, version)}"
        assert room.ask(1, WORLD[version], 80) == f"c{OUTSIDE} {of(1, version)}"
    assert room.ask(0, WORLD[version], 80) == f"c{OUTSIDE} {of(0, version)}"


def test_b21_frames_with_another_source_address_are_dropped_until_the_pin_is_gone(room: Lab) -> None:
    pin = PinMac("v0", mac_of(0), "c0")
    with room.having(pin):
        assert room.ask(0, of(1), 80)
        assert room.wall.fingerprints([pin]) <= room.seen()
        room.host.run("ip", "link", "set", "eth0", "address", "02:00:00:00:99:99", container=0)
        assert room.silent(0, of(1), 80)
        room.drop(PinMac("v0", "02:00:00:00:99:98", "another"))
        assert room.silent(0, of(1), 80)
        room.drop(pin)
        assert room.ask(0, of(1), 80)
        room.host.run("ip", "link", "set", "eth0", "address", mac_of(0), container=0)
    assert not room.wall.fingerprints([pin]) & room.seen()
