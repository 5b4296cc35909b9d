"""Plug-ins in a chain, behind ours and behind a foreign wire; and towpath-ipam for a foreign main plug-in."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import pytest

from tests.api.cni_calls import NETNS, OTHER, Desk, bridge, make_desk
from towpath.api.cni import pieces
from towpath.api.cni.section import Section
from towpath.errors import BadConfig
from towpath.model import Key, PortRules, Tuning
from towpath.plan import Accept, AddRule, Fence, Publish, SetLink, Shape, Sysctl

KEY = Key("cni", "blue", "c1", "eth0")
PORTS = {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}
FOREIGN = {
    "cniVersion": "1.0.0",
    "interfaces": [
        {"name": "cni0", "mac": "0a:00:00:00:00:01"},
        {"name": "vethx", "mac": "0a:00:00:00:00:02"},
        {"name": "eth0", "mac": "0a:00:00:00:00:03", "sandbox": NETNS},
    ],
    "ips": [{"interface": 2, "address": "10.1.0.5/24", "gateway": "10.1.0.1"}],
    "routes": [{"dst": "0.0.0.0/0"}],
    "dns": {},
}


@pytest.fixture
async def desk() -> Desk:
    """A node on which somebody else wired container c1: cni0 ← vethx ↔ eth0, 10.1.0.5/24."""
    desk = await make_desk()
    kernel = desk.kernel
    kernel.add_link("cni0", "bridge")
    kernel.host.addresses.add(("cni0", ip_interface("10.1.0.1/24")))
    outside, inside = kernel.add_link("vethx", "veth"), kernel.add_link("eth0", "veth", NETNS)
    kernel.host.links["vethx"] = replace(outside, peer_index=inside.index, master="cni0")
    kernel.netns[NETNS].links["eth0"] = replace(inside, peer_index=outside.index)
    return desk


def piece(kind: str, version: str = "1.0.0", **keys: Any) -> dict[str, Any]:
    conf = {"name": "blue", "cniVersion": version, "type": kind, "prevResult": FOREIGN, **keys}
    return {key: value for key, value in conf.items() if value is not None}


def rules(desk: Desk, kind: type) -> list[Any]:
    return [rule for rule in desk.kernel.rules if isinstance(rule, kind)]


CHAINED = ["towpath-portmap", "towpath-firewall", "towpath-bandwidth", "towpath-tuning"]


@pytest.mark.parametrize("kind", CHAINED)
async def test_p1_a_chained_plugin_needs_a_previous_result(desk: Desk, kind: str) -> None:
    for command in ("ADD", "CHECK"):
        answer = await desk.call(command, kind, piece(kind, prevResult=None))
        assert (answer.code, "must be called as chained plugin" in answer.msg) == (7, True)


@pytest.mark.parametrize("kind", ["towpath-portmap", "towpath-bandwidth", "towpath-tuning"])
async def test_p2_with_nothing_asked_for_the_result_is_passed_on_and_nothing_is_done(desk: Desk, kind: str) -> None:
    assert await desk.add(kind, piece(kind)) == FOREIGN
    assert (await desk.call("CHECK", kind, piece(kind))).status == 0
    assert (await desk.call("DEL", kind, piece(kind))).status == 0
    assert desk.kernel.log == []
    assert desk.attacher.records == {}


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
async def test_fw5_the_previous_result_is_passed_on_in_every_version(desk: Desk, version: str) -> None:
    first = await desk.add("towpath-bridge", bridge(version), container="c2", NETNS=OTHER)
    conf = {"name": "blue", "cniVersion": version, "prevResult": first}
    for kind in ("towpath-portmap", "towpath-firewall", "towpath-tuning", "towpath-bandwidth"):
        assert await desk.add(kind, conf, container="c2", NETNS=OTHER) == first


async def test_ports_of_a_foreign_wire_are_published_and_taken_back(desk: Desk) -> None:
    conf = piece("towpath-portmap", runtimeConfig=PORTS, snat=False, masqAll=True, conditionsV4=["-s", "192.0.2.0/24"])
    assert await desk.add("towpath-portmap", conf) == FOREIGN
    (rule,) = rules(desk, Publish)
    assert (str(rule.to), rule.home) == ("10.1.0.5", "cni0")
    assert rule.rules == PortRules(snat=False, masquerade_all=True, conditions_v4=("-s", "192.0.2.0/24"))
    record = desk.attacher.records[KEY]
    assert (record.parts, record.veth, record.mode) == (("ports",), "vethx", "")
    assert (await desk.call("CHECK", "towpath-portmap", conf)).status == 0
    desk.kernel.rules.clear()
    assert (await desk.call("CHECK", "towpath-portmap", conf)).code == 100  # P14
    assert (await desk.call("DEL", "towpath-portmap", piece("towpath-portmap", prevResult=None), NETNS="")).status == 0
    assert await desk.rows() == set()
    assert "vethx" in desk.kernel.host.links


async def test_chain_pieces_behind_our_own_bridge_join_its_record(desk: Desk) -> None:
    conf = bridge(name="red", bridge="red0")
    first = await desk.add("towpath-bridge", conf, container="c2", NETNS=OTHER)
    chain = {"name": "red", "cniVersion": "1.0.0", "prevResult": first}
    await desk.add("towpath-portmap", {**chain, "runtimeConfig": PORTS}, container="c2", NETNS=OTHER)
    rates = {"ingressRate": 8000, "ingressBurst": 8000, "egressRate": 8000, "egressBurst": 8000}
    shaped = await desk.add("towpath-bandwidth", {**chain, **rates}, container="c2", NETNS=OTHER)
    key = Key("cni", "red", "c2", "eth0")
    record = desk.attacher.records[key]
    assert record.parts == ("wire", "address", "firewall", "ports", "bandwidth")
    assert record.leases[0].pool == 0
    (rule,) = rules(desk, Publish)
    assert (rule.home, str(rule.to)) == ("red0", "10.9.0.2")
    assert shaped["interfaces"][3]["name"] == key.ifb()
    for kind in ("towpath-bandwidth", "towpath-portmap", "towpath-bridge"):
        assert (await desk.call("DEL", kind, {**chain, "type": kind}, container="c2", NETNS="")).status == 0
    assert await desk.rows() == set()


async def test_p15_a_conflict_in_a_chain_leaves_the_wire_alone(desk: Desk) -> None:
    await desk.add("towpath-portmap", piece("towpath-portmap", runtimeConfig=PORTS))
    first = await desk.add("towpath-bridge", bridge(), container="c2", NETNS=OTHER)
    conf = {"name": "blue", "cniVersion": "1.0.0", "prevResult": first, "runtimeConfig": PORTS}
    answer = await desk.call("ADD", "towpath-portmap", conf, container="c2", NETNS=OTHER)
    assert (answer.code, "cni/blue/c1/eth0" in answer.msg) == (7, True)
    assert desk.attacher.records[Key("cni", "blue", "c2", "eth0")].parts == ("wire", "address", "firewall")


async def test_ports_need_an_address_of_this_interface(desk: Desk) -> None:
    elsewhere = {**FOREIGN, "ips": [{"interface": 0, "address": "10.1.0.5/24"}]}
    conf = piece("towpath-portmap", runtimeConfig=PORTS, prevResult=elsewhere)
    answer = await desk.call("ADD", "towpath-portmap", conf)
    assert (answer.code, "no IP address of eth0" in answer.msg) == (7, True)


@pytest.mark.parametrize(
    ("policy", "fences"),
    [
        pytest.param("", [], id="open by default"),
        pytest.param("open", [], id="open"),
        pytest.param("same-bridge", ["same-network"], id="the reference's name"),
        pytest.param("isolated", ["isolated"], id="isolated"),
    ],
)
async def test_firewall_accepts_and_fences_a_foreign_wire(desk: Desk, policy: str, fences: list[str]) -> None:
    conf = piece("towpath-firewall", ingressPolicy=policy, backend="")
    await desk.add("towpath-firewall", conf)
    assert [str(rule.address) for rule in rules(desk, Accept)] == ["10.1.0.5"]
    assert [rule.policy for rule in rules(desk, Fence)] == fences
    assert (
        await desk.call("DEL", "towpath-firewall", piece("towpath-firewall", prevResult=None), NETNS="")
    ).status == 0
    assert desk.kernel.rules == set()


async def test_firewall_behind_our_bridge_is_done_already(desk: Desk) -> None:
    first = await desk.add("towpath-bridge", bridge(isolation="isolated"), container="c2", NETNS=OTHER)
    before = len(desk.kernel.log)
    conf = {"name": "blue", "cniVersion": "1.0.0", "prevResult": first}
    await desk.add("towpath-firewall", conf, container="c2", NETNS=OTHER)
    assert len(desk.kernel.log) == before
    await desk.add("towpath-firewall", {**conf, "ingressPolicy": "same-bridge"}, container="c2", NETNS=OTHER)
    assert [rule.policy for rule in rules(desk, Fence)] == ["same-network"]
    assert any(isinstance(op, AddRule) for op in desk.kernel.log[before:])


REFUSED = [
    pytest.param("towpath-firewall", {"backend": "firewalld"}, 2, 'backend: "firewalld"', id="no firewalld"),
    pytest.param("towpath-firewall", {"iptablesAdminChainName": "X"}, 2, '"X"', id="another admin chain"),
    pytest.param("towpath-firewall", {"ingressPolicy": "x"}, 7, '"x"', id="unknown policy"),
    pytest.param("towpath-portmap", {"backend": "pf"}, 7, '"pf"', id="unknown back end"),
    pytest.param("towpath-portmap", {"externalSetMarkChain": "X", "markMasqBit": 3}, 7, "exclude", id="exclusive"),
    pytest.param("towpath-portmap", {"conditionsV4": ["a;b"]}, 7, '"a;b"', id="a condition that ends a rule"),
    pytest.param("towpath-portmap", {"conditionsV4": "x"}, 6, "conditionsV4", id="conditions are text"),
    pytest.param("towpath-portmap", {"snat": 1}, 6, "snat 1", id="snat is a number"),
    pytest.param("towpath-bandwidth", {"ingressRate": 1000}, 7, "ingressBurst", id="BW4 rate without burst"),
    pytest.param("towpath-bandwidth", {"egressBurst": 1000}, 7, "egressRate", id="BW4 burst without rate"),
    pytest.param("towpath-bandwidth", {"ingressRate": -1, "ingressBurst": 1}, 7, "ingressRate -1", id="negative rate"),
    pytest.param("towpath-tuning", {"sysctl": {"kernel.x": "1"}}, 7, "below net", id="sysctl of the node"),
    pytest.param("towpath-tuning", {"sysctl": {"net/../kernel/x": "1"}}, 7, "below net", id="sysctl that climbs"),
    pytest.param("towpath-tuning", {"sysctl": {"net.a.b": "1", "net/a/b": "2"}}, 7, "twice", id="sysctl twice"),
    pytest.param("towpath-tuning", {"sysctl": {"net.a": 1}}, 6, "net.a 1", id="sysctl value is a number"),
    pytest.param("towpath-tuning", {"sysctl": {"net.bridge.x": "1"}}, 7, "does not exist", id="no such sysctl"),
    pytest.param("towpath-tuning", {"mtu": 1}, 7, "mtu 1", id="mtu too small"),
    pytest.param("towpath-tuning", {"mac": "ff:ff:ff:ff:ff:ff"}, 7, "unicast", id="broadcast MAC"),
    pytest.param("towpath-tuning", {"promisc": "yes"}, 6, "promisc", id="promisc is text"),
]


@pytest.mark.parametrize(("kind", "keys", "code", "named"), REFUSED)
async def test_a_wrong_value_is_refused_by_key_and_changes_nothing(
    desk: Desk, kind: str, keys: dict[str, Any], code: int, named: str
) -> None:
    if kind == "towpath-portmap":
        keys = {"runtimeConfig": PORTS, **keys}
    answer = await desk.call("ADD", kind, piece(kind, **keys))
    assert (answer.code, named in answer.msg) == (code, True), answer.body
    assert desk.kernel.log == []
    assert await desk.rows() == set()


async def test_bandwidth_of_a_foreign_wire(desk: Desk) -> None:
    rates: dict[str, Any] = {"ingressRate": 8000, "ingressBurst": 8000}
    runtime = {"bandwidth": {"ingressRate": 1, "ingressBurst": 1}}
    conf = piece("towpath-bandwidth", **rates, runtimeConfig=runtime)
    await desk.add("towpath-bandwidth", conf)
    (shape,) = [op for op in desk.kernel.log if isinstance(op, Shape)]
    assert (shape.port, shape.bandwidth.ingress_rate) == ("vethx", 8000)  # the configuration wins over the runtime
    assert (await desk.call("DEL", "towpath-bandwidth", conf, NETNS="")).status == 0
    assert await desk.rows() == set()


async def test_bandwidth_needs_the_host_end(desk: Desk) -> None:
    lonely = {**FOREIGN, "interfaces": [{"name": "cni0"}, {"name": "cni0"}, FOREIGN["interfaces"][2]]}  # type: ignore[index]
    conf = piece("towpath-bandwidth", ingressRate=8000, ingressBurst=8000, prevResult=lonely)
    answer = await desk.call("ADD", "towpath-bandwidth", conf)
    assert (answer.code, "veth peer" in answer.msg) == (7, True)


async def test_tuning_sets_and_puts_back(desk: Desk) -> None:
    desk.kernel.netns[NETNS].sysctls["net/ipv4/conf/eth0/log_martians"] = "0"
    conf = piece("towpath-tuning", sysctl={"net.ipv4.conf.IFNAME.log_martians": "1"}, mtu=1400, promisc=True)
    result = await desk.add("towpath-tuning", conf, ARGS="MAC=02:00:00:00:00:09")
    assert result["interfaces"][2]["mac"] == "02:00:00:00:00:09"
    inside = desk.kernel.netns[NETNS]
    link = inside.links["eth0"]
    assert (link.mac, link.mtu, link.promiscuous) == ("02:00:00:00:00:09", 1400, True)
    assert inside.sysctls["net/ipv4/conf/eth0/log_martians"] == "1"
    assert (await desk.call("CHECK", "towpath-tuning", conf)).status == 0
    inside.sysctls["net/ipv4/conf/eth0/log_martians"] = "0"
    assert (await desk.call("CHECK", "towpath-tuning", conf)).code == 100
    inside.sysctls["net/ipv4/conf/eth0/log_martians"] = "1"
    assert (await desk.call("DEL", "towpath-tuning", conf)).status == 0
    link = inside.links["eth0"]
    assert (link.mac, link.mtu, link.promiscuous) == ("0a:00:00:00:00:01", 1500, False)
    assert inside.sysctls["net/ipv4/conf/eth0/log_martians"] == "0"
    assert await desk.rows() == set()


async def test_tuning_of_what_is_gone_is_deleted_without_error(desk: Desk) -> None:
    await desk.add("towpath-tuning", piece("towpath-tuning", sysctl={"net.ipv4.conf.IFNAME.x": "1"}))
    desk.kernel.drop_netns(NETNS)
    assert (await desk.call("DEL", "towpath-tuning", piece("towpath-tuning"))).status == 0
    assert await desk.rows() == set()
    assert not any(isinstance(op, SetLink | Sysctl) for op in desk.kernel.log[1:])


@pytest.mark.parametrize(
    ("key", "want"),
    [
        pytest.param("net.ipv4.conf.IFNAME.rp_filter", "net/ipv4/conf/e.1/rp_filter", id="dots"),
        pytest.param("net/ipv4/conf/IFNAME/rp_filter", "net/ipv4/conf/e.1/rp_filter", id="slashes"),
        pytest.param("net.ipv4.conf.x/7.rp_filter", "net/ipv4/conf/x.7/rp_filter", id="a dot inside a name"),
    ],
)
def test_sysctl_names_are_read_as_sysctl_8_does(key: str, want: str) -> None:
    assert pieces.sysctls("e.1", Section({key: "1"}, "sysctl")) == ((want, "1"),)


@pytest.mark.parametrize(
    ("lines", "allowed"),
    [
        pytest.param(None, True, id="no list: all"),
        pytest.param("", False, id="empty list: none"),
        pytest.param("^net/ipv4/conf/.*$\n", True, id="a line matches"),
        pytest.param("^net\\.ipv4\\.conf\\.\n", True, id="a line matches the dotted form"),
        pytest.param("^net/core/\n", False, id="no line matches"),
    ],
)
def test_the_allowlist_decides(tmp_path: Path, lines: str | None, allowed: bool) -> None:
    place = tmp_path / "allowlist.conf"
    if lines is not None:
        place.write_text(lines)
    wanted = Tuning(sysctl=(("net/ipv4/conf/eth0/x", "1"),)).sysctl
    if allowed:
        pieces.check_allowed(wanted, place)
    else:
        with pytest.raises(BadConfig, match="not allowed"):
            pieces.check_allowed(wanted, place)


@pytest.mark.parametrize("kind", CHAINED)
async def test_gc_and_status_are_real_in_every_piece(desk: Desk, kind: str) -> None:
    await desk.add("towpath-portmap", piece("towpath-portmap", runtimeConfig=PORTS))
    conf = piece(kind, "1.1.0", prevResult=None)
    assert (await desk.call("STATUS", kind, conf)).status == 0
    desk.kernel.missing_firewalls.add("nftables")
    want = 50 if kind in ("towpath-portmap", "towpath-firewall") else 0
    assert (await desk.call("STATUS", kind, conf)).code == want
    desk.kernel.missing_firewalls.clear()
    assert (await desk.call("GC", kind, {**conf, "cni.dev/valid-attachments": []})).status == 0
    assert await desk.rows() == set()


# --- towpath-ipam alone ----------------------------------------------------------------------------------------------

IPAM: dict[str, Any] = {
    "name": "blue",
    "cniVersion": "1.1.0",
    "type": "bridge",
    "bridge": "cni0",
    "isGateway": True,
    "ipam": {"type": "towpath-ipam", "subnet": "10.1.0.0/29", "routes": [{"dst": "0.0.0.0/0"}]},
}


async def test_towpath_ipam_serves_a_foreign_main_plugin(desk: Desk) -> None:
    result = await desk.add("towpath-ipam", IPAM)
    assert result == {
        "cniVersion": "1.1.0",
        "interfaces": [],
        "ips": [{"address": "10.1.0.2/29", "gateway": "10.1.0.1"}],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dns": {},
    }
    assert desk.kernel.log == []
    assert (await desk.call("CHECK", "towpath-ipam", {**IPAM, "prevResult": result})).status == 0
    assert (await desk.call("DEL", "towpath-ipam", IPAM, NETNS="")).status == 0
    assert (await desk.call("DEL", "towpath-ipam", IPAM, NETNS="")).status == 0
    assert await desk.rows() == set()
    assert (await desk.call("CHECK", "towpath-ipam", {**IPAM, "prevResult": result})).code == 3


async def test_h1_addresses_go_round(desk: Desk) -> None:
    for number in range(3):
        await desk.add("towpath-ipam", IPAM, container=f"c{number}")
    await desk.call("DEL", "towpath-ipam", IPAM, container="c0")
    assert (await desk.add("towpath-ipam", IPAM, container="c9"))["ips"][0]["address"] == "10.1.0.5/29"


async def test_h3_exhaustion_is_code_11_and_status_50(desk: Desk) -> None:
    for number in range(5):
        await desk.add("towpath-ipam", IPAM, container=f"c{number}")
    before = await desk.rows()
    answer = await desk.call("ADD", "towpath-ipam", IPAM, container="c9")
    assert (answer.code, await desk.rows()) == (11, before)
    assert (await desk.call("STATUS", "towpath-ipam", IPAM)).code == 50


async def test_h8_two_interfaces_of_a_container_are_apart(desk: Desk) -> None:
    for ifname in ("eth0", "eth1"):
        await desk.add("towpath-ipam", IPAM, IFNAME=ifname)
    await desk.call("DEL", "towpath-ipam", IPAM, IFNAME="eth0")
    assert {key.ifname for key in desk.attacher.records} == {"eth1"}


async def test_towpath_ipam_takes_static_addresses_and_refuses_those_outside(desk: Desk) -> None:
    assert (await desk.add("towpath-ipam", IPAM, ARGS="IP=10.1.0.4"))["ips"][0]["address"] == "10.1.0.4/29"
    answer = await desk.call("ADD", "towpath-ipam", IPAM, container="c2", ARGS="IP=10.1.0.4")
    assert (answer.code, "10.1.0.4" in answer.msg) == (7, True)
    answer = await desk.call("ADD", "towpath-ipam", IPAM, container="c2", ARGS="IP=10.2.0.4")
    assert (answer.code, "10.2.0.4" in answer.msg) == (7, True)
    assert ip_address("10.1.0.4") in desk.attacher.records[KEY].addresses
