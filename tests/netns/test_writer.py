"""The writer knows whether somebody else wrote to the firewall, also in the moment in which it heals."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface

import pytest

from tests.kernel.box import Box, box
from towpath.kernel.contract import Wanted
from towpath.plan import Accept, AddRule, Masquerade, Phase, Rule

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

RULES: tuple[Rule, ...] = (
    Accept(ip_address("10.1.0.2"), "br0", "cni/shop/c1/eth0"),
    Masquerade(ip_interface("10.1.0.2/24"), "br0", "cni/shop/c1/eth0"),
)
OTHER = Accept(ip_address("10.1.0.3"), "br0", "cni/shop/c2/eth0")


@pytest.fixture
def host() -> Iterator[Box]:
    with box(1) as made:
        yield made


def heal(host: Box, firewall: str, wanted: Wanted) -> int:
    return host.wait(lambda: host.kernel.heal(firewall, lambda: wanted))


def touched(host: Box, firewall: str) -> bool:
    return host.wait(lambda: host.kernel.touched(firewall))


def commit(host: Box, firewall: str, *rules: Rule) -> None:
    host.apply((Phase("firewall", tuple(AddRule(rule) for rule in rules), firewall=firewall),))


@pytest.mark.parametrize("firewall", ["nftables", "iptables"])
def test_a_heal_that_found_nothing_need_not_be_repeated_until_somebody_writes(host: Box, firewall: str) -> None:
    if firewall == "iptables" and not shutil.which("iptables-restore"):
        pytest.skip("this machine has no iptables")
    commit(host, firewall, *RULES)
    assert heal(host, firewall, Wanted(RULES)) == 0
    assert not touched(host, firewall)
    commit(host, firewall, OTHER)
    assert not touched(host, firewall)
    host.run("nft", "flush", "ruleset")
    assert touched(host, firewall)
    assert heal(host, firewall, Wanted((*RULES, OTHER))) > 0
    assert heal(host, firewall, Wanted((*RULES, OTHER))) == 0
    assert not touched(host, firewall)


def test_a_flush_in_the_middle_of_a_heal_is_not_taken_for_our_own_writing(host: Box) -> None:
    commit(host, "nftables", *RULES)
    wall = host.kernel.firewall("nftables")
    true_heal = wall.heal

    def overtaken(wanted: object) -> int:
        changed = true_heal(RULES)
        host.run("nft", "flush", "ruleset")
        return changed

    wall.heal = overtaken  # type: ignore[method-assign]
    heal(host, "nftables", Wanted(RULES))
    wall.heal = true_heal  # type: ignore[method-assign]
    assert touched(host, "nftables")
    assert heal(host, "nftables", Wanted(RULES)) > 0


def test_a_rule_under_way_that_is_not_there_is_looked_at_again(host: Box) -> None:
    commit(host, "nftables", *RULES)
    assert heal(host, "nftables", Wanted(RULES, (OTHER,))) == 0
    assert touched(host, "nftables")
    assert heal(host, "nftables", Wanted((*RULES, OTHER))) > 0
