"""Rules as lines of iptables: which lines, and what a change to a host's saved rules writes. Nothing is executed."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_interface

import pytest

from towpath.errors import BadConfig
from towpath.kernel import forwarding
from towpath.kernel.iptables import Change, Iptables, Saved, change, read, tag_of
from towpath.kernel.iptablesrules import BUILT_IN, group, lines, versions_of
from towpath.model import PortMap, PortRules
from towpath.plan import Accept, Fence, Masquerade, Publish, Rule

A4, A6 = ip_address("10.0.0.2"), ip_address("fd00::2")


def publish(number: int = 8080, to: object = A4, proto: str = "tcp", rules: PortRules | None = None) -> Publish:
    return Publish(PortMap(number, 80, proto), ip_address(str(to)), "br0", "cni/n/c/eth0", rules or PortRules())


def specs(rule: Rule) -> list[str]:
    """Chain and spec of each line, without comments; names that are derived by hash are cut."""
    return [f"{line.chain[:7]} {line.spec.replace(' {comment}', '')}" for line in lines(rule)]


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        pytest.param(
            publish(),
            [
                "CNI-DN- -i br0 -p tcp -m tcp --dport 8080 -j CNI-HOSTPORT-SETMARK",
                "CNI-DN- -s 127.0.0.0/8 -p tcp -m tcp --dport 8080 -j CNI-HOSTPORT-SETMARK",
                "CNI-DN- -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.0.0.2:80",
            ],
            id="a port",
        ),
        pytest.param(
            publish(to=A6, rules=PortRules(masquerade_all=True, mark_bit=20)),
            [
                "CNI-DN- -p tcp -m tcp --dport 8080 -j CNI-HOSTPORT-SETMARK-20",
                "CNI-DN- -p tcp -m tcp --dport 8080 -j DNAT --to-destination [fd00::2]:80",
            ],
            id="all masqueraded, by another mark",
        ),
        pytest.param(
            publish(rules=PortRules(masquerade_all=True, set_mark_chain="KUBE-MARK-MASQ")),
            [
                "CNI-DN- -p tcp -m tcp --dport 8080 -j KUBE-MARK-MASQ",
                "CNI-DN- -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.0.0.2:80",
            ],
            id="somebody else's chain marks",
        ),
        pytest.param(
            publish(rules=PortRules(snat=False)),
            ["CNI-DN- -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.0.0.2:80"],
            id="no snat",
        ),
        pytest.param(
            Publish(PortMap(53, 53, "udp", ip_address("192.0.2.1")), A4, "", "o"),
            [
                "CNI-DN- -s 127.0.0.0/8 -d 192.0.2.1 -p udp -m udp --dport 53 -j CNI-HOSTPORT-SETMARK",
                "CNI-DN- -d 192.0.2.1 -p udp -m udp --dport 53 -j DNAT --to-destination 10.0.0.2:53",
            ],
            id="one address of the host, home unknown",
        ),
        pytest.param(Publish(PortMap(53, 53, "udp", A6), A4, "br0", "o"), [], id="families that differ make nothing"),
        pytest.param(
            Accept(A4, "br0", "o"),
            ["CNI-FOR -d 10.0.0.2 -j ACCEPT", "CNI-FOR -s 10.0.0.2 -j ACCEPT"],
            id="accept",
        ),
        pytest.param(Fence(A4, "br0", "same-network", "o"), ["CNI-ISO -d 10.0.0.2 -o br0 -j DROP"], id="fence"),
    ],
)
def test_a_rule_is_these_lines(rule: Rule, want: list[str]) -> None:
    assert specs(rule) == want


def test_masquerade_has_a_chain_of_its_own() -> None:
    own, other, jump = lines(Masquerade(ip_interface("10.0.0.2/24"), "br0", "o"))
    assert own.chain == other.chain != jump.chain == "POSTROUTING"
    assert len(own.chain) <= 28, "XT_EXTENSION_MAXNAMELEN"
    assert jump.spec.endswith(f"-j {own.chain}")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("ip", "saddr", "192.0.2.0/24"), id="nftables syntax"),
        pytest.param(("-s", "192.0.2.0/24\n-F"), id="a second line"),
        pytest.param(("-s", "192.0.2.0/24", "-j", "ACCEPT"), id="a target of its own"),
        pytest.param(("-m", "comment", "--comment", '"x"'), id="quotes"),
    ],
)
def test_conditions_that_are_no_match_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(BadConfig, match="conditionsV4"):
        lines(publish(rules=PortRules(conditions_v4=words)))


@pytest.mark.parametrize("home", ["br+", 'a"b'])
def test_an_interface_name_that_iptables_would_misread_is_refused(home: str) -> None:
    with pytest.raises(BadConfig, match="interface name"):
        lines(Accept(A4, home, "o"))


# --- a host in text --------------------------------------------------------------------------------------------------


def saved_after(edit: Change, before: str = "") -> str:
    """What iptables-save would print after the change: a small iptables that knows -A, -I, -D, -X and new chains."""
    chains: dict[tuple[str, str], None] = dict.fromkeys(read(before).chains)
    held = [(line.table, line.text) for line in read(before).lines]
    table = ""
    for line in edit.text().splitlines():
        word, _, rest = line.partition(" ")
        if word.startswith("*"):
            table = word[1:]
        elif word.startswith(":"):
            assert (table, word[1:]) not in chains, "naming a chain that exists would flush it"
            chains[table, word[1:]] = None
        elif word in ("-A", "-I"):
            target = rest.split()[0]
            assert target in BUILT_IN or (table, target) in chains, f"{target} does not exist"
            held.insert(0 if word == "-I" else len(held), (table, f"-A {rest}"))
        elif word == "-D":
            held.remove((table, f"-A {rest}"))
        elif word == "-X":
            assert not [text for t, text in held if t == table and text.split()[1] == rest], f"{rest} is not empty"
            del chains[table, rest]
    return "\n".join(
        "\n".join((f"*{t}", *(f":{c} - [0:0]" for n, c in chains if n == t), *(x for n, x in held if n == t), "COMMIT"))
        for t in ("nat", "filter")
    )


def host(rules: Iterable[Rule], before: str = "") -> str:
    return saved_after(change(4, read(before), tuple(rules), ()), before)


def ours(text: str) -> list[str]:
    return [line.text for line in read(text).lines if line.id]


def test_nothing_is_written_where_nothing_changes() -> None:
    rules = (publish(), Masquerade(ip_interface("10.0.0.2/24"), "br0", "o"), Accept(A4, "br0", "o"))
    assert len(change(4, read(host(rules)), rules, ())) == 0
    assert len(change(4, Saved(), (), rules)) == 0


def test_a_line_to_the_ports_of_a_container_holds_fifteen_of_them() -> None:
    text = host(publish(8000 + n, proto=proto) for n in range(20) for proto in ("tcp", "udp"))
    dispatch = [line for line in read(text).lines if line.id.startswith("dispatch.")]
    ports = [line.text.split("--dports ")[1].split()[0].split(",") for line in dispatch]
    assert sorted(map(len, ports)) == [5, 5, 15, 15]
    assert all(len(line.text.split('"')[1].encode()) < 256 for line in dispatch)


def test_unpublishing_one_port_keeps_the_others_reachable() -> None:
    before = host([publish(8000), publish(8001)])
    after = saved_after(change(4, read(before), (), [publish(8000)]), before)
    assert sorted(ours(after)) == sorted(ours(host([publish(8001)])))


def test_the_last_rule_takes_its_chains_and_shared_lines_with_it() -> None:
    rules: list[Rule] = [publish(), Masquerade(ip_interface("10.0.0.2/24"), "br0", "o"), Accept(A4, "br0", "o")]
    rules.append(Fence(A4, "br0", "isolated", "o"))
    before = host(rules)
    after = read(saved_after(change(4, read(before), (), rules), before))
    assert {tag_of(line.id) for line in after.lines} == {"skeleton"}
    assert not [chain for _, chain in after.chains if chain.startswith("CNI-DN-")]


def test_lines_of_others_and_their_chains_stay() -> None:
    foreign = (
        "*nat\n:PREROUTING ACCEPT [0:0]\n:CNI-HOSTPORT-DNAT - [0:0]\n:CNI-HOSTPORT-SETMARK - [0:0]\n:CNI-DN-1 - [0:0]\n"
        '-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \\"x\\" id: \\"y\\"" -j CNI-DN-1\n'
        "-A CNI-DN-1 -s 10.9.0.0/16 -j CNI-HOSTPORT-SETMARK\nCOMMIT\n"
    )
    with_ours = host([publish()], foreign)
    after = saved_after(change(4, read(with_ours), (), [publish()]), with_ours)
    assert {line.text for line in read(foreign).lines} <= {line.text for line in read(after).lines}
    assert read(foreign).chains <= read(after).chains


def test_a_rule_of_which_a_line_is_missing_is_written_anew_in_order() -> None:
    text = host([publish()])
    mark = next(line for line in ours(text) if "CNI-HOSTPORT-SETMARK" in line and "CNI-DN" in line)
    edit = change(4, read(text.replace(mark + "\n", "")), [publish()], ())
    assert [line.spec.split()[-1] for line in edit.add] == [
        "CNI-HOSTPORT-SETMARK",
        "CNI-HOSTPORT-SETMARK",
        "10.0.0.2:80",
    ]
    assert len(edit.drop) == 2


def test_fences_are_shared_until_the_last_member_goes() -> None:
    one, two = (Fence(ip_address(f"10.0.0.{n}"), "br0", "same-network", f"o{n}") for n in (2, 3))
    before = host([one, two])
    after = saved_after(change(4, read(before), (), [one]), before)
    assert any("shared.fence=br0" in line for line in ours(after))
    last = saved_after(change(4, read(after), (), [two]), after)
    assert not any("shared." in line for line in ours(last))


def test_dockers_chain_for_the_user_leads_to_ours() -> None:
    text = host([Accept(A4, "br0", "o")], "*filter\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\nCOMMIT\n")
    assert any(line.startswith("-A DOCKER-USER") and line.endswith("-j CNI-FORWARD") for line in ours(text))


def test_conditions_are_asked_before_the_ports_chain() -> None:
    words = PortRules(conditions_v4=("-s", "192.0.2.0/24"))
    text = host([publish(rules=words)])
    assert group(publish(rules=words)).chain != group(publish()).chain
    assert any("--dports 8080 -s 192.0.2.0/24 -j CNI-DN-" in line for line in ours(text))


def test_a_rule_is_described_by_its_lines_and_its_family() -> None:
    assert Iptables().describe(publish(to=A6)).startswith("ip6tables -t nat -A CNI-DN-")
    assert versions_of(publish(to=A6)) == (6,)


# --- the host's own FORWARD ------------------------------------------------------------------------------------------

BR0 = "*filter\n:FORWARD DROP [0:0]\n:TOWPATH-FORWARD - [0:0]\n-A FORWARD -j TOWPATH-FORWARD\n"
BR0 += "-A TOWPATH-FORWARD -i br0 -j ACCEPT\n-A TOWPATH-FORWARD -o br0 -j ACCEPT\nCOMMIT\n"
NEW = ":TOWPATH-FORWARD - [0:0]"


@pytest.mark.parametrize(
    ("saved", "homes", "want"),
    [
        pytest.param(BR0, {"br0"}, [], id="as wanted"),
        pytest.param("", set(), [], id="nothing wanted, nothing there"),
        pytest.param(
            "",
            {"b"},
            [
                NEW,
                "-A TOWPATH-FORWARD -i b -j ACCEPT",
                "-A TOWPATH-FORWARD -o b -j ACCEPT",
                "-I FORWARD -j TOWPATH-FORWARD",
            ],
            id="the first",
        ),
        pytest.param(BR0, set(), [NEW, "-D FORWARD -j TOWPATH-FORWARD", "-X TOWPATH-FORWARD"], id="the last goes"),
        pytest.param(
            BR0.replace("-A FORWARD -j TOWPATH-FORWARD\n", ""),
            {"br0"},
            [
                NEW,
                "-A TOWPATH-FORWARD -i br0 -j ACCEPT",
                "-A TOWPATH-FORWARD -o br0 -j ACCEPT",
                "-I FORWARD -j TOWPATH-FORWARD",
            ],
            id="somebody took the jump away",
        ),
    ],
)
def test_the_hosts_forward_accepts_exactly_the_members_interfaces(saved: str, homes: set[str], want: list[str]) -> None:
    text = forwarding.difference(saved, frozenset(homes))
    assert text == ("\n".join(("*filter", *want, "COMMIT", "")) if want else "")
