"""Rules as elements of nftables: which keys they take, how they are packed, printed and refused. Nothing is run."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface

import pytest

from towpath.errors import BadConfig, Unavailable
from towpath.kernel import firewall
from towpath.kernel.nft import Nftables, expressed, own, read_changes, sound
from towpath.kernel.nftbatch import Structure
from towpath.kernel.nftrules import CHAINS, OPEN_CHAINS, Conditional, edition, pieces, sets_of, shared, skeleton
from towpath.kernel.nftset import BRIDGE, INET, SETS, element, phrase
from towpath.model import PortMap, PortRules
from towpath.plan import (
    Accept,
    AddRule,
    Bar,
    DropRule,
    Fence,
    Guard,
    KeepSource,
    Masquerade,
    Peer,
    PinMac,
    Publish,
    Rule,
)

A4, A6 = ip_address("10.0.0.2"), ip_address("fd00::2")
H4 = ip_address("192.0.2.1")


def port(number: int = 8080, host: str = "", proto: str = "tcp") -> PortMap:
    return PortMap(number, 80, proto, ip_address(host) if host else None)


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        pytest.param(
            Publish(port(), A4, "br0", "o"),
            [
                "dnat4_any { tcp . 8080 : 10.0.0.2 . 80 }",
                'hairpin4_any { 10.0.0.2 . tcp . 8080 . "br0" }',
                "snat4_any { 10.0.0.2 . tcp . 8080 : goto loopback }",
            ],
            id="any address of the host",
        ),
        pytest.param(
            Publish(port(host="192.0.2.1", proto="udp"), A4, "br0", "o"),
            [
                "dnat4 { 192.0.2.1 . udp . 8080 : 10.0.0.2 . 80 }",
                'hairpin4 { 192.0.2.1 . 10.0.0.2 . udp . 8080 . "br0" }',
                "snat4 { 192.0.2.1 . 10.0.0.2 . udp . 8080 : goto loopback }",
            ],
            id="one address of the host",
        ),
        pytest.param(
            Publish(port(host="::"), A6, "", "o"),
            ["dnat6_any { tcp . 8080 : fd00::2 . 80 }", "snat6_any { fd00::2 . tcp . 8080 : goto loopback }"],
            id="unspecified is any; without a known home there is no hairpin",
        ),
        pytest.param(Publish(port(host="::"), A4, "br0", "o"), [], id="families that differ make nothing"),
        pytest.param(
            Publish(port(), A4, "br0", "o", PortRules(snat=False)),
            ["dnat4_any { tcp . 8080 : 10.0.0.2 . 80 }"],
            id="without snat only the destination changes",
        ),
        pytest.param(
            Publish(port(), A4, "br0", "o", PortRules(masquerade_all=True)),
            ["dnat4_any { tcp . 8080 : 10.0.0.2 . 80 }", "snat4_any { 10.0.0.2 . tcp . 8080 : goto always }"],
            id="all are masqueraded",
        ),
        pytest.param(
            Masquerade(ip_interface("10.0.0.2/24"), "br0", "o"),
            ['masq4_home { 10.0.0.2 . "br0" }', "masq4 { 10.0.0.2 }"],
            id="masquerade",
        ),
        pytest.param(
            Masquerade(ip_interface("fd00::2/64"), "m-dcos", "o", inner=True),
            ['masq6_home { fd00::2 . "m-dcos" }', "masq6 { fd00::2 }", "inner6 { fd00::2 }"],
            id="masquerade of a member of an overlay",
        ),
        pytest.param(KeepSource("vtep1024", "o"), ['inner_links { "vtep1024" }'], id="the way to other members"),
        pytest.param(Guard(64000, "o"), ["guarded { udp . 64000 }"], id="a guarded port"),
        pytest.param(Peer(A4, 64000, "o"), ["peers4 { 10.0.0.2 . 64000 }"], id="a peer"),
        pytest.param(Bar("m-dcos", 64000, "o"), ['barred { "m-dcos" . 64000 }'], id="a barred port"),
        pytest.param(
            Accept(A6, "br0", "o"),
            ['members6 { "br0" . fd00::2 }', 'homes { "br0" }', 'within { "br0" . "br0" }'],
            id="accept is membership",
        ),
        pytest.param(
            Fence(A4, "br0", "same-network", "o"), ['fence4 { "br0" . 10.0.0.2 }', 'fenced { "br0" }'], id="fence"
        ),
        pytest.param(
            Fence(A4, "br0", "isolated", "o"),
            ['isolate4 { "br0" . 10.0.0.2 }', 'fenced { "br0" }', 'isolated { "br0" }'],
            id="isolated is fenced too",
        ),
        pytest.param(
            PinMac("tp0", "02:00:00:0a:0b:0c", "o"),
            ['macs { "tp0" . 02:00:00:0a:0b:0c }', 'pinned { "tp0" }'],
            id="pinned MAC",
        ),
    ],
)
def test_a_rule_is_these_elements(rule: Rule, want: list[str]) -> None:
    assert [str(piece) for piece in (*pieces(rule), *shared(rule))] == want


def test_conditions_make_a_rule_of_its_own_that_names_its_owner() -> None:
    conditions = PortRules(conditions_v4=("ip", "saddr", "192.0.2.0/24"))
    piece, *rest = pieces(Publish(port(host="192.0.2.1"), A4, "br0", 'cni/"n"/c', conditions))
    assert isinstance(piece, Conditional)
    assert (
        piece.text == "ip saddr 192.0.2.0/24 ip daddr 192.0.2.1 meta l4proto tcp th dport 8080 dnat ip to 10.0.0.2:80"
    )
    assert piece.comment.endswith(" cni/n/c")
    assert [str(r).split()[0] for r in rest] == ["hairpin4", "snat4"]


def test_a_comment_never_outgrows_what_nft_keeps() -> None:
    rules = PortRules(conditions_v6=("ip6", "saddr", "fd00::/8"))
    piece = next(pieces(Publish(port(), A6, "br0", "ö" * 300, rules)))
    assert isinstance(piece, Conditional)
    assert len(piece.comment.encode()) <= 120


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("-s", "192.0.2.0/24"), id="iptables syntax"),
        pytest.param(("!", "-s", "192.0.2.0/24"), id="negated iptables syntax"),
        pytest.param(("ip saddr 1.2.3.4 accept; flush ruleset",), id="a second command"),
        pytest.param(("ip saddr 1.2.3.4\nflush ruleset",), id="a second line"),
        pytest.param(("ip", 'saddr "'), id="a quote"),
    ],
)
def test_conditions_that_are_no_match_are_refused(words: tuple[str, ...]) -> None:
    rule = Publish(port(), A4, "br0", "o", PortRules(conditions_v4=words))
    with pytest.raises(BadConfig, match="conditionsV4"):
        tuple(pieces(rule))
    assert list(expressed([rule], own)) == [], "such a rule was never installed"


@pytest.mark.parametrize("name", ["eth*", 'a"b', "b;c"])
def test_an_interface_name_that_nft_would_misread_is_refused(name: str) -> None:
    with pytest.raises(BadConfig, match="interface name"):
        tuple(pieces(Masquerade(ip_interface("10.0.0.2/24"), name, "o")))


def test_fields_of_a_key_are_padded_to_registers() -> None:
    item = element("hairpin4_any", (A4, "udp", 258, "br0"))
    assert item.key == bytes((10, 0, 0, 2)) + b"\x11\0\0\0" + b"\x01\x02\0\0" + b"br0".ljust(16, b"\0")
    assert phrase(item) == '10.0.0.2 . udp . 258 . "br0"'


def test_no_key_is_longer_than_the_kernels_registers() -> None:
    room = {"ipv4_addr": 4, "ipv6_addr": 16, "inet_proto": 4, "inet_service": 4, "ifname": 16, "ether_addr": 8}
    assert max(sum(room[field] for field in declared.key) for declared in SETS.values()) <= 64


@pytest.mark.parametrize("table", [INET, BRIDGE])
def test_a_table_is_sound_only_while_every_chain_set_and_rule_is_there(table: str) -> None:
    def structure() -> Structure:
        seen = Structure(
            absent=False, chains={edition(table), *CHAINS[table]}, sets=dict.fromkeys(sets_of(table), False)
        )
        for chain, lines in CHAINS[table].items():
            seen.rules[chain] = len(lines) + (chain in OPEN_CHAINS)
        return seen

    assert sound(table, structure())
    damaged = [structure() for _ in range(4)]
    damaged[0].chains.discard("prerouting")
    damaged[1].sets.popitem()
    damaged[2].rules["prerouting"] -= 1
    damaged[3].chains.discard(edition(table))
    assert not any(sound(table, seen) for seen in damaged)


def test_the_skeleton_is_asked_by_the_administrators_chain_first() -> None:
    text = skeleton(INET)
    forward = text[text.index("chain forward {") :]
    assert forward.index("jump user_forward") < forward.index("ct state")


def test_of_several_changes_to_one_rule_the_last_counts() -> None:
    one, two = Accept(A4, "br0", "1"), Accept(A6, "br0", "2")
    add, drop = read_changes((AddRule(one), DropRule(one), DropRule(two), AddRule(two)))
    assert (list(add), list(drop)) == ([two], [one])


def test_what_is_no_change_of_rules_is_refused() -> None:
    with pytest.raises(TypeError, match="no change of a firewall"):
        read_changes((Accept(A4, "br0", "1"),))


def test_a_rule_is_described_by_its_elements() -> None:
    rule = Masquerade(ip_interface("10.0.0.2/24"), "br0", "o")
    assert Nftables().describe(rule) == 'nftables masq4_home { 10.0.0.2 . "br0" }, masq4 { 10.0.0.2 }'
    assert Nftables().describe(Publish(port(host="::"), A4, "br0", "o")) == "nftables nothing"


# --- which back end --------------------------------------------------------------------------------------------------

EMPTY = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"


def table(*lines: str) -> str:
    return "\n".join(("*filter", ":FORWARD ACCEPT [0:0]", *lines, "COMMIT"))


@pytest.mark.parametrize(
    ("setting", "rules", "nft", "want"),
    [
        pytest.param("auto", "", True, "nftables", id="no filter table"),
        pytest.param("auto", EMPTY, True, "nftables", id="an empty filter table"),
        pytest.param("auto", None, True, "nftables", id="no iptables"),
        pytest.param("auto", EMPTY, False, "iptables", id="no nft"),
        pytest.param(
            "auto", EMPTY.replace("FORWARD ACCEPT", "FORWARD DROP"), True, "iptables", id="nothing is forwarded"
        ),
        pytest.param("auto", table(":DOCKER-USER - [0:0]"), True, "iptables", id="Docker"),
        pytest.param("auto", table(":ufw-before-forward - [0:0]"), True, "iptables", id="ufw"),
        pytest.param("auto", table(":FWDI_public - [0:0]"), True, "iptables", id="firewalld on iptables"),
        pytest.param("auto", table(":KUBE-FORWARD - [0:0]"), True, "iptables", id="kube-proxy"),
        pytest.param("auto", table("-A FORWARD -i eth0 -j REJECT"), True, "iptables", id="somebody refuses to forward"),
        pytest.param("auto", table("-A INPUT -i eth0 -j DROP"), True, "nftables", id="rules about input only"),
        pytest.param(
            "auto", table(":CNI-FORWARD - [0:0]", "-A FORWARD -j CNI-FORWARD"), True, "nftables", id="our own"
        ),
        pytest.param("nftables", table(":DOCKER-USER - [0:0]"), True, "nftables", id="the setting says nftables"),
        pytest.param("iptables", EMPTY, True, "iptables", id="the setting says iptables"),
    ],
)
def test_the_back_end_is_decided_by_who_owns_the_filter_table(
    setting: str, rules: str | None, nft: bool, want: str
) -> None:
    assert firewall.decide(setting, firewall.Host(rules, nft)) == want


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        pytest.param("auto", "apt-get install nftables", id="neither is there"),
        pytest.param("nftables", "apt-get install nftables", id="no nft"),
        pytest.param("iptables", "apt-get install iptables", id="no iptables"),
    ],
)
def test_a_missing_program_is_named_with_what_to_install(setting: str, hint: str) -> None:
    with pytest.raises(Unavailable) as refused:
        firewall.decide(setting, firewall.Host(None, nft=False))
    assert refused.value.hint.endswith(hint)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(BadConfig, match="'ipfw'"):
        firewall.decide("ipfw", firewall.Host(EMPTY, nft=True))
