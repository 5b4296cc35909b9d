"""towpath-bridge, towpath-host and towpath-loopback: (environment, configuration) → (answer, kernel, rows)."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.api.cni_calls import DUAL, NETNS, OTHER, SUBNET, Desk, bridge, make_desk
from towpath.api.cni.network import parse_resolv_conf
from towpath.model import Dns, Key, Network, PortMap
from towpath.plan import AddAddress, AddRule, AddVeth, EnsureBridge, Fence, Publish, Shape
from towpath.ranges import parse_pools

KEY = Key("cni", "blue", "c1", "eth0")
PORT = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}


@pytest.fixture
async def desk() -> Desk:
    return await make_desk()


def ops(desk: Desk, kind: type) -> list[Any]:
    return [op for op in desk.kernel.log if isinstance(op, kind)]


def rules(desk: Desk, kind: type) -> list[Any]:
    return [rule for rule in desk.kernel.rules if isinstance(rule, kind)]


async def test_b3_the_result_names_bridge_host_end_and_container_end(desk: Desk) -> None:
    result = await desk.add("towpath-bridge", bridge("1.1.0", isDefaultGateway=True))
    blue, veth = desk.kernel.host.links["blue0"], desk.kernel.host.links[KEY.veth()]
    assert result == {
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "blue0", "mac": blue.mac, "mtu": 1500},
            {"name": KEY.veth(), "mac": veth.mac, "mtu": 1500},
            {"name": "eth0", "mac": KEY.mac(), "sandbox": NETNS, "mtu": 1500},
        ],
        "ips": [{"interface": 2, "address": "10.9.0.2/24", "gateway": "10.9.0.1"}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.9.0.1"}],
        "dns": {},
    }
    assert desk.kernel.netns[NETNS].links["eth0"].mac == KEY.mac()


@pytest.mark.parametrize(
    "version",
    [
        pytest.param(None, id="absent cniVersion is 0.1.0, which UCR needs"),
        pytest.param("0.1.0", id="0.1.0"),
        pytest.param("0.2.0", id="0.2.0"),
    ],
)
async def test_old_versions_get_the_old_form(desk: Desk, version: str | None) -> None:
    routes = [{"dst": "0.0.0.0/0"}]
    result = await desk.add("towpath-bridge", bridge(version, ipam={**SUBNET, "routes": routes}))
    assert result == {
        "cniVersion": version or "0.1.0",
        "ip4": {"ip": "10.9.0.2/24", "gateway": "10.9.0.1", "routes": routes},
        "dns": {},
    }


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
async def test_newer_versions_get_interfaces_and_ips(desk: Desk, version: str) -> None:
    result = await desk.add("towpath-bridge", bridge(version, ipam=DUAL))
    assert [ip["address"] for ip in result["ips"]] == ["10.9.0.2/24", "fd00:9::2/64"]
    assert ("version" in result["ips"][0]) == (version < "1.0.0")
    assert len(result["interfaces"]) == 3


async def test_b4_two_pools_of_a_family_are_refused_before_anything_is_done_in_old_versions(desk: Desk) -> None:
    ranges = [[{"subnet": "10.9.0.0/24"}], [{"subnet": "10.8.0.0/24"}]]
    ipam = {"type": "towpath-ipam", "ranges": ranges}
    answer = await desk.call("ADD", "towpath-bridge", bridge("0.2.0", ipam=ipam))
    assert (answer.code, "CNI version 0.2.0" in answer.msg) == (7, True)
    assert await desk.rows() == set()
    assert desk.kernel.log == []
    assert len((await desk.add("towpath-bridge", bridge("0.3.0", ipam=ipam)))["ips"]) == 2


async def test_one_call_does_it_all_and_one_del_leaves_nothing(desk: Desk) -> None:
    before = str(desk.kernel)
    runtime = {"portMappings": [PORT], "bandwidth": {"ingressRate": 8000, "ingressBurst": 8000}}
    conf = bridge(ipMasq=True, isolation="same-bridge", runtimeConfig=runtime)
    await desk.add("towpath-bridge", conf)
    record = desk.attacher.records[KEY]
    assert record.parts == ("wire", "address", "ports", "firewall", "bandwidth")
    assert (record.caller, record.isolation, record.masquerade) == ("/usr/bin/podman", "same-network", True)
    assert [rule.port for rule in rules(desk, Publish)] == [PortMap(8080, 80)]
    assert [rule.policy for rule in rules(desk, Fence)] == ["same-network"]
    assert ops(desk, Shape)
    answer = await desk.call("DEL", "towpath-bridge", conf, NETNS="")
    assert (answer.status, answer.stdout) == (0, b"")
    assert await desk.rows() == set()
    assert desk.kernel.rules == set()
    assert KEY.veth() not in desk.kernel.host.links
    assert str(desk.kernel).replace("blue0", "") != before  # the bridge stays, as with the reference


@pytest.mark.parametrize("version", [None, "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
@pytest.mark.parametrize("netns", [NETNS, "/run/netns/gone", ""])
async def test_b15_del_twice_and_del_of_what_never_was_succeed(desk: Desk, version: str | None, netns: str) -> None:
    await desk.add("towpath-bridge", bridge(version))
    for _ in range(3):
        answer = await desk.call("DEL", "towpath-bridge", bridge(version), NETNS=netns)
        assert (answer.status, answer.stdout) == (0, b"")
    assert await desk.rows() == set()


async def test_b14_a_failed_add_gives_the_address_back(desk: Desk) -> None:
    desk.kernel.add_link("eth0", netns=NETNS)
    answer = await desk.call("ADD", "towpath-bridge", bridge())
    assert answer.status == 1
    assert await desk.rows() == set()
    result = await desk.add("towpath-bridge", bridge(), NETNS=OTHER)
    assert result["ips"][0]["address"].startswith("10.9.0.")


async def test_a_second_add_of_the_same_attachment_is_refused_and_harms_nothing(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge())
    answer = await desk.call("ADD", "towpath-bridge", bridge())
    assert (answer.code, "cni/blue/c1/eth0" in answer.msg) == (7, True)
    assert (await desk.call("CHECK", "towpath-bridge", bridge(prevResult={"ips": []}))).code == 100
    assert KEY in desk.attacher.records


async def test_p15_a_host_port_in_use_is_refused_naming_its_owner(desk: Desk) -> None:
    conf = bridge(runtimeConfig={"portMappings": [PORT]})
    await desk.add("towpath-bridge", conf)
    answer = await desk.call("ADD", "towpath-bridge", conf, container="c2", NETNS=OTHER)
    assert answer.code == 7
    assert "8080/tcp" in answer.msg
    assert "cni/blue/c1/eth0" in answer.msg
    assert not any("c2" in row for row in await desk.rows())


async def test_b11_without_ipam_the_interface_has_no_address(desk: Desk) -> None:
    result = await desk.add("towpath-bridge", bridge(ipam={}))
    assert (result["ips"], len(result["interfaces"])) == ([], 3)
    assert desk.attacher.records[KEY].parts == ("wire",)
    answer = await desk.call("ADD", "towpath-bridge", bridge("0.2.0", ipam={}), container="c2", NETNS=OTHER)
    assert (answer.code, "needs an IP address" in answer.msg) == (7, True)
    assert len(desk.attacher.records) == 1


async def test_without_ipam_an_existing_network_gives_addresses(desk: Desk) -> None:
    pools = parse_pools([[{"subnet": "10.5.0.0/24"}]])
    await desk.attacher.create_network(Network("green", bridge="green0", pools=pools))
    result = await desk.add("towpath-bridge", {"name": "green", "cniVersion": "1.0.0", "type": "towpath-bridge"})
    assert [ip["address"] for ip in result["ips"]] == ["10.5.0.2/24"]
    assert result["interfaces"][0]["name"] == "green0"


async def test_the_key_network_names_the_row_and_gc_of_one_cni_name_spares_the_other(desk: Desk) -> None:
    pools = parse_pools([[{"subnet": "10.5.0.0/24"}]])
    await desk.attacher.create_network(Network("green", bridge="green0", pools=pools))
    first = {"name": "one", "network": "green", "cniVersion": "1.1.0"}
    second = {**first, "name": "two"}
    await desk.add("towpath-bridge", first)
    await desk.add("towpath-bridge", second, container="c2", NETNS=OTHER)
    assert {str(key) for key in desk.attacher.records} == {"cni:one/green/c1/eth0", "cni:two/green/c2/eth0"}
    await desk.call("GC", "towpath-bridge", {**first, "cni.dev/valid-attachments": []})
    assert {str(key) for key in desk.attacher.records} == {"cni:two/green/c2/eth0"}


async def test_a_key_that_differs_from_the_row_is_refused_naming_both_values(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge(mtu=1400))
    answer = await desk.call("ADD", "towpath-bridge", bridge(mtu=1300), container="c2", NETNS=OTHER)
    assert (answer.code, "1400" in answer.msg, "1300" in answer.msg) == (7, True, True)
    assert (await desk.call("ADD", "towpath-bridge", bridge(), container="c2", NETNS=OTHER)).status == 0


async def test_h5_static_addresses_of_every_source_are_honoured(desk: Desk) -> None:
    conf = bridge(ipam=DUAL, args={"cni": {"ips": ["fd00:9::77"]}})
    result = await desk.add("towpath-bridge", conf, ARGS="IP=10.9.0.77")
    assert [ip["address"] for ip in result["ips"]] == ["10.9.0.77/24", "fd00:9::77/64"]
    conf = bridge(runtimeConfig={"ips": ["10.9.0.78/24"]}, ipam=DUAL)
    assert (await desk.add("towpath-bridge", conf, container="c2", NETNS=OTHER))["ips"][0]["address"] == "10.9.0.78/24"


@pytest.mark.parametrize(
    ("args", "cni", "runtime", "want"),
    [
        pytest.param("MAC=02:00:00:00:00:01", None, None, "02:00:00:00:00:01", id="CNI_ARGS"),
        pytest.param(
            "MAC=02:00:00:00:00:01", "02:00:00:00:00:02", None, "02:00:00:00:00:02", id="args win over CNI_ARGS"
        ),
        pytest.param("", "02:00:00:00:00:02", "02-00-00-00-00-0A", "02:00:00:00:00:0a", id="runtimeConfig wins"),
    ],
)
async def test_b13_mac_precedence(desk: Desk, args: str, cni: str | None, runtime: str | None, want: str) -> None:
    conf = bridge(args={"cni": {"mac": cni}}, runtimeConfig={"mac": runtime})
    result = await desk.add("towpath-bridge", conf, ARGS=args)
    assert result["interfaces"][2]["mac"] == want


async def test_names_labels_and_aliases_are_recorded(desk: Desk) -> None:
    labels = [{"key": "VIP_0", "value": "web:80"}]
    conf = bridge(args={"cni": {"labels": labels}}, runtimeConfig={"aliases": {"blue": ["www"]}})
    await desk.add("towpath-bridge", conf, ARGS="IgnoreUnknown=1;K8S_POD_NAME=web-1")
    record = desk.attacher.records[KEY]
    assert (record.name, record.labels, record.aliases) == ("web-1", (("VIP_0", "web:80"),), ("www",))


@pytest.mark.parametrize(
    ("conf", "want"),
    [
        pytest.param({}, {"nameservers": ["192.0.2.53"], "search": ["a.test"], "options": ["ndots:2"]}, id="IPAM's"),
        pytest.param({"dns": {"domain": "b.test"}}, {"domain": "b.test"}, id="the configuration's wins"),
        pytest.param({"dns": {"nameservers": []}}, {}, id="an empty field of the configuration's wins too"),
        pytest.param(
            {"runtimeConfig": {"dns": {"servers": ["1.1.1.1"]}}}, {"nameservers": ["1.1.1.1"]}, id="capability"
        ),
    ],
)
async def test_b18_dns_precedence(desk: Desk, tmp_path: Path, conf: dict[str, Any], want: dict[str, Any]) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("# comment\n; another\nnameserver 192.0.2.53\nsearch a.test\noptions ndots:2\n")
    result = await desk.add("towpath-bridge", bridge(ipam={**SUBNET, "resolvConf": str(resolv)}, **conf))
    assert result["dns"] == want


def test_h9_resolv_conf_is_read_with_comments_and_rubbish() -> None:
    servers = "#nameserver 1.1.1.1\n;x\n\nnameserver\nnameserver 2.2.2.2\nnameserver 3.3.3.3 \n"
    rest = "domain a\nsearch b c\nsearch d\noptions a b\noptions c\nfoo bar"
    assert parse_resolv_conf(servers + rest) == Dns(("2.2.2.2", "3.3.3.3"), "a", ("d",), ("a", "b", "c"))


KEYS = [
    pytest.param({"mtu": 1400}, AddVeth, {"mtu": 1400}, id="mtu"),
    pytest.param({"hairpinMode": True}, AddVeth, {"hairpin": True}, id="B10 hairpin"),
    pytest.param({}, AddVeth, {"hairpin": False}, id="no hairpin unless asked"),
    pytest.param({"portIsolation": True}, AddVeth, {"isolated": True}, id="B19 port isolation"),
    pytest.param({"promiscMode": True}, EnsureBridge, {"promiscuous": True}, id="B9 promiscuous"),
    pytest.param({"vlan": 5}, EnsureBridge, {"vlan_filtering": True}, id="B12 vlan"),
    pytest.param(
        {"enabledad": True, "ipam": DUAL}, AddAddress, {"nodad": True}, id="dad: the bridge's address has none"
    ),
]


@pytest.mark.parametrize(("conf", "kind", "want"), KEYS)
async def test_keys_of_the_reference_reach_the_plan(
    desk: Desk, conf: dict[str, Any], kind: type, want: dict[str, Any]
) -> None:
    await desk.add("towpath-bridge", bridge(**conf))
    op = ops(desk, kind)[0]
    assert {key: getattr(op, key) for key in want} == want


REFUSED = [
    pytest.param({"hairpinMode": True, "promiscMode": True}, 7, "hairpin", id="B9 hairpin and promiscuous"),
    pytest.param({"vlan": 4095}, 7, "vlan 4095", id="B12 vlan out of range"),
    pytest.param({"vlanTrunk": [{"minID": 5, "maxID": 4}]}, 7, "minID 5", id="B12 trunk upside down"),
    pytest.param({"vlanTrunk": [{"minID": 5}]}, 7, "maxID", id="B12 half a trunk"),
    pytest.param({"vlanTrunk": [{"id": 0}]}, 7, "id 0", id="B12 trunk id 0"),
    pytest.param({"vlanTrunk": [{}]}, 7, "vlanTrunk[0]", id="B12 empty trunk"),
    pytest.param({"disableContainerInterface": True}, 7, "disableContainerInterface", id="B20 with ipam"),
    pytest.param({"mtu": "1500"}, 6, 'mtu "1500"', id="mtu is text"),
    pytest.param({"mtu": 10}, 7, "mtu 10", id="mtu too small"),
    pytest.param({"mtu": True}, 6, "mtu true", id="mtu is true"),
    pytest.param({"isGateway": "yes"}, 6, 'isGateway "yes"', id="flag is text"),
    pytest.param({"bridge": "much-too-long-name"}, 7, "much-too-long-name", id="bridge name too long"),
    pytest.param({"bridge": "a/b"}, 7, "a/b", id="bridge name with a slash"),
    pytest.param({"ipMasqBackend": "pf"}, 7, '"pf"', id="unknown masquerade back end"),
    pytest.param({"isolation": "some"}, 7, '"some"', id="unknown isolation"),
    pytest.param({"reserveHostPort": True}, 2, "reserveHostPort: true", id="unsupported field names key and value"),
    pytest.param({"ipam": []}, 6, "ipam []", id="ipam is a list"),
    pytest.param({"ipam": {"subnet": "10.0.0.0/24"}}, 7, "ipam.type", id="ipam without type"),
    pytest.param({"ipam": {"type": "../x"}}, 7, "../x", id="ipam type leads elsewhere"),
    pytest.param({"ipam": {"type": "nothing"}}, 7, "'nothing'", id="ipam type is not in CNI_PATH"),
    pytest.param({"ipam": {"type": "towpath-ipam"}}, 7, "no IP ranges", id="no ranges at all"),
    pytest.param({"ipam": {**SUBNET, "subnet": "10.0.0.1/24"}}, 7, "10.0.0.1/24", id="H10 host bits"),
    pytest.param({"ipam": {**SUBNET, "subnet": "10.0.0.0/31"}}, 7, "10.0.0.0/31", id="H10 too small"),
    pytest.param({"ipam": {**SUBNET, "rangeStart": "10.1.0.1"}}, 7, "10.1.0.1", id="H10 start outside"),
    pytest.param({"ipam": {**SUBNET, "ranges": [[{"subnet": "10.9.0.0/25"}]]}}, 7, "overlaps", id="H10 overlap"),
    pytest.param({"ipam": {**SUBNET, "routes": [{"dst": "x"}]}}, 7, 'dst "x"', id="route to nowhere"),
    pytest.param({"ipam": {**SUBNET, "resolvConf": "/nonexistent"}}, 7, "/nonexistent", id="no such resolvConf"),
    pytest.param({"runtimeConfig": {"ips": ["x"]}}, 7, '"x"', id="static address is none"),
    pytest.param({"runtimeConfig": {"ips": ["10.77.0.1"]}}, 7, "10.77.0.1", id="H5 static address outside"),
    pytest.param({"runtimeConfig": {"ips": ["10.9.0.1"]}}, 7, "10.9.0.1", id="H5 static address is the gateway"),
    pytest.param({"runtimeConfig": {"mac": "01:00:00:00:00:00"}}, 7, "unicast", id="multicast MAC"),
    pytest.param({"runtimeConfig": {"mac": "x"}}, 7, '"x"', id="MAC is none"),
    pytest.param({"runtimeConfig": {"portMappings": {}}}, 6, "portMappings", id="port mappings are no list"),
    pytest.param({"runtimeConfig": {"portMappings": [{**PORT, "hostPort": 0}]}}, 7, "hostPort 0", id="host port 0"),
    pytest.param({"runtimeConfig": {"portMappings": [{**PORT, "hostPort": 70000}]}}, 7, "70000", id="host port 70000"),
    pytest.param({"runtimeConfig": {"portMappings": [{**PORT, "hostPort": "80"}]}}, 6, '"80"', id="host port is text"),
    pytest.param({"runtimeConfig": {"portMappings": [{**PORT, "protocol": "icmp"}]}}, 7, "icmp", id="protocol"),
    pytest.param({"runtimeConfig": {"portMappings": [{**PORT, "hostIP": "x"}]}}, 7, 'hostIP "x"', id="host address"),
    pytest.param(
        {"runtimeConfig": {"portMappings": [PORT]}, "ipam": {}}, 7, "portMappings", id="ports without address"
    ),
    pytest.param({"runtimeConfig": {"bandwidth": {"ingressRate": 5}}}, 7, "ingressBurst", id="BW4 rate without burst"),
    pytest.param({"bandwidth": {"egressBurst": 5}}, 7, "egressRate", id="BW4 burst without rate"),
    pytest.param({"bandwidth": {"egressRate": 1, "egressBurst": 2**35}}, 7, "egressBurst", id="burst of 4 GiB"),
    pytest.param({"markMasqBit": 32}, 7, "markMasqBit 32", id="mark bit"),
    pytest.param({"network": "a b"}, 7, "'a b'", id="row name"),
]


@pytest.mark.parametrize(("conf", "code", "named"), REFUSED)
async def test_a_wrong_value_is_refused_by_key_and_changes_nothing(
    desk: Desk, conf: dict[str, Any], code: int, named: str
) -> None:
    answer = await desk.call("ADD", "towpath-bridge", bridge(**conf))
    assert (answer.code, named in answer.msg) == (code, True), answer.body
    assert (await desk.attacher.store.list("")).items == ()
    assert desk.kernel.log == []


async def test_b16_check_is_silent_after_add_and_speaks_after_each_change(desk: Desk) -> None:
    conf = bridge("0.4.0")
    conf["prevResult"] = await desk.add("towpath-bridge", conf)
    answer = await desk.call("CHECK", "towpath-bridge", conf)
    assert (answer.status, answer.stdout) == (0, b"")
    inside = desk.kernel.netns[NETNS]
    address = next(a for a in inside.addresses if a[0] == "eth0")
    inside.addresses.discard(address)
    answer = await desk.call("CHECK", "towpath-bridge", conf)
    assert (answer.code, "10.9.0.2/24" in answer.msg) == (100, True)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        pytest.param({"ips": []}, "10.9.0.2/24", id="address is not in prevResult"),
        pytest.param({"interfaces": [{"name": "blue0"}] * 3}, "eth0", id="interface is not in prevResult"),
    ],
)
async def test_b16_check_compares_prev_result_too(desk: Desk, damage: dict[str, Any], named: str) -> None:
    conf = bridge()
    conf["prevResult"] = {**(await desk.add("towpath-bridge", conf)), **damage}
    answer = await desk.call("CHECK", "towpath-bridge", conf)
    assert (answer.code, named in answer.msg) == (100, True), answer.body


async def test_check_needs_prev_result_and_knows_whom_it_never_saw(desk: Desk) -> None:
    answer = await desk.call("CHECK", "towpath-bridge", bridge())
    assert (answer.code, "prevResult" in answer.msg) == (7, True)
    assert (await desk.call("CHECK", "towpath-bridge", bridge(prevResult={"ips": []}))).code == 3


GC = [
    pytest.param({}, {"c1", "c2"}, id="no list, no change"),
    pytest.param(
        {"cni.dev/valid-attachments": [{"containerID": "c2", "ifname": "eth0"}]}, {"c2"}, id="only the listed"
    ),
    pytest.param({"cni.dev/attachments": [{"containerID": "c2", "ifname": "eth0"}]}, {"c2"}, id="libcni's old key"),
    pytest.param({"cni.dev/valid-attachments": [{"containerID": "c2", "ifname": "eth1"}]}, set(), id="other interface"),
    pytest.param({"cni.dev/valid-attachments": []}, set(), id="empty list: all"),
    pytest.param({"cni.dev/valid-attachments": None}, set(), id="null: all"),
]


@pytest.mark.parametrize(("conf", "left"), GC)
async def test_gc_keeps_what_the_runtime_lists(desk: Desk, conf: dict[str, Any], left: set[str]) -> None:
    await desk.add("towpath-bridge", bridge("1.1.0"))
    await desk.add("towpath-bridge", bridge("1.1.0"), container="c2", NETNS=OTHER)
    answer = await desk.call("GC", "towpath-bridge", {**bridge("1.1.0"), **conf})
    assert (answer.status, answer.stdout) == (0, b"")
    assert {key.container for key in desk.attacher.records} == left


async def test_gc_spares_other_networks_and_other_callers(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge("1.1.0"))
    other = bridge("1.1.0", name="red", bridge="red0", ipam={"type": "towpath-ipam", "subnet": "10.8.0.0/24"})
    await desk.add("towpath-bridge", other, container="c2", NETNS=OTHER)
    everything: dict[str, Any] = {"cni.dev/valid-attachments": []}
    desk.caller = "/usr/bin/containerd"
    await desk.call("GC", "towpath-bridge", {**bridge("1.1.0"), **everything})
    assert {key.container for key in desk.attacher.records} == {"c1", "c2"}
    desk.caller = "/usr/bin/podman"
    await desk.call("GC", "towpath-bridge", {**bridge("1.1.0"), **everything})
    assert {key.container for key in desk.attacher.records} == {"c2"}


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(7, id="no object"),
        pytest.param({"containerID": "c"}, id="no ifname"),
        pytest.param({"containerID": 1, "ifname": "eth0"}, id="id is a number"),
    ],
)
async def test_gc_with_a_malformed_list_removes_nothing(desk: Desk, item: Any) -> None:
    await desk.add("towpath-bridge", bridge("1.1.0"))
    answer = await desk.call("GC", "towpath-bridge", {**bridge("1.1.0"), "cni.dev/valid-attachments": [item]})
    assert answer.code in (6, 7)
    assert len(desk.attacher.records) == 1


async def test_b24_status_says_50_when_no_address_is_left_and_writes_nothing(desk: Desk) -> None:
    conf = bridge("1.1.0", ipam={"type": "towpath-ipam", "subnet": "10.9.0.0/30"})
    assert (await desk.call("STATUS", "towpath-bridge", conf)).status == 0
    assert desk.attacher.networks.rows == {}
    await desk.add("towpath-bridge", conf)
    answer = await desk.call("STATUS", "towpath-bridge", conf)
    assert (answer.code, "10.9.0.2" in answer.msg) == (50, True)
    refused = await desk.call("ADD", "towpath-bridge", conf, container="c2", NETNS=OTHER)
    assert (refused.code, refused.body["msg"].count("10.9.0.2") > 0) == (11, True)
    await desk.call("DEL", "towpath-bridge", conf)
    assert (await desk.call("STATUS", "towpath-bridge", conf)).status == 0


async def test_status_says_50_where_the_bridge_s_name_is_taken(desk: Desk) -> None:
    desk.kernel.add_link("blue0")
    answer = await desk.call("STATUS", "towpath-bridge", bridge("1.1.0"))
    assert (answer.code, "not a bridge" in answer.msg) == (50, True)
    answer = await desk.call("ADD", "towpath-bridge", bridge("1.1.0"))
    assert (answer.code, "not a bridge" in answer.msg) == (7, True)
    assert await desk.rows() == set()


async def test_capability_ip_ranges_come_before_the_network_s(desk: Desk) -> None:
    conf = bridge(runtimeConfig={"ipRanges": [[{"subnet": "10.7.0.0/24"}]]})
    result = await desk.add("towpath-bridge", conf)
    assert [ip["address"] for ip in result["ips"]] == ["10.7.0.2/24", "10.9.0.2/24"]


# --- host and loopback -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "want"),
    [
        pytest.param(
            "1.0.0", {"interfaces": [], "ips": ["192.0.2.1/24", "198.51.100.1/24", "2001:db8::1/64"]}, id="all"
        ),
        pytest.param("0.2.0", {"ip4": "192.0.2.1/24", "ip6": "2001:db8::1/64"}, id="the first of each family"),
    ],
)
async def test_host_returns_the_node_s_addresses_and_makes_nothing(version: str, want: dict[str, Any]) -> None:
    desk = await make_desk("192.0.2.1/24", "198.51.100.1/24", "2001:db8::1/64")
    conf = {"name": "host", "type": "towpath-host", "cniVersion": version}
    result = await desk.add("towpath-host", conf)
    if version == "1.0.0":
        assert (result["interfaces"], [ip["address"] for ip in result["ips"]]) == (want["interfaces"], want["ips"])
    else:
        assert {key: result[key]["ip"] for key in ("ip4", "ip6")} == want
    assert desk.kernel.log == []
    assert [ip_address("192.0.2.1") in list(r.addresses) for r in desk.attacher.records.values()] == [True]
    assert (await desk.call("DEL", "towpath-host", conf, NETNS="")).status == 0
    assert await desk.rows() == set()


async def test_loopback_is_brought_up_and_down(desk: Desk) -> None:
    conf = {"name": "lo", "type": "towpath-loopback", "cniVersion": "1.0.0"}
    result = await desk.add("towpath-loopback", conf)
    assert result["interfaces"] == [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": NETNS}]
    assert desk.kernel.netns[NETNS].links["lo"].up
    assert (await desk.call("CHECK", "towpath-loopback", {**conf, "prevResult": result})).status == 0
    assert (await desk.call("DEL", "towpath-loopback", conf)).status == 0
    assert not desk.kernel.netns[NETNS].links["lo"].up
    assert (await desk.call("CHECK", "towpath-loopback", {**conf, "prevResult": result})).code == 100
    for netns in ("", "/run/netns/gone"):
        assert (await desk.call("DEL", "towpath-loopback", conf, NETNS=netns)).status == 0
    assert await desk.rows() == set()


async def test_loopback_never_takes_down_the_node_s_own(desk: Desk) -> None:
    desk.kernel.add_netns("/proc/1/ns/net")
    desk.kernel.netns["/proc/1/ns/net"].id = desk.kernel.host.id
    conf = {"name": "lo", "type": "towpath-loopback", "cniVersion": "1.0.0"}
    assert (await desk.call("DEL", "towpath-loopback", conf, NETNS="/proc/1/ns/net")).status == 0
    assert desk.kernel.log == []


async def test_rules_are_one_commit_per_add(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge(ipMasq=True, runtimeConfig={"portMappings": [PORT]}))
    assert len(ops(desk, AddRule)) >= 3
