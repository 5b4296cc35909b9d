"""Links, addresses, routes and settings as a true kernel takes them, in namespaces that die with the test."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.box import Box, box
from towpath.errors import BadNetns, PhaseFailed
from towpath.kernel import inet, links, sysctl
from towpath.kernel.netns import inside, open_netns
from towpath.model import Route
from towpath.plan import (
    AddAddress,
    AddRoute,
    AddVeth,
    Announce,
    DropAddress,
    DropLink,
    EnsureBridge,
    ForgetNeighbours,
    Op,
    Phase,
    PortVlans,
    SetLink,
    Sysctl,
)

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

BRIDGE_MAC, MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
BRIDGE = EnsureBridge("br-t", BRIDGE_MAC, mtu=1400)
GATEWAYS = (AddAddress("br-t", ip_interface("10.9.0.1/24")), AddAddress("br-t", ip_interface("fd09::1/64")))
DEFAULT4 = Route(ip_network("0.0.0.0/0"), ip_address("10.9.0.1"), mtu=1300, advmss=1200, priority=7)
DEFAULT6 = Route(ip_network("::/0"), ip_address("fd09::1"))
INSIDE: tuple[Op, ...] = (
    SetLink("lo", up=True),
    AddAddress("eth0", ip_interface("10.9.0.2/24")),
    AddAddress("eth0", ip_interface("fd09::2/64")),
    SetLink("eth0", up=True),
    AddRoute("eth0", DEFAULT4),
    AddRoute("eth0", DEFAULT6),
    AddRoute("eth0", Route(ip_network("10.77.0.0/16"))),
)


@pytest.fixture
def host() -> Iterator[Box]:
    with box() as made:
        yield made


def veth(host: Box, container: int = 0, **more: Any) -> AddVeth:
    mac = f"02:00:00:00:01:{container:02x}"
    return AddVeth(f"tp{container}", "eth0", host.paths[container], mac, master="br-t", mtu=1400, **more)


def wire(host: Box) -> None:
    """A container on a bridge, in both families."""
    host.apply((Phase("host", (BRIDGE, *GATEWAYS, veth(host))), Phase("netns", INSIDE, host.paths[0])))


def by_pyroute2(host: Box, container: int = -1) -> dict[str, Any]:
    """What another implementation of netlink reads in a namespace."""

    def read() -> dict[str, Any]:
        from pyroute2 import IPRoute

        with IPRoute() as ip:
            found = list(ip.get_links())
            names = {link["index"]: link.get("IFLA_IFNAME") for link in found}
            return {
                "links": {
                    link.get("IFLA_IFNAME"): (
                        (link.get("IFLA_LINKINFO") or {}).get("IFLA_INFO_KIND") or "",
                        link.get("IFLA_ADDRESS"),
                        link.get("IFLA_MTU"),
                        bool(link["flags"] & 1),
                        names.get(link.get("IFLA_MASTER"), ""),
                        link.get("IFLA_IFALIAS") or "",
                        link.get("IFLA_LINK") or 0,
                        link.get("IFLA_TXQLEN"),
                    )
                    for link in found
                },
                "addresses": {
                    (names[a["index"]], f"{a.get('IFA_LOCAL') or a.get('IFA_ADDRESS')}/{a['prefixlen']}")
                    for a in ip.get_addr()
                },
                "routes": {
                    (names[r.get("RTA_OIF")], r.get("RTA_DST"), r["dst_len"], r.get("RTA_GATEWAY"), r["proto"])
                    for version in (socket.AF_INET, socket.AF_INET6)
                    for r in ip.get_routes(family=version, table=254)
                },
            }

    if container < 0:
        return host.inside(read)

    def there() -> dict[str, Any]:
        home, fd = open_netns("/proc/thread-self/ns/net"), open_netns(host.paths[container])
        try:
            with inside(fd, home):
                return read()
        finally:
            os.close(fd)
            os.close(home)

    return host.inside(there)


# --- the batch against pyroute2's reading -----------------------------------------------------------------------------


def test_a_wire_is_what_pyroute2_reads(host: Box) -> None:
    wire(host)
    outside, within = by_pyroute2(host), by_pyroute2(host, 0)
    assert outside["links"]["br-t"][:6] == ("bridge", BRIDGE_MAC, 1400, True, "", links.ALIAS)
    kind, _, mtu, up, master, alias, *_ = outside["links"]["tp0"]
    assert (kind, mtu, up, master, alias) == ("veth", 1400, True, "br-t", links.ALIAS)
    assert within["links"]["eth0"][:4] == ("veth", "02:00:00:00:01:00", 1400, True)
    assert within["links"]["lo"][3]
    assert {("eth0", "10.9.0.2/24"), ("eth0", "fd09::2/64")} <= within["addresses"]
    ours = {route[:4] for route in within["routes"] if route[4] == inet.ROUTE_PROTOCOL}
    assert ours == {
        ("eth0", None, 0, "10.9.0.1"),
        ("eth0", None, 0, "fd09::1"),
        ("eth0", "10.77.0.0", 16, None),
    }


@pytest.mark.parametrize("container", [pytest.param(-1, id="host"), pytest.param(0, id="container")])
def test_look_sees_what_pyroute2_reads(host: Box, container: int) -> None:
    wire(host)
    path = "" if container < 0 else host.paths[container]
    seen, other = host.wait(lambda: host.kernel.look(path)), by_pyroute2(host, container)
    while (again := host.wait(lambda: host.kernel.look(path))) != seen:
        # IPv6 link-local addresses appear in the kernel's own time: compare readings between which nothing moved.
        seen, other = again, by_pyroute2(host, container)
    assert {
        k.name: (k.kind, k.mac, k.mtu, k.up, k.master, k.alias, k.peer_index, k.tx_queue) for k in seen.links
    } == other["links"]
    assert {(name, str(address)) for name, address in seen.addresses} == other["addresses"]
    routes = {(name, r.dst.prefixlen, str(r.gw) if r.gw else None) for name, r in seen.routes}
    assert routes == {(name, bits, gw) for name, _, bits, gw, _ in other["routes"] if name != "lo"}


def test_a_route_of_ours_reads_back_as_it_was_asked(host: Box) -> None:
    wire(host)
    seen = host.wait(lambda: host.kernel.look(host.paths[0]))
    wanted = {("eth0", op.route) for op in INSIDE if isinstance(op, AddRoute)}
    assert wanted <= set(seen.routes)


def test_link_finds_one_with_its_master_and_none_that_is_not_there(host: Box) -> None:
    wire(host)
    link = host.wait(lambda: host.kernel.link("tp0"))
    assert link is not None
    assert (link.kind, link.master, link.alias) == ("veth", "br-t", links.ALIAS)
    assert host.wait(lambda: host.kernel.link("nope")) is None
    assert host.wait(lambda: host.kernel.link("eth0", host.paths[1])) is None


def test_the_way_to_an_address_is_found(host: Box) -> None:
    wire(host)

    def way(address: str) -> str:
        return host.wait(lambda: host.kernel.route_device(ip_address(address)))

    assert [way(address) for address in ("10.9.0.7", "fd09::7", "10.8.0.1")] == ["br-t", "br-t", ""]


# --- what is done twice, what is refused ------------------------------------------------------------------------------


def test_everything_but_a_veth_may_be_done_twice(host: Box) -> None:
    wire(host)
    before = host.wait(lambda: host.kernel.look(host.paths[0]))
    host.apply((Phase("host", (BRIDGE, *GATEWAYS)), Phase("netns", INSIDE, host.paths[0])))
    assert host.wait(lambda: host.kernel.look(host.paths[0])) == before
    drops = (DropAddress("eth0", ip_interface("10.9.0.2/24")), DropAddress("nope", ip_interface("10.9.0.2/24")))
    host.do(*drops, *drops, container=0)
    host.do(DropLink("tp0"), DropLink("tp0"), DropLink("br-t"))
    host.do(DropLink("tp0"), ForgetNeighbours("br-t", (ip_address("10.9.0.2"),)))
    host.do(DropLink("eth0"), container=0)
    assert [k.name for k in host.wait(lambda: host.kernel.look()).links] == ["lo"]
    assert [k.name for k in host.wait(lambda: host.kernel.look(host.paths[0])).links] == ["lo"]


@pytest.mark.parametrize(
    ("ops", "number", "words"),
    [
        pytest.param(lambda h: [veth(h)], errno.EEXIST, '"tp0" already exists', id="host name taken"),
        pytest.param(
            lambda h: [AddVeth("tp9", "eth0", h.paths[0], MAC)], errno.EEXIST, '"eth0" in ', id="peer name taken"
        ),
        pytest.param(
            lambda h: [AddVeth("tp9", "eth1", h.paths[0], MAC, master="nope")], errno.ENODEV, "nope", id="no master"
        ),
        pytest.param(
            lambda h: [EnsureBridge("tp0", MAC)],
            errno.EEXIST,
            '"tp0" already exists but is not a bridge',
            id="a bridge's name held by another kind (B2)",
        ),
        pytest.param(lambda h: [SetLink("nope", up=True)], errno.ENODEV, "", id="no such link"),
        pytest.param(lambda h: [AddAddress("nope", GATEWAYS[0].address)], errno.ENODEV, "nope", id="no link for it"),
        pytest.param(
            lambda h: [AddRoute("br-t", Route(ip_network("10.1.0.0/16"), ip_address("10.2.0.1")))],
            errno.ENETUNREACH,
            "gateway",
            id="gateway out of reach",
        ),
        pytest.param(lambda h: [Sysctl("net/ipv4/nope", "1")], errno.ENOENT, "", id="no such setting"),
        pytest.param(lambda h: [Sysctl("net/ipv4/ip_forward", "x")], errno.EINVAL, "", id="no such value"),
        pytest.param(lambda h: [DropLink("lo")], errno.EOPNOTSUPP, "", id="a link that cannot go"),
    ],
)
def test_the_kernel_refuses(host: Box, ops: Callable[[Box], list[Op]], number: int, words: str) -> None:
    wire(host)
    before = lasting(by_pyroute2(host))
    with pytest.raises(PhaseFailed) as failure:
        host.do(*ops(host))
    assert failure.value.errno == number
    assert words in failure.value.what
    assert lasting(by_pyroute2(host)) == before


def lasting(seen: dict[str, Any]) -> dict[str, Any]:
    """Without IPv6 link-local addresses and their routes, which appear in the kernel's own time."""
    addresses = {pair for pair in seen["addresses"] if not pair[1].startswith("fe80:")}
    return {
        **seen,
        "addresses": addresses,
        "routes": {r for r in seen["routes"] if not (r[1] or "").startswith("fe80:")},
    }


def test_a_missing_optional_setting_is_passed_over(host: Box) -> None:
    host.do(Sysctl("net/ipv4/nope", "1", optional=True))


@pytest.mark.parametrize(
    "path", [pytest.param("/run/netns/tpt-nope", id="gone"), pytest.param("/etc/hosts", id="file")]
)
def test_a_namespace_that_is_none_is_refused_or_tolerated(host: Box, path: str) -> None:
    with pytest.raises(BadNetns, match=path):
        host.apply((Phase("netns", (SetLink("lo", up=True),), path),))
    with pytest.raises(BadNetns, match=path):
        host.do(AddVeth("tp0", "eth0", path, MAC))
    host.apply((Phase("netns", (DropLink("eth0"),), path, tolerant=True), Phase("host", (BRIDGE,))))
    assert host.wait(lambda: host.kernel.link("br-t")) is not None
    assert host.kernel.netns_id(path) == 0


def test_a_thread_comes_home_after_a_failure(host: Box) -> None:
    for _ in range(6):  # more than there are threads
        with pytest.raises(PhaseFailed):
            host.do(Sysctl("net/ipv4/nope", "1"), container=0)
    host.do(Sysctl("net/ipv4/ip_forward", "1"))
    assert host.wait(lambda: host.kernel.sysctl("net/ipv4/ip_forward")) == "1"
    assert host.wait(lambda: host.kernel.sysctl("net/ipv4/ip_forward", host.paths[0])) == "0"
    assert host.kernel.own_netns_id() == host.kernel.netns_id(f"/run/netns/{host.host}")


# --- single properties ------------------------------------------------------------------------------------------------


def test_a_bridge_that_exists_keeps_its_mac_and_its_owner(host: Box) -> None:
    host.run("ip", "link", "add", "br-t", "address", "02:00:00:00:00:99", "type", "bridge")
    index = host.json("ip", "-j", "link", "show", "br-t")[0]["ifindex"]
    host.do(EnsureBridge("br-t", BRIDGE_MAC, promiscuous=True))
    link = host.wait(lambda: host.kernel.link("br-t"))
    assert link is not None
    assert (link.index, link.mac, link.up, link.promiscuous, link.alias) == (index, "02:00:00:00:00:99", True, True, "")


def test_a_bridge_keeps_its_mac_when_ports_come_and_go(host: Box) -> None:
    host.do(BRIDGE)
    for mac in ("00:00:00:00:00:05", "02:00:00:00:00:06"):
        host.do(AddVeth("tp0", "eth0", host.paths[0], mac, master="br-t"))
        host.do(SetLink("tp0", mac="00:00:00:00:00:07"))
        link = host.wait(lambda: host.kernel.link("br-t"))
        assert link is not None
        assert link.mac == BRIDGE_MAC
        host.do(DropLink("tp0"))


@pytest.mark.parametrize("hairpin", [False, True])
@pytest.mark.parametrize("isolated", [False, True])
def test_a_port_has_the_flags_that_were_asked(host: Box, hairpin: bool, isolated: bool) -> None:
    host.do(BRIDGE, veth(host, hairpin=hairpin, isolated=isolated))
    (port,) = host.json("bridge", "-d", "-j", "link", "show", "dev", "tp0")
    assert (port["hairpin"], port["isolated"]) == (hairpin, isolated)


def test_set_link_changes_what_is_named_and_nothing_else(host: Box) -> None:
    wire(host)
    host.do(SetLink("eth0", mac=MAC, mtu=1280, promiscuous=True, allmulti=True, tx_queue=77), container=0)
    link = host.wait(lambda: host.kernel.link("eth0", host.paths[0]))
    assert link is not None
    assert (link.mac, link.mtu, link.promiscuous, link.allmulti, link.tx_queue) == (MAC, 1280, True, True, 77)
    assert link.up
    host.do(SetLink("eth0", promiscuous=False, up=False), container=0)
    link = host.wait(lambda: host.kernel.link("eth0", host.paths[0]))
    assert link is not None
    assert (link.up, link.promiscuous, link.allmulti) == (False, False, True)
    host.do(SetLink("tp0", master=""))
    freed = host.wait(lambda: host.kernel.link("tp0"))
    assert freed is not None
    assert freed.master == ""


def test_an_ipv6_address_works_at_once(host: Box) -> None:
    """B23: it is not tentative when the plan is done."""
    wire(host)
    (link,) = host.json("ip", "-6", "-j", "addr", "show", "dev", "eth0", "scope", "global", container=0)
    assert "tentative" not in str(link)
    assert "nodad" in str(link)


def test_a_gateway_outside_of_a_host_address_is_on_link(host: Box) -> None:
    host.do(BRIDGE, veth(host))
    ops: list[Op] = [SetLink("eth0", up=True)]
    for address, subnet, gateway in (("10.5.0.9/32", "0.0.0.0/0", "169.254.1.1"), ("fd05::9/128", "::/0", "fd99::1")):
        ops.append(AddAddress("eth0", ip_interface(address)))
        ops.append(AddRoute("eth0", Route(ip_network(subnet), ip_address(gateway))))
    host.do(*ops, container=0)
    routes = dict(host.wait(lambda: host.kernel.look(host.paths[0])).routes[::-1])
    assert routes
    assert {r.gw for _, r in host.wait(lambda: host.kernel.look(host.paths[0])).routes if r.gw} == {
        ip_address("169.254.1.1"),
        ip_address("fd99::1"),
    }


def test_a_route_may_name_table_scope_and_a_gateway_of_the_other_family(host: Box) -> None:
    wire(host)
    via6 = Route(ip_network("10.60.0.0/16"), ip_address("fd09::1"))
    host.do(
        AddRoute("eth0", via6),
        AddRoute("eth0", Route(ip_network("10.61.0.0/16"), ip_address("10.9.0.1"), table=1000)),
        AddRoute("eth0", Route(ip_network("10.62.0.1/32"), scope=253)),
        container=0,
    )
    assert ("eth0", via6) in host.wait(lambda: host.kernel.look(host.paths[0])).routes
    (other,) = host.json("ip", "-j", "route", "show", "table", "1000", container=0)
    assert (other["dst"], other["gateway"]) == ("10.61.0.0/16", "10.9.0.1")


def test_neighbours_are_forgotten(host: Box) -> None:
    wire(host)
    for address in ("10.9.0.2", "fd09::2"):
        host.run("ip", "neigh", "replace", address, "lladdr", MAC, "dev", "br-t", "nud", "reachable")
    host.do(ForgetNeighbours("br-t", (ip_address("10.9.0.2"), ip_address("fd09::2"), ip_address("10.9.0.3"))))
    assert MAC not in host.run("ip", "neigh", "show", "dev", "br-t", "nud", "reachable")


def test_vlans_of_a_port(host: Box) -> None:
    try:
        host.do(EnsureBridge("br-t", BRIDGE_MAC, vlan_filtering=True))
    except PhaseFailed as refusal:
        pytest.skip(f"this kernel has no VLAN filtering on bridges (CONFIG_BRIDGE_VLAN_FILTERING): {refusal}")
    host.do(veth(host), PortVlans("tp0", pvid=10, keep_default=False))
    (port,) = host.json("bridge", "-j", "vlan", "show", "dev", "tp0")
    assert [vlan["vlan"] for vlan in port["vlans"]] == [10]


# --- announcements --------------------------------------------------------------------------------------------------


def neighbours(host: Box, container: int) -> dict[str, str]:
    found = host.json("ip", "-j", "neigh", "show", "dev", "eth0", container=container)
    return {entry["dst"]: entry.get("lladdr", "") for entry in found}


def test_an_address_that_moved_is_announced_to_the_neighbours_in_both_families(host: Box) -> None:
    """Stale entries of a sibling take the new MAC although the container itself never says a word."""
    wire(host)
    host.do(veth(host, 1))
    host.do(
        SetLink("eth0", up=True),
        AddAddress("eth0", ip_interface("10.9.0.3/24")),
        AddAddress("eth0", ip_interface("fd09::3/64")),
        container=1,
    )
    addresses = ("10.9.0.2", "fd09::2")
    for address in addresses:
        host.run("ip", "neigh", "replace", address, "lladdr", MAC, "dev", "eth0", "nud", "stale", container=1)
    announce = Announce("eth0", "02:00:00:00:01:00", tuple(map(ip_address, addresses)))
    host.do(DropLink("tp0"))
    host.apply((Phase("host", (veth(host),)), Phase("netns", (*INSIDE, announce), host.paths[0])))
    deadline = time.monotonic() + 3
    while MAC in (held := neighbours(host, 1)).values() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {address: held.get(address) for address in addresses} == dict.fromkeys(addresses, "02:00:00:00:01:00")


def test_an_announcement_that_cannot_be_made_fails_nothing(host: Box) -> None:
    host.do(Announce("nope", MAC, (ip_address("10.9.0.2"),)))


# --- settings where /proc/sys is read-only ---------------------------------------------------------------------------

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, CLONE_NEWNS = 1, 32, 4096, 16384, 1 << 18, 0x20000


def test_a_read_only_proc_sys_is_no_obstacle(host: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysctl, "_private", [])
    libc = ctypes.CDLL(None, use_errno=True)

    def write() -> str:
        fd = open_netns(host.paths[0])
        assert libc.setns(fd, 0) == 0  # this thread is not used again
        assert libc.unshare(CLONE_NEWNS) == 0
        assert libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
        assert libc.mount(b"/proc/sys", b"/proc/sys", None, MS_BIND, None) == 0
        assert libc.mount(None, b"/proc/sys", None, MS_BIND | MS_REMOUNT | MS_RDONLY, None) == 0
        with pytest.raises(OSError, match="Read-only"):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        sysctl.write("net/ipv4/ip_forward", "1")
        os.close(fd)
        return sysctl.read("net/ipv4/ip_forward") or ""

    assert in_a_thread(write) == "1"
    assert host.run("cat", "/proc/sys/net/ipv4/ip_forward", container=0).strip() == "1"
    os.close(sysctl._private[0])


def in_a_thread(function: Callable[[], str]) -> str:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()
