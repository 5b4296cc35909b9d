"""The bridge plug-in, row by row (B1-B24): what the reference does, and what it should have done."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from integration.callers import addresses, must, variables
from integration.lab import OUTSIDE, OUTSIDE6, UPLINK, Container, Host, links
from integration.networks import REFERENCE, Net, ours, plugin
from integration.sockets import Server, Unreachable, ask, reaches
from integration.traces import picture


def ping(container: Container, address: str) -> bool:
    """One echo, answered within a second."""
    return container.netns.call("/bin/busybox", "ping", "-c", "1", "-W", "1", address).returncode == 0


def default_routes(container: Container) -> list[dict[str, Any]]:
    text = container.netns.run("ip", "-j", "route", "show", "default")
    text6 = container.netns.run("ip", "-6", "-j", "route", "show", "default")
    found: list[dict[str, Any]] = json.loads(text or "[]") + json.loads(text6 or "[]")
    return found


@pytest.mark.row("B1")
def test_the_bridge_is_made_once_and_then_used(net: Net) -> None:
    net.join()
    first = links(net.host.netns)[net.bridge]
    net.join()
    assert first["linkinfo"]["info_kind"] == "bridge"
    assert links(net.host.netns)[net.bridge]["ifindex"] == first["ifindex"]


@pytest.mark.row("B1")
def test_a_bridge_that_somebody_made_is_used(net: Net) -> None:
    net.host.netns.run("ip", "link", "add", net.bridge, "type", "bridge")
    before = links(net.host.netns)[net.bridge]["ifindex"]
    net.join()
    assert links(net.host.netns)[net.bridge]["ifindex"] == before


@pytest.mark.row("B2")
def test_a_name_that_is_no_bridge_is_an_error(net: Net) -> None:
    net.host.netns.run("ip", "link", "add", net.bridge, "type", "veth", "peer", "name", f"{net.bridge}p")
    reply = net.refuse(net.runtime())
    assert "already exists but is not a bridge" in reply.text


@pytest.mark.row("B3")
def test_the_result_names_bridge_veth_and_container_as_the_kernel_does(net: Net) -> None:
    member = net.join()
    bridge, veth, inner = member.result["interfaces"]
    host = links(net.host.netns)
    assert (bridge["name"], bridge["mac"]) == (net.bridge, host[net.bridge]["address"])
    assert veth["mac"] == host[veth["name"]]["address"]
    assert (inner["name"], inner["sandbox"]) == ("eth0", member.container.path)
    assert inner["mac"] == (member.container.link() or {})["address"]
    assert not bridge.get("sandbox")
    assert [ip["interface"] for ip in member.result["ips"]] == [2]


RANGES = [
    pytest.param(("4",), id="B4-v4"),
    pytest.param(("6",), id="B4-v6"),
    pytest.param(("4", "6"), id="B4-dual stack"),
    pytest.param(("4", "6", "6b"), id="B4-v4 and twice v6"),
]


def ranges(net: Net, kinds: tuple[str, ...]) -> list[dict[str, str]]:
    subnets = {"4": net.subnet, "6": net.subnet6, "6b": f"fd01:{net.number}::/64"}
    return [{"subnet": subnets[kind]} for kind in kinds]


@pytest.mark.parametrize("kinds", RANGES)
def test_every_range_gives_one_address(net: Net, kinds: tuple[str, ...]) -> None:
    member = net.join(net.runtime(ipam=net.ipam(*ranges(net, kinds))))
    assert len(member.result["ips"]) == len(kinds)
    assert sorted(ip["address"] for ip in member.result["ips"]) == sorted(member.container.addresses())


@pytest.mark.row("B4")
def test_old_versions_refuse_two_addresses_of_a_family(net: Net) -> None:
    wanted = net.ipam({"subnet": net.subnet}, {"subnet": f"10.{net.number}.9.0/24"})
    reply = net.refuse(net.runtime(ipam=wanted, version="0.2.0"))
    assert "version" in reply.text.lower() or "multiple" in reply.text.lower()


@pytest.mark.row("B5")
@pytest.mark.parametrize(
    ("keys", "routes"),
    [
        pytest.param({"isDefaultGateway": True}, None, id="isDefaultGateway"),
        pytest.param({"isDefaultGateway": False, "isGateway": True}, [{"dst": "0.0.0.0/0"}], id="ipam.routes"),
        pytest.param({"isDefaultGateway": True}, [{"dst": "0.0.0.0/0"}], id="both, once"),
    ],
)
def test_the_default_route_goes_to_the_gateway(net: Net, keys: dict[str, Any], routes: Any) -> None:
    ipam = net.ipam(**({"routes": routes} if routes else {}))
    member = net.join(net.runtime(ipam=ipam, **keys))
    assert [route["gateway"] for route in default_routes(member.container)] == [net.gateway]


@pytest.mark.row("B5")
def test_other_routes_of_the_ipam_section_arrive_too(net: Net) -> None:
    routes = [{"dst": "198.51.100.0/24"}, {"dst": "203.0.113.0/24", "gw": f"10.{net.number}.0.9"}]
    member = net.join(net.runtime(ipam=net.ipam(routes=routes)))
    seen = {r["dst"]: r.get("gateway") for r in json.loads(member.container.netns.run("ip", "-j", "route"))}
    assert seen["198.51.100.0/24"] == net.gateway
    assert seen["203.0.113.0/24"] == f"10.{net.number}.0.9"


@pytest.mark.row("B6")
def test_the_bridge_is_the_gateway_and_forwards(net: Net) -> None:
    net.join(net.runtime(ipam=net.dual()))
    info = links(net.host.netns, "addr")[net.bridge]["addr_info"]
    seen = {f"{a['local']}/{a['prefixlen']}" for a in info}
    assert {f"{net.gateway}/24", f"{net.gateway6}/64"} <= seen
    assert net.host.sysctl("net/ipv4/ip_forward") == "1"
    assert net.host.sysctl("net/ipv6/conf/all/forwarding") == "1"


@pytest.mark.parametrize("kinds", [pytest.param(("4",), id="B7-v4"), pytest.param(("6",), id="B7-v6 alone")])
def test_the_bridge_keeps_its_mac_while_ports_come_and_go(net: Net, kinds: tuple[str, ...]) -> None:
    runtime = net.runtime(ipam=net.ipam(*ranges(net, kinds)))
    net.join(runtime)
    before = links(net.host.netns)[net.bridge]["address"]
    for _ in range(3):
        assert net.join(runtime).leave().ok
    assert links(net.host.netns)[net.bridge]["address"] == before


@pytest.mark.row("B8")
@pytest.mark.parametrize("force", [pytest.param(True, id="forced"), pytest.param(False, id="not forced")])
def test_another_gateway_replaces_the_first_only_where_forced(net: Net, force: bool) -> None:
    net.host.netns.run("ip", "link", "add", net.bridge, "type", "bridge")
    net.host.netns.run("ip", "addr", "add", f"10.{net.number}.77.1/24", "dev", net.bridge)
    runtime = net.runtime(forceAddress=force)
    if force:
        net.join(runtime)
        seen = {a["local"] for a in links(net.host.netns, "addr")[net.bridge]["addr_info"] if a["family"] == "inet"}
        assert seen == {net.gateway}
    else:
        assert "already has an IP address different from" in net.refuse(runtime).text


@pytest.mark.row("B8")
@pytest.mark.parametrize(
    ("there", "well"),
    [pytest.param("fd77::1/64", True, id="distinct v6"), pytest.param("fd00:{}::77/64", False, id="overlapping v6")],
)
def test_a_v6_gateway_beside_another_is_well_where_they_do_not_overlap(net: Net, there: str, well: bool) -> None:
    net.host.netns.run("ip", "link", "add", net.bridge, "type", "bridge")
    net.host.netns.run("ip", "addr", "add", there.format(net.number), "dev", net.bridge, "nodad")
    runtime = net.runtime(ipam=net.ipam({"subnet": net.subnet6}), forceAddress=False)
    if well:
        net.join(runtime)
    else:
        assert "already has an IP address different from" in net.refuse(runtime).text


@pytest.mark.row("B9")
def test_promisc_mode_shows_on_the_bridge(net: Net) -> None:
    net.join(net.runtime(promiscMode=True, hairpinMode=False))
    assert links(net.host.netns)[net.bridge]["promiscuity"] >= 1


@pytest.mark.row("B9")
def test_promisc_and_hairpin_exclude_each_other(net: Net) -> None:
    reply = net.refuse(net.runtime(promiscMode=True, hairpinMode=True))
    assert "hairpin" in reply.text


@pytest.mark.row("B10")
@pytest.mark.parametrize("on", [pytest.param(True, id="on"), pytest.param(False, id="off")])
def test_hairpin_is_a_flag_of_the_host_port(net: Net, on: bool) -> None:
    member = net.join(net.runtime(hairpinMode=on))
    port = links(net.host.netns)[member.veth]["linkinfo"]["info_slave_data"]
    assert port["hairpin"] is on


@pytest.mark.row("B11")
def test_without_ipam_both_ends_are_up_and_nobody_has_an_address(net: Net) -> None:
    member = net.join(net.runtime(ipam={}, isDefaultGateway=False, ipMasq=False))
    assert "ips" not in member.result or member.result["ips"] == []
    assert "UP" in links(net.host.netns)[member.veth]["flags"]
    assert "UP" in (member.container.link() or {})["flags"]
    assert member.container.addresses() == []


def port_vlans(net: Net, port: str) -> list[tuple[int, tuple[str, ...]]]:
    found = json.loads(net.host.netns.run("bridge", "-j", "vlan", "show", "dev", port))
    entries = found[0]["vlans"] if found else []
    out: list[tuple[int, tuple[str, ...]]] = []
    for entry in entries:
        out += [
            (i, tuple(entry.get("flags", ()))) for i in range(entry["vlan"], entry.get("vlanEnd", entry["vlan"]) + 1)
        ]
    return out


L2: dict[str, Any] = {"ipam": {}, "isDefaultGateway": False, "ipMasq": False}
UNTAGGED = ("PVID", "Egress Untagged")


@pytest.fixture(scope="module")
def vlans(host: Host) -> None:
    """The kernel can filter VLANs on a bridge; else the test is skipped and says so."""
    done = host.netns.call("ip", "link", "add", "tbprobe", "type", "bridge", "vlan_filtering", "1")
    host.netns.call("ip", "link", "del", "tbprobe")
    if done.returncode:
        pytest.skip("kernel lacks CONFIG_BRIDGE_VLAN_FILTERING")


@pytest.mark.row("B12")
@pytest.mark.usefixtures("vlans")
def test_a_vlan_is_the_ports_own(net: Net) -> None:
    member = net.join(net.runtime(vlan=100, **L2))
    assert (100, UNTAGGED) in port_vlans(net, member.veth)
    assert links(net.host.netns)[net.bridge]["linkinfo"]["info_data"]["vlan_filtering"] == 1


@pytest.mark.row("B12", reference=False)
@pytest.mark.usefixtures("vlans")
@pytest.mark.parametrize(
    ("keep", "want"),
    [pytest.param(True, True, id="kept"), pytest.param(False, False, id="not kept")],
)
def test_the_default_vlan_stays_only_where_asked(net: Net, keep: bool, want: bool) -> None:
    member = net.join(net.runtime(vlan=100, preserveDefaultVlan=keep, **L2))
    assert (1 in {vlan for vlan, _ in port_vlans(net, member.veth)}) is want


@pytest.mark.row("B12", reference=False)
@pytest.mark.usefixtures("vlans")
def test_a_trunk_carries_its_ranges_tagged(net: Net) -> None:
    trunk = [{"minID": 200, "maxID": 203}, {"id": 300}]
    member = net.join(net.runtime(vlanTrunk=trunk, preserveDefaultVlan=False, **L2))
    assert {vlan for vlan, flags in port_vlans(net, member.veth) if not flags} == {200, 201, 202, 203, 300}


@pytest.mark.row("B12", reference=False)
@pytest.mark.parametrize(
    "trunk",
    [
        pytest.param([{"id": 0}], id="id 0"),
        pytest.param([{"id": 4095}], id="id 4095"),
        pytest.param([{"minID": 10}], id="minID alone"),
        pytest.param([{"minID": 20, "maxID": 10}], id="backwards"),
        pytest.param([{"minID": 10, "maxID": 5000}], id="maxID too large"),
    ],
)
def test_wrong_trunks_are_refused(net: Net, trunk: Any) -> None:
    before = picture(net.host)
    assert net.refuse(net.runtime(vlanTrunk=trunk, **L2)).code == 7
    assert picture(net.host) - before == []


MACS = ["c2:11:22:33:44:01", "c2:11:22:33:44:02", "c2:11:22:33:44:03"]


@pytest.mark.parametrize(
    ("args", "cni_args", "runtime_mac", "want"),
    [
        pytest.param(MACS[0], "", "", MACS[0], id="B13-CNI_ARGS"),
        pytest.param("", MACS[1], "", MACS[1], id="B13-args.cni", marks=ours),
        pytest.param("", "", MACS[2], MACS[2], id="B13-runtimeConfig"),
        pytest.param(MACS[0], MACS[1], "", MACS[1], id="B13-args.cni before CNI_ARGS", marks=ours),
        pytest.param(MACS[0], MACS[1], MACS[2], MACS[2], id="B13-runtimeConfig before all"),
    ],
)
def test_the_mac_comes_from_the_strongest_source(
    net: Net, args: str, cni_args: str, runtime_mac: str, want: str
) -> None:
    keys: dict[str, Any] = {"args": {"cni": {"mac": cni_args}}} if cni_args else {}
    capabilities: dict[str, Any] = {"mac": runtime_mac} if runtime_mac else {}
    member = net.join(net.runtime(**keys), args=f"IgnoreUnknown=1;MAC={args}" if args else "", **capabilities)
    assert (member.container.link() or {})["address"] == want
    assert member.result["interfaces"][2]["mac"] == want


@pytest.mark.row("B14")
def test_an_add_that_fails_after_ipam_gives_the_address_back(net: Net) -> None:
    first = net.join()
    container = net.host.container()
    container.netns.run("ip", "link", "add", "eth0", "type", "bridge")
    before = picture(net.host)
    reply = net.refuse(net.runtime(), container=container)
    assert reply.code
    assert picture(net.host) - before == []
    assert container.link() is not None, "the foreign eth0 stays"
    assert first.address.rsplit(".", 1)[0] == net.join().address.rsplit(".", 1)[0]


VERSIONS = ["0.3.1", "0.4.0", "1.0.0"] + ([] if REFERENCE else ["0.1.0", "0.2.0", "1.1.0"])


@pytest.mark.parametrize("version", [pytest.param(v, id=f"B15-{v}") for v in VERSIONS])
@pytest.mark.parametrize("netns", ["kept", pytest.param("empty", marks=ours), pytest.param("missing", marks=ours)])
def test_del_leaves_nothing_whatever_became_of_the_namespace(net: Net, version: str, netns: str) -> None:
    runtime = net.runtime(version=version, ipam=net.ipam())
    net.join(runtime)  # so that the bridge stays
    before = picture(net.host)
    member = net.join(runtime, portMappings=[{"hostPort": 8000, "containerPort": 80, "protocol": "tcp"}])
    path = {"kept": member.container.path, "empty": "", "missing": "/var/run/netns/tpt-nobody"}[netns]
    if netns == "missing":
        member.container.remove()
    for prev in (version >= "0.4.0", False):
        assert runtime.delete(member.container.id, path, prev=prev).ok
        assert picture(net.host) - before == []


@pytest.mark.row("B15")
def test_del_of_what_was_never_added_is_no_error(net: Net) -> None:
    net.join()
    before = picture(net.host)
    container = net.host.container()
    assert net.runtime().delete(container.id, container.path).ok
    assert net.runtime().delete(container.id, "").ok
    assert picture(net.host) - before == []


def break_veth(net: Net, container: Container, veth: str) -> None:
    net.host.netns.run("ip", "link", "del", veth)


def break_address(net: Net, container: Container, veth: str) -> None:
    container.netns.run("ip", "addr", "flush", "dev", "eth0", "scope", "global")


def break_route(net: Net, container: Container, veth: str) -> None:
    container.netns.run("ip", "route", "del", "default")


def break_master(net: Net, container: Container, veth: str) -> None:
    net.host.netns.run("ip", "link", "set", veth, "nomaster")


def break_bridge(net: Net, container: Container, veth: str) -> None:
    net.host.netns.run("ip", "link", "del", net.bridge)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(break_veth, id="B16-veth gone"),
        pytest.param(break_address, id="B16-address gone"),
        pytest.param(break_route, id="B16-route gone"),
        pytest.param(break_master, id="B16-not on the bridge"),
        pytest.param(break_bridge, id="B16-bridge gone"),
    ],
)
def test_check_finds_the_damage(net: Net, damage: Any) -> None:
    member = net.join()
    path = member.container.path
    reply = member.runtime.check(member.container.id, path)
    assert reply.ok, str(reply)
    damage(net, member.container, member.veth)
    found = member.runtime.check(member.container.id, path)
    # A bridge that went is made again by the agent, and on a slow machine that may be before CHECK has looked.
    mended = damage is break_bridge and links(net.host.netns)[member.veth].get("master") == net.bridge
    assert found.exit == 1 or mended, str(found)


def outside_sees(net: Net, container: Container, address: str) -> str:
    """The source address under which the outside sees this container."""
    server = Server(net.host.outside, "outside", tcp=(9000,))
    try:
        return container.ask(address, 9000).seen_from
    finally:
        server.close()


@pytest.mark.row("B17")
def test_what_leaves_the_subnet_has_the_hosts_address(net: Net) -> None:
    runtime = net.runtime(ipam=net.dual())
    member, sibling = net.join(runtime), net.join(runtime)
    assert outside_sees(net, member.container, OUTSIDE) == UPLINK
    sibling.container.serve(tcp=(80,))
    assert member.container.ask(sibling.address, 80).seen_from == member.address
    assert outside_sees(net, member.container, OUTSIDE6) == "2001:db8::1"


@pytest.mark.row("B17")
def test_without_masquerade_the_address_is_the_containers_own(net: Net) -> None:
    member = net.join(net.runtime(ipMasq=False))
    net.host.outside.run("ip", "route", "add", net.subnet, "via", UPLINK)
    try:
        assert outside_sees(net, member.container, OUTSIDE) == member.address
    finally:
        net.host.outside.run("ip", "route", "del", net.subnet)


MULTICAST = """
import socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("", 5000))
s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("239.1.2.3") + socket.inet_aton(sys.argv[1]))
print("ready", flush=True); print(s.recvfrom(99)[1][0], flush=True)
"""


@pytest.mark.row("B17")
def test_multicast_to_a_sibling_keeps_its_source(net: Net) -> None:
    member, sibling = net.join(), net.join()
    hear = sibling.container.netns.start("python3", "-c", MULTICAST, sibling.address, stdout=subprocess.PIPE)
    assert hear.stdout is not None
    assert hear.stdout.readline() == b"ready\n"
    send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('239.1.2.3', 5000))"
    member.container.netns.run("python3", "-c", send)
    assert hear.communicate(timeout=5)[0].decode().strip() == member.address


@pytest.mark.row("B18")
def test_dns_comes_from_the_resolv_conf_of_the_ipam_section(net: Net) -> None:
    file = net.host.folder / f"resolv-{net.number}"
    file.write_text(
        "# ours\nnameserver 192.0.2.53 \nsearch a.example b.example\n; old\noptions ndots:2\ndomain c.example\n"
    )
    member = net.join(net.runtime(ipam=net.ipam(resolvConf=str(file))))
    want = {"nameservers": ["192.0.2.53"], "search": ["a.example", "b.example"], "options": ["ndots:2"]}
    assert {key: member.result["dns"][key] for key in want} == want
    assert member.result["dns"]["domain"] == "c.example"


@pytest.mark.row("B18")
def test_dns_of_the_configuration_wins(net: Net) -> None:
    file = net.host.folder / f"resolv-{net.number}"
    file.write_text("nameserver 192.0.2.53\n")
    member = net.join(net.runtime(ipam=net.ipam(resolvConf=str(file)), dns={"nameservers": ["198.51.100.1"]}))
    assert member.result["dns"] == {"nameservers": ["198.51.100.1"]}


@pytest.mark.row("B19", reference=False)
def test_isolated_ports_reach_the_gateway_and_not_each_other(net: Net) -> None:
    runtime = net.runtime(portIsolation=True)
    one, two = net.join(runtime), net.join(runtime)
    assert ping(one.container, net.gateway)
    assert ping(two.container, net.gateway)
    assert not ping(one.container, two.address)


@pytest.mark.row("B20", reference=False)
def test_a_disabled_interface_stays_down(net: Net) -> None:
    member = net.join(net.runtime(disableContainerInterface=True, **L2))
    assert "UP" not in (member.container.link() or {})["flags"]


@pytest.mark.row("B20", reference=False)
def test_a_disabled_interface_cannot_have_ipam(net: Net) -> None:
    reply = net.refuse(net.runtime(disableContainerInterface=True))
    assert "ipam" in reply.text.lower()


@pytest.mark.row("B21", reference=False)
def test_frames_with_a_forged_mac_are_dropped(net: Net) -> None:
    member = net.join(net.runtime(macspoofchk=True))
    assert ping(member.container, net.gateway)
    member.container.netns.run("ip", "link", "set", "eth0", "address", "02:00:00:00:be:ef")
    assert not ping(member.container, net.gateway)


@pytest.mark.row("B22", reference=False)
def test_sixteen_at_once_on_a_fresh_host_all_get_an_address_of_their_own(make_host: Any) -> None:
    host = Host(firewall="nftables")
    try:
        host.start()
        net = Net(host, 250)
        before = picture(host)
        runtime = net.runtime()
        held = [host.container() for _ in range(16)]
        with ThreadPoolExecutor(16) as pool:
            replies = list(pool.map(lambda c: runtime.add(c.id, c.path), held))
        assert len({addresses(must(reply))[0] for reply in replies}) == 16
        with ThreadPoolExecutor(16) as pool:
            assert all(reply.ok for reply in pool.map(lambda c: runtime.delete(c.id, c.path), held))
        net.close()
        left = [line for line in picture(host) - before if not line.startswith("+ nft inet towpath ")]
        assert left == []
    finally:
        host.close()


@pytest.mark.row("B23")
def test_a_v6_address_serves_at_once(net: Net) -> None:
    member = net.join(net.runtime(ipam=net.dual()))
    info = links(member.container.netns, "addr")["eth0"]["addr_info"]
    assert [a for a in info if a.get("tentative") and a["scope"] == "global"] == []
    member.container.serve(tcp=(80,))
    assert ask(net.host.netns, member.addresses[1], 80).server == member.container.id


@pytest.mark.row("B24", reference=False)
def test_status_says_when_the_addresses_are_used_up(net: Net) -> None:
    small = net.ipam({"subnet": net.subnet, "rangeStart": f"10.{net.number}.0.2", "rangeEnd": f"10.{net.number}.0.3"})
    runtime = net.runtime(version="1.1.0", ipam=small)
    net.join(runtime)
    assert runtime.status().ok
    last = net.join(runtime)
    assert runtime.status().code == 50
    assert last.leave().ok
    assert runtime.status().ok


@pytest.mark.row("B24", reference=False)
def test_status_passes_on_what_a_foreign_ipam_says(net: Net) -> None:
    folder = net.host.folder / f"ipam-{net.number}"
    folder.mkdir()
    fake = folder / "sulky"
    fake.write_text('#!/bin/sh\ncat >/dev/null\necho \'{"cniVersion":"1.1.0","code":50,"msg":"no mood"}\'\nexit 1\n')
    fake.chmod(0o755)
    runtime = net.runtime(version="1.1.0", ipam={"type": "sulky"})
    runtime.run = net.host.exec(str(net.host.bin), str(folder))
    reply = runtime.status()
    assert (reply.code, "no mood" in reply.text) == (50, True)


@pytest.mark.row("C-DEL", reference=False)
def test_del_without_a_result_or_a_namespace_forgets_everything(net: Net) -> None:
    """containerd's ctr deletes with an empty CNI_NETNS: the reference leaks its masquerade chain each time."""
    net.join()
    before = picture(net.host)
    for _ in range(5):
        member = net.join()
        member.container.remove()
        env = variables("DEL", member.container.id, "", "eth0")
        stdin = json.dumps(net.runtime().config(net.wire(), {}, {})).encode()
        assert net.host.exec()(plugin("bridge"), env, stdin).ok
    assert picture(net.host) - before == []


@pytest.mark.row("open")
def test_siblings_of_other_networks_meet_where_the_policy_is_open(net: Net) -> None:
    member, sibling = net.join(), net.join()
    sibling.container.serve(tcp=(80,))
    assert reaches(member.container.netns, sibling.address, 80)
    with pytest.raises(Unreachable):
        ask(member.container.netns, sibling.address, 81, wait=0.3)


@ours
def test_the_gc_of_one_network_leaves_the_bridge_that_another_one_shares(net: Net) -> None:
    first = net.runtime(ipam=net.ipam({"subnet": net.subnet, "rangeEnd": f"10.{net.number}.0.99"}), version="1.1.0")
    second = net.runtime(ipam=net.ipam({"subnet": net.subnet, "rangeStart": f"10.{net.number}.0.100"}))
    second.name = f"{net.name}b"
    gone, stays = net.join(first), net.join(second)
    assert gone.leave().ok
    assert first.gc([]).ok
    assert net.name not in {row["name"] for row in net.host.agent.get("/v1/networks")}
    stays.container.serve(tcp=(80,))
    assert ask(net.host.netns, stays.address, 80).server == stays.container.id
    assert stays.leave().ok
    net.host.agent.forget(second.name)


@ours
def test_an_unused_network_that_moves_to_another_bridge_is_reached_there(net: Net) -> None:
    assert net.join().leave().ok
    member = net.join(net.runtime(bridge=f"{net.bridge}x"))
    member.container.serve(tcp=(80,))
    assert ask(net.host.netns, member.address, 80).server == member.container.id
    assert net.bridge not in links(net.host.netns)
    assert member.leave().ok
    net.host.agent.forget(net.name)
