"""Published ports on a true kernel, row by row (P3-P17 of the reference's behaviour), on each back end."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface

import pytest

from tests.netns.firewall_lab import (
    GATEWAY,
    HOST,
    OUTSIDE,
    SECOND,
    UPLINK,
    WORLD,
    Lab,
    lab,
    of,
)
from towpath.errors import PhaseFailed
from towpath.model import PortMap, PortRules
from towpath.plan import AddRule, DropRule, Masquerade, Publish

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

FAMILIES = [pytest.param(4, id="IPv4"), pytest.param(6, id="P12 IPv6")]
MANY = range(7000, 7040)


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def room(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with lab(request.param) as made:
        made.serve(0, 80, *MANY)
        made.serve(0, 80, *MANY, kind="udp")
        made.serve(1, 80)
        made.serve(1, 80, kind="udp")
        yield made


def publish(port: int = 8080, to: int = 0, version: int = 4, proto: str = "tcp", **more: object) -> Publish:
    host_ip = more.pop("host_ip", None)
    rules = PortRules(**more)  # type: ignore[arg-type]
    mapped = PortMap(port, 80, proto, ip_address(str(host_ip)) if host_ip else None)
    return Publish(mapped, of(to, version), "br0", f"cni/net/c{to}/eth0", rules)


def bridge_netfilter(room: Lab, on: bool) -> None:
    for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"):
        if not room.set(f"net/bridge/{name}", str(int(on))):
            pytest.skip(f"this kernel has no br_netfilter (net/bridge/{name})")


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("on", [pytest.param(False, id="br_netfilter off"), pytest.param(True, id="br_netfilter on")])
@pytest.mark.parametrize("kind", [pytest.param("tcp", id="P3 tcp"), pytest.param("udp", id="P4 udp")])
def test_a_published_port_answers_from_everywhere(room: Lab, version: int, on: bool, kind: str) -> None:
    bridge_netfilter(room, on)
    with room.having(publish(version=version, proto=kind)):
        answers = {
            "outside": room.ask(OUTSIDE, UPLINK[version], 8080, kind),
            "the host": room.ask(HOST, UPLINK[version], 8080, kind),
            "itself": room.ask(0, UPLINK[version], 8080, kind),
            "a sibling": room.ask(1, UPLINK[version], 8080, kind),
            "a sibling by its gateway": room.ask(1, GATEWAY[version], 8080, kind),
            "another network": room.ask(2, UPLINK[version], 8080, kind),
        }
        if version == 4:
            answers["loopback"] = room.ask(HOST, "127.0.0.1", 8080, kind)
    assert answers == {
        "outside": f"c0 {WORLD[version]}",  # P11: an external client keeps its address
        "the host": f"c0 {UPLINK[version]}",
        "itself": f"c0 {GATEWAY[version]}",
        "a sibling": f"c0 {GATEWAY[version]}",
        "a sibling by its gateway": f"c0 {GATEWAY[version]}",
        "another network": f"c0 {of(2, version)}",
        **({"loopback": f"c0 {GATEWAY[4]}"} if version == 4 else {}),
    }
    assert room.silent(OUTSIDE, UPLINK[version], 8080, kind)


def test_p4_a_client_that_keeps_sending_reaches_the_container_that_took_the_port_over(room: Lab) -> None:
    first, second = publish(proto="udp"), publish(to=1, proto="udp")
    with room.having(first):
        with room.client(OUTSIDE, UPLINK[4], "udp", source=5353) as client:
            client.connect((UPLINK[4], 8080))
            client.send(b"?")
            assert client.recv(99) == f"c0 {WORLD[4]}".encode()
            room.drop(first)
            room.add(second)
            gone = room.host.inside(lambda: room.conntrack.flush((first.port,), (first.to,)))
            client.send(b"?")
            assert client.recv(99) == f"c1 {WORLD[4]}".encode()
        assert gone >= 1
        room.drop(second)


@pytest.mark.parametrize("by", ["its published port", "its address"])
def test_p5_after_unpublishing_a_udp_client_reaches_a_listener_of_the_host(room: Lab, by: str) -> None:
    port = {"its published port": 8081, "its address": 8082}[by]
    room.serve(HOST, port, kind="udp", name="host")
    rule = publish(port, proto="udp")
    with room.having(rule), room.client(OUTSIDE, UPLINK[4], "udp", source=5354) as client:
        client.connect((UPLINK[4], port))
        client.send(b"?")
        assert client.recv(99).startswith(b"c0")
        room.drop(rule)
        what = ((rule.port,), ()) if by == "its published port" else ((), (rule.to,))
        room.host.inside(lambda: room.conntrack.flush(*what))
        client.send(b"?")
        assert client.recv(99).startswith(b"host")


@pytest.mark.parametrize("version", FAMILIES)
def test_p6_a_port_bound_to_one_address_answers_there_only(room: Lab, version: int) -> None:
    with room.having(publish(version=version, host_ip=SECOND[version])):
        assert room.ask(OUTSIDE, SECOND[version], 8080) == f"c0 {WORLD[version]}"
        assert room.ask(0, SECOND[version], 8080) == f"c0 {GATEWAY[version]}"
        assert room.silent(OUTSIDE, UPLINK[version], 8080)


@pytest.mark.parametrize("version", FAMILIES)
def test_p6_an_unspecified_host_address_is_any_of_its_family(room: Lab, version: int) -> None:
    with room.having(publish(version=version, host_ip="0.0.0.0" if version == 4 else "::")):
        assert room.ask(OUTSIDE, UPLINK[version], 8080) == f"c0 {WORLD[version]}"
        assert room.ask(OUTSIDE, SECOND[version], 8080) == f"c0 {WORLD[version]}"


def test_p6_a_host_address_of_the_other_family_makes_nothing(room: Lab) -> None:
    before = room.ruleset()
    room.add(publish(version=6, host_ip=UPLINK[4]))
    assert room.ruleset() == before


def test_p6_one_port_leads_to_two_containers_by_the_address_that_was_asked_for(room: Lab) -> None:
    with room.having(publish(to=0, host_ip=UPLINK[4]), publish(to=1, host_ip=SECOND[4])):
        assert room.ask(OUTSIDE, UPLINK[4], 8080) == f"c0 {WORLD[4]}"
        assert room.ask(OUTSIDE, SECOND[4], 8080) == f"c1 {WORLD[4]}"


def test_p7_forty_ports_of_mixed_protocols_of_one_container_all_answer(room: Lab) -> None:
    rules = [
        Publish(PortMap(number + 1000, number, kind), of(0), "br0", "many")
        for number, kind in zip(MANY, ["tcp", "udp"] * len(MANY), strict=False)
    ]
    rules.append(Publish(PortMap(9999, 9999, "sctp"), of(0), "br0", "many"))
    with room.having(*rules):
        answers = {room.ask(OUTSIDE, UPLINK[4], rule.port.host_port, rule.port.proto) for rule in rules[:-1]}
        assert answers == {f"c0 {WORLD[4]}"}
        room.drop(*rules[::2])
        assert room.silent(OUTSIDE, UPLINK[4], 8000)
        assert room.ask(OUTSIDE, UPLINK[4], 8001, "udp") == f"c0 {WORLD[4]}"


def test_p7_sctp(room: Lab) -> None:
    try:
        room.serve(0, 7999, kind="sctp")
    except OSError:
        pytest.skip("this kernel has no SCTP sockets (CONFIG_IP_SCTP)")
    with room.having(Publish(PortMap(8999, 7999, "sctp"), of(0), "br0", "s")):
        assert room.ask(OUTSIDE, UPLINK[4], 8999, "sctp") == f"c0 {WORLD[4]}"


@pytest.mark.parametrize("version", FAMILIES)
def test_p8_conditions_say_who_may_come_in(room: Lab, version: int) -> None:
    ip, mine = ("ip", f"{WORLD[4]}/32") if version == 4 else ("ip6", f"{WORLD[6]}/128")
    other = "203.0.113.0/24" if version == 4 else "2001:db8:9::/48"
    words = [("-s", net) if room.wall.name == "iptables" else (ip, "saddr", net) for net in (mine, other)]
    only = [PortRules(conditions_v4=w) if version == 4 else PortRules(conditions_v6=w) for w in words]
    rules = [Publish(PortMap(8080 + n, 80), of(0, version), "br0", "c0", only[n]) for n in (0, 1)]
    with room.having(*rules):
        assert room.ask(OUTSIDE, UPLINK[version], 8080) == f"c0 {WORLD[version]}"
        assert room.silent(OUTSIDE, UPLINK[version], 8081)
        assert room.silent(1, UPLINK[version], 8080)
        assert room.heal(*rules) == 0
    assert room.silent(OUTSIDE, UPLINK[version], 8080)


def test_p9_without_snat_every_source_is_kept(room: Lab) -> None:
    with room.having(publish(snat=False)):
        assert room.ask(OUTSIDE, UPLINK[4], 8080) == f"c0 {WORLD[4]}"
        assert room.ask(2, UPLINK[4], 8080) == f"c0 {of(2)}"
        assert room.silent(HOST, "127.0.0.1", 8080)
        bridge_netfilter(room, on=False)
        assert room.silent(0, UPLINK[4], 8080)


@pytest.mark.parametrize("version", FAMILIES)
@pytest.mark.parametrize("bit", [pytest.param(13, id="reference's mark"), pytest.param(20, id="another mark")])
def test_p10_masquerading_all_shows_the_gateway_to_the_container(room: Lab, version: int, bit: int) -> None:
    with room.having(publish(version=version, masquerade_all=True, mark_bit=bit)):
        for place in (OUTSIDE, HOST, 0, 1, 2):
            answer = room.ask(place, UPLINK[version], 8080)
            assert answer in (f"c0 {GATEWAY[version]}", f"c0 {UPLINK[version]}" if place == HOST else None)


def test_a_container_that_is_masqueraded_may_use_a_published_port_of_another_network(room: Lab) -> None:
    with room.having(publish(), Masquerade(ip_interface(f"{of(2)}/16"), "br1", "two")):
        assert room.ask(2, UPLINK[4], 8080) == f"c0 {GATEWAY[4]}"


# --- changes ---------------------------------------------------------------------------------------------------------


def test_p15_a_port_that_is_taken_is_refused_by_name_and_nothing_is_made(room: Lab) -> None:
    with room.having(publish(to=0)):
        before = room.ruleset()
        with pytest.raises(PhaseFailed, match="8080") as refused:
            room.add(publish(9090, to=1), publish(to=1))
        assert (refused.value.errno, refused.value.op) == (errno.EEXIST, AddRule(publish(to=1)))
        assert room.ruleset() == before


def test_p13_adding_and_dropping_twice_is_no_error(room: Lab) -> None:
    with room.having(publish()):
        before = room.ruleset()
        room.add(publish())
        assert room.ruleset() == before
        room.drop(publish())
        room.drop(publish())
        assert room.silent(OUTSIDE, UPLINK[4], 8080)


def test_dropping_a_rule_leaves_a_port_that_now_leads_elsewhere(room: Lab) -> None:
    with room.having(publish(to=1)):
        before = room.ruleset()
        room.drop(publish(to=0), Publish(PortMap(8080, 81), of(1), "br0", publish(to=1).owner))
        assert room.ruleset() == before


def test_a_port_changes_hands_in_one_commit(room: Lab) -> None:
    with room.having(publish(to=0)):
        changes = (DropRule(publish(to=0)), AddRule(publish(to=1)))
        room.host.inside(lambda: room.wall.commit(changes))
        assert room.ask(OUTSIDE, UPLINK[4], 8080) == f"c1 {WORLD[4]}"
        room.drop(publish(to=1))


def test_p14_what_is_missing_shows(room: Lab) -> None:
    rules = (publish(), Masquerade(ip_interface(f"{of(0)}/16"), "br0", "m"))
    with room.having(*rules):
        assert room.wall.fingerprints(rules) <= room.seen()
        flush = {"iptables": ("iptables", "-t", "nat", "-F", "CNI-HOSTPORT-DNAT")}
        room.host.run(*flush.get(room.wall.name, ("nft", "flush", "chain", "inet", "towpath", "dnat4_ports")))
        assert not room.wall.fingerprints(rules) <= room.seen()
        assert room.silent(OUTSIDE, UPLINK[4], 8080)
        assert room.heal(*rules) > 0
        assert room.wall.fingerprints(rules) <= room.seen()
        assert room.ask(OUTSIDE, UPLINK[4], 8080) == f"c0 {WORLD[4]}"


def test_p16_ports_come_back_after_somebody_flushed_all_rules(room: Lab) -> None:
    words = ("-s", "192.0.2.0/24") if room.wall.name == "iptables" else ("ip", "saddr", "192.0.2.0/24")
    rules = (publish(), publish(8081, version=6), publish(8082, conditions_v4=words))
    with room.having(*rules):
        before = room.ruleset()
        room.host.run("nft", "flush", "ruleset")
        assert room.seen() == frozenset()
        assert room.heal(*rules) > 0
        assert sorted(room.ruleset()) == sorted(before)
        assert room.heal(*rules) == 0
        assert room.ask(OUTSIDE, UPLINK[4], 8080) == room.ask(OUTSIDE, UPLINK[4], 8082) == f"c0 {WORLD[4]}"
        assert room.ask(OUTSIDE, UPLINK[6], 8081) == f"c0 {WORLD[6]}"


def test_p16_a_commit_after_a_flush_puts_the_skeleton_back(room: Lab) -> None:
    with room.having():
        room.host.run("nft", "flush", "ruleset")
        room.drop(publish(1234))
        room.add(publish())
        assert room.ask(OUTSIDE, UPLINK[4], 8080) == f"c0 {WORLD[4]}"
        room.drop(publish())


def test_healing_takes_away_what_nobody_wants(room: Lab) -> None:
    with room.having(publish()):
        stale = publish(8090, version=6, masquerade_all=True)
        room.add(stale)
        assert room.heal(publish()) > 0
        assert room.wall.fingerprints([stale]) - room.wall.fingerprints([publish()]) - room.seen()
        assert room.silent(OUTSIDE, UPLINK[6], 8090)


def test_p17_two_thousand_ports_stand_beside_one_more(room: Lab) -> None:
    if room.wall.name == "iptables":
        pytest.skip("iptables reads and writes all its rules: it is not for thousands of ports")
    rules = [Publish(PortMap(10_000 + n, 80), of(1), "br0", "o") for n in range(2000)]
    with room.having(*rules):
        room.add(publish())
        assert room.ask(OUTSIDE, UPLINK[4], 8080) == f"c0 {WORLD[4]}"
        assert room.ask(OUTSIDE, UPLINK[4], 11_999) == f"c1 {WORLD[4]}"
        room.drop(publish())
        assert room.heal(*rules) == 0


def test_removing_leaves_nothing_of_ours(room: Lab) -> None:
    with room.having():
        room.add(publish(), publish(version=6))
        room.host.inside(room.wall.remove)
        left = room.ruleset()
        assert not [line for line in left if "towpath" in line or "CNI-" in line], left
        room.host.inside(room.wall.remove)
