"""Three hosts of one cluster: containers reach each other and the hosts across nodes, and the tables stay true."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest

from tests.kernel.box import box
from tests.netns.firewall_lab import HOST, QUIET
from tests.netns.overlay_lab import SIX, Cluster, Host, overlay_lab, plug_in
from towpath.overlay.cluster import join, leave
from towpath.plan import AddRule, DropRule, Peer, Phase

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

FAMILIES = [pytest.param(4, id="IPv4"), pytest.param(6, id="IPv6")]
PAIRS = [(a, b) for a in range(3) for b in range(3) if a != b]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with overlay_lab() as made:
        for host in made.hosts:
            host.attach(0)
            host.attach(1, "web")
            host.net.serve(0, 81, kind="udp", name=f"h{host.number}c0")
        yield made


def matches(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def hop(host: Host, destination: str, *more: str) -> str:
    """How the host's kernel routes a packet: `ip route get`."""
    return host.box.run("ip", "route", "get", destination, *more, check=False)


@pytest.mark.parametrize("version", FAMILIES)
def test_containers_reach_containers_of_every_node_by_their_own_addresses(cluster: Cluster, version: int) -> None:
    for a, b in PAIRS:
        here, there = cluster.hosts[a], cluster.hosts[b]
        answer = here.net.ask(0, there.address(0, version), 80)
        assert answer == f"h{b}c0 {here.address(0, version)}", f"from host {a} to host {b}"


@pytest.mark.parametrize("version", FAMILIES)
def test_nothing_is_masqueraded_between_overlays(cluster: Cluster, version: int) -> None:
    first, second = cluster.hosts[:2]
    for there in (first, second):
        answer = first.net.ask(0, there.address(1, version, "web"), 80)
        assert answer == f"h{there.number}c1 {first.address(0, version)}"


@pytest.mark.parametrize("version", FAMILIES)
def test_containers_reach_other_hosts_own_addresses_through_the_tunnel(cluster: Cluster, version: int) -> None:
    for a, b in PAIRS:
        here, there = cluster.hosts[a], cluster.hosts[b]
        assert here.net.ask(0, there.own(version), 80) == f"h{b} {here.address(0, version)}"
    first, second = cluster.hosts[:2]
    way = hop(first, second.own(version), "from", first.address(0, version), "iif", "m-dcos")
    assert "dev vtep1024" in way
    assert "dev eth0" in hop(first, second.own(version)), "the host itself takes the underlay"


@pytest.mark.parametrize("version", FAMILIES)
def test_hosts_reach_containers_of_every_node(cluster: Cluster, version: int) -> None:
    for a, b in PAIRS:
        here, there = cluster.hosts[a], cluster.hosts[b]
        answer = here.net.ask(HOST, there.address(0, version), 80)
        vtep = here.tunnel.state.own.vtep if here.tunnel.state else None
        assert vtep is not None
        interface = vtep.of(version)
        assert interface is not None
        assert answer == f"h{b}c0 {interface.ip}"


@pytest.mark.parametrize("version", FAMILIES)
def test_a_container_reaches_its_own_host(cluster: Cluster, version: int) -> None:
    first = cluster.hosts[0]
    assert first.net.ask(0, first.own(version), 80) == f"h0 {first.address(0, version)}"


def test_addresses_and_blocks_are_those_of_dcos(cluster: Cluster) -> None:
    second = cluster.hosts[1]
    assert second.address(0, 4) == "9.0.1.2"
    assert second.address(0, 6) == "fd01:b::1:0:0:2"
    link = second.box.json("ip", "-j", "-d", "link", "show", "vtep1024")[0]
    assert link["address"] == "70:b3:d5:80:00:02"
    assert link["mtu"] == 1450
    assert (link["linkinfo"]["info_data"]["id"], link["linkinfo"]["info_data"]["port"]) == (1024, 64000)
    bridge = second.box.json("ip", "-j", "address", "show", "m-dcos")[0]
    held = {f"{a['local']}/{a['prefixlen']}" for a in bridge["addr_info"] if a["scope"] == "global"}
    assert held == {"9.0.1.1/25", "fd01:b::1:0:0:1/81"}
    assert bridge["mtu"] == 1450


@pytest.mark.parametrize(
    ("version", "header", "level", "option"),
    [
        pytest.param(4, 28, socket.IPPROTO_IP, 10, id="IPv4"),
        pytest.param(6, 48, socket.IPPROTO_IPV6, 23, id="IPv6"),
    ],
)
def test_the_largest_packets_pass_whole(cluster: Cluster, version: int, header: int, level: int, option: int) -> None:
    """option: IP_MTU_DISCOVER and IPV6_MTU_DISCOVER (linux/in.h, in6.h), 2 = never fragment."""
    first, second = cluster.hosts[:2]
    with first.net.client(0, second.address(0, version), "udp") as sock:
        sock.setsockopt(level, option, 2)
        sock.connect((second.address(0, version), 81))
        with pytest.raises(OSError, match="too long"):
            sock.send(b"x" * (1450 - header + 1))
        sock.send(b"x" * (1450 - header))
        assert sock.recv(100) == f"h1c0 {first.address(0, version)}".encode()


def test_foreign_entries_heal_and_removed_ones_come_back(cluster: Cluster) -> None:
    first, second = cluster.hosts[:2]
    assert first.heal() == 0
    run = first.box.run
    run("ip", "route", "replace", "9.0.1.0/24", "via", "10.0.0.3")
    run("ip", "-6", "route", "del", "fd01:b:0:0:1::/80")
    run("ip", "route", "flush", "table", "42")
    run("ip", "rule", "del", "from", "9.0.0.0/8", "lookup", "42")
    run("ip", "neigh", "del", "fd01:a::2", "dev", "vtep1024")
    run("bridge", "fdb", "replace", "70:b3:d5:80:00:02", "dev", "vtep1024", "dst", "10.0.0.77")
    run("bridge", "fdb", "add", "02:00:00:00:00:99", "dev", "vtep1024", "dst", "10.0.0.66")
    assert first.heal() >= 8
    assert first.heal() == 0
    assert "dev vtep1024" in hop(first, "9.0.1.2")
    for version in (4, 6):
        assert first.net.ask(0, second.address(0, version), 80)
        assert first.net.ask(0, second.own(version), 80)


def test_a_device_that_was_deleted_comes_back(cluster: Cluster) -> None:
    first, second = cluster.hosts[:2]
    first.box.run("ip", "link", "del", "vtep1024")
    first.heal()
    assert first.heal() == 0
    for version in (4, 6):
        assert first.net.ask(0, second.address(0, version), 80)
        assert second.net.ask(0, first.address(0, version), 80)


def test_a_node_that_is_removed_is_gone_from_the_others_and_back_after_its_return(cluster: Cluster) -> None:
    first, _, third = cluster.hosts
    assert first.net.ask(0, third.address(0, 4), 80)
    third.wait(lambda: leave(cluster.store, third.member.name))
    cluster.tell(third.member.name, gone=True)
    for command in (
        ("route",),
        ("-6", "route"),
        ("route", "show", "table", "42"),
        ("neigh", "show", "dev", "vtep1024"),
    ):
        text = first.box.run("ip", *command)
        assert not [word for word in ("44.128.0.3", "fd01:a::3", "10.0.0.3 ") if word in text], text
    assert "70:b3:d5:80:00:03" not in first.box.run("bridge", "fdb", "show", "dev", "vtep1024")
    assert "10.0.0.3" not in first.box.run("nft", "list", "set", "inet", "towpath", "peers4")
    assert first.net.silent(0, third.address(0, 4), 80)
    assert first.heal() == 0

    third.wait(lambda: join(cluster.store, third.member))
    cluster.tell(third.member.name, gone=False)
    assert first.net.ask(0, third.address(0, 4), 80)
    assert first.net.ask(0, third.address(0, 6), 80)


def received(host: Host) -> int:
    stats = host.box.json("ip", "-j", "-s", "link", "show", "vtep1024")[0]["stats64"]
    return int(stats["rx"]["packets"])


def test_frames_of_a_stranger_are_not_taken(cluster: Cluster) -> None:
    """One on the underlay who knows number, port, MACs and addresses reaches nobody; a peer would."""
    first = cluster.hosts[0]
    with box(0) as stranger:
        plug_in(cluster.switch, stranger, 8)
        mac = "70:b3:d5:80:00:01"
        lines = (
            "ip link add x type vxlan id 1024 dstport 64000 local 10.0.0.9 remote 10.0.0.1",
            "ip link set x up address 70:b3:d5:80:00:02",
            f"ip neigh add {first.address(0, 4)} lladdr {mac} dev x",
            "ip address add 9.0.1.2/32 dev x",
            f"ip route add {first.address(0, 4)} dev x src 9.0.1.2",
        )
        stranger.run("sh", "-ec", "\n".join(lines))
        send = f"import socket; socket.socket(type=2).sendto(b'?', ('{first.address(0, 4)}', 81))"
        before = received(first)
        stranger.run(sys.executable, "-c", send)
        time.sleep(QUIET)
        assert received(first) == before

        first.box.apply((Phase("firewall", (AddRule(Peer(IPv4Address("10.0.0.9"), 64000, "test")),)),))
        stranger.run(sys.executable, "-c", send)
        assert matches(lambda: received(first) > before)
        first.box.apply((Phase("firewall", (DropRule(Peer(IPv4Address("10.0.0.9"), 64000, "test")),)),))


@pytest.mark.parametrize("version", FAMILIES)
def test_containers_may_not_send_to_the_tunnel(cluster: Cluster, version: int) -> None:
    """Bar is proved in test_firewall_tunnel; here it stands before every bridge."""
    first, second = cluster.hosts[:2]
    for port, passes in ((64001, True), (64000, False)):
        before = received(second)
        first.net.ask(0, second.own(version), port, "udp", wait=QUIET)
        assert (received(second) > before) is passes


def test_a_running_tunnel_heals_by_itself_and_follows_the_store(cluster: Cluster) -> None:
    first, second = cluster.hosts[:2]

    async def live() -> tuple[bool, bool]:
        running = asyncio.create_task(first.tunnel.run())
        try:
            await asyncio.sleep(0.3)
            await asyncio.to_thread(first.box.run, "ip", "route", "del", "9.0.1.0/24")
            healed = await _comes(lambda: "vtep1024" in hop(first, "9.0.1.2"))
            await leave(cluster.store, second.member.name)
            gone = await _comes(lambda: "vtep1024" not in hop(first, "9.0.1.2"))
            return healed, gone
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _comes(true: Callable[[], bool]) -> bool:
        return await asyncio.to_thread(matches, true)

    assert first.wait(live) == (True, True)
    second.wait(lambda: join(cluster.store, second.member))
    cluster.settle()
    assert first.net.ask(0, second.address(0, 4), 80)


def test_a_cluster_of_ipv6_only() -> None:
    with overlay_lab(2, SIX, containers=1) as made:
        first, second = made.hosts
        for host in made.hosts:
            host.attach(0)
        assert first.net.ask(0, second.address(0, 6), 80) == f"h1c0 {first.address(0, 6)}"
        assert first.net.ask(0, second.own(6), 80) == f"h1 {first.address(0, 6)}"
        assert "mtu 1430" in first.box.run("ip", "link", "show", "vtep1024")
