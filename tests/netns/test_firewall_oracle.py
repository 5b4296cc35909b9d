"""What we pack for the kernel is what nft(8) makes of the same text, and reads back the same."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface
from typing import Any

import pytest

from tests.kernel.box import Box, box
from towpath.errors import PhaseFailed
from towpath.kernel import conntrack, firewall
from towpath.kernel.nft import Nftables, run_nft
from towpath.model import PortMap, PortRules
from towpath.plan import Accept, AddRule, DropRule, Fence, Masquerade, PinMac, Publish, Rule

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

HOME, OWNER = "br-a.b", "cni/net/c/eth0"


EARLIER = """table inet towpath {
    chain user_more { tcp dport 3 accept; }
    chain user_forward { tcp dport 2 jump user_more; }
    chain old { tcp dport 1 accept; }
    map dnat4_any { type inet_service : ipv4_addr; elements = { 1 : 10.0.0.1 }; }
}
"""


def everything() -> tuple[Rule, ...]:
    """Every kind of rule in every form, in both families."""
    rules: list[Rule] = [PinMac("tp0123456789ab", "02:aa:bb:cc:dd:ee", OWNER)]
    for text, host in (("10.1.2.3/24", "192.0.2.1"), ("fd00::a1/64", "2001:db8::1")):
        address = ip_interface(text)
        rules += [
            Publish(PortMap(80, 8080), address.ip, HOME, OWNER),
            Publish(PortMap(53, 53, "udp", ip_address(host)), address.ip, HOME, OWNER),
            Publish(PortMap(81, 8080, "sctp"), address.ip, HOME, OWNER, PortRules(masquerade_all=True)),
            Publish(PortMap(82, 8080), address.ip, HOME, OWNER, PortRules(snat=False)),
            Publish(PortMap(83, 8080), address.ip, "", OWNER),
            Masquerade(address, HOME, OWNER),
            Accept(address.ip, HOME, OWNER),
            Fence(address.ip, HOME, "same-network", OWNER),
            Fence(address.ip + 1, HOME, "isolated", OWNER),
        ]
    return tuple(rules)


@pytest.fixture
def host() -> Iterator[Box]:
    with box(0) as made:
        yield made


def listed(host: Box) -> set[str]:
    """The ruleset as nft prints it in JSON, without handles, order aside."""
    found: set[str] = set()
    for entry in json.loads(host.run("nft", "-j", "list", "ruleset"))["nftables"]:
        for body in entry.values():
            body.pop("handle", None)
            if "elem" in body:
                body["elem"] = sorted(json.dumps(e, sort_keys=True) for e in body["elem"])
        found.add(json.dumps(entry, sort_keys=True))
    return found


def commit(host: Box, wall: Nftables, kind: Any, rules: tuple[Rule, ...]) -> None:
    host.inside(lambda: wall.commit(tuple(map(kind, rules))))


def test_netlink_and_nft_make_the_same_of_every_rule(host: Box) -> None:
    rules = everything()
    packed, plain = Nftables(), Nftables(plain=True)
    commit(host, packed, AddRule, rules)
    by_netlink, seen = listed(host), host.inside(packed.seen)
    assert seen == packed.fingerprints(rules)
    assert host.inside(lambda: packed.heal(rules)) == 0
    host.inside(packed.remove)
    commit(host, plain, AddRule, rules)
    assert listed(host) == by_netlink
    assert host.inside(packed.seen) == seen
    for wall in (packed, plain):
        wall.close()


@pytest.mark.parametrize("plain", [pytest.param(False, id="netlink"), pytest.param(True, id="nft")])
def test_dropping_everything_leaves_the_bare_tables(host: Box, plain: bool) -> None:
    wall = Nftables(plain=plain)
    rules = everything()
    commit(host, wall, AddRule, (rules[0], rules[1]))
    commit(host, wall, DropRule, (rules[0], rules[1]))
    before = listed(host)
    commit(host, wall, AddRule, rules)
    commit(host, wall, DropRule, rules)
    assert listed(host) == before
    assert host.inside(wall.seen) == frozenset()
    wall.close()


@pytest.mark.parametrize("plain", [pytest.param(False, id="netlink"), pytest.param(True, id="nft")])
def test_one_refused_rule_undoes_its_whole_commit(host: Box, plain: bool) -> None:
    wall = Nftables(plain=plain)
    mine = Publish(PortMap(80, 80), ip_address("10.0.0.1"), "br0", "mine")
    theirs = Publish(PortMap(80, 80), ip_address("10.0.0.2"), "br0", "theirs")
    commit(host, wall, AddRule, (mine,))
    before = listed(host)
    with pytest.raises(PhaseFailed, match=r"taken: dnat4_any { tcp . 80 : 10\.0\.0\.1 . 80 }") as refused:
        commit(host, wall, AddRule, (*everything()[2:5], theirs))
    assert (refused.value.errno, refused.value.op) == (errno.EEXIST, AddRule(theirs))
    assert listed(host) == before
    wall.close()


def test_healing_a_sound_table_writes_only_the_difference(host: Box) -> None:
    wall, rules = Nftables(), everything()
    commit(host, wall, AddRule, rules)
    host.run("nft", "delete", "element", "inet", "towpath", "dnat4_any", "{ tcp . 80 }")
    host.run("nft", "add", "element", "inet", "towpath", "dnat4_any", "{ tcp . 80 : 10.9.9.9 . 1 }")
    assert host.inside(lambda: wall.heal(rules)) == 2
    assert host.inside(wall.seen) == wall.fingerprints(rules)
    wall.close()


def test_a_table_of_an_earlier_edition_is_made_anew_with_all_elements_and_the_administrators_chain(host: Box) -> None:
    wall = Nftables()
    host.inside(lambda: run_nft(EARLIER))
    assert host.inside(lambda: wall.heal(everything())) > 0
    assert host.inside(wall.seen) == wall.fingerprints(everything())
    text = host.run("nft", "list", "table", "inet", "towpath")
    assert "tcp dport 2 jump user_more" in text
    assert "tcp dport 3 accept" in text
    assert "chain old" not in text
    wall.close()


def test_nothing_wanted_and_nothing_there_writes_nothing(host: Box) -> None:
    wall = Nftables()
    assert host.inside(lambda: wall.heal(())) == 0
    commit(host, wall, DropRule, everything())
    assert listed(host) == {json.dumps(m) for m in map(json.loads, listed(host)) if "metainfo" in m}
    wall.close()


def test_the_back_end_is_picked_by_what_the_host_holds(host: Box) -> None:
    assert host.inside(lambda: firewall.pick("auto")) == "nftables"
    host.run("iptables", "-P", "FORWARD", "DROP")
    assert host.inside(lambda: firewall.pick("auto")) == "iptables"
    for name in firewall.NAMES:
        assert firewall.make(name).name == firewall.pick(name) == name


def test_forgetting_flows_where_there_are_none_is_silent(host: Box) -> None:
    flows = conntrack.Conntrack()
    port = PortMap(53, 53, "udp")
    assert host.inside(lambda: flows.flush((port,), (ip_address("10.0.0.1"), ip_address("fd00::1")))) == 0
    assert flows.flush((PortMap(80, 80),), ()) == 0, "tcp needs nothing"
    flows.close()
