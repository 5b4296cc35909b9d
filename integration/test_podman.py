"""Podman 4.3 with its CNI backend on our executables: run, ports, static addresses, reload, remove, nothing left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from integration.callers import Json
from integration.lab import UPLINK, Host
from integration.namespaces import CommandFailed, Netns
from integration.networks import CAPABILITIES, REFERENCE, Net, new_net
from integration.runtimes import Podman, lacks
from integration.traces import Picture, picture

pytestmark = pytest.mark.skipif(bool(lacks("podman", "runc")), reason=lacks("podman", "runc"))


@pytest.fixture(scope="module")
def podman(host: Host) -> Iterator[Podman]:
    engine = Podman(host)
    yield engine
    engine.close()


@pytest.fixture
def network(host: Host, podman: Podman) -> Iterator[Net]:
    """A one-call network that podman finds by its conflist; nothing of it is left at the end."""
    net = new_net(host)
    before = picture(host)
    podman.networks.write(net.name, *plugins(net))
    yield net
    podman.run("rm", "-f", "-a", "-t", "0")
    net.close()
    assert REFERENCE or picture(host) - before == []


def plugins(net: Net, **keys: Json) -> list[Json]:
    if REFERENCE:
        ports: Json = {"type": "portmap", "capabilities": CAPABILITIES}
        return [net.wire(hairpinMode=True, **keys), ports, {"type": "tuning"}]
    return [net.wire(**keys)]


def fetch(netns: Netns, address: str, port: int) -> str:
    """The page that `Podman.serve` serves, asked for from a namespace; "" where nobody answers for five seconds."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        done = netns.call("curl", "-s", "-g", "-m", "1", f"http://{address}:{port}/x")
        if done.returncode == 0:
            return done.stdout.decode().strip()
        time.sleep(0.05)
    return ""


def silent(netns: Netns, address: str, port: int) -> bool:
    return netns.call("curl", "-s", "-m", "1", f"http://{address}:{port}/x").returncode != 0


def test_ports_of_a_container_are_served_and_host_ips_honoured(network: Net, podman: Podman) -> None:
    host = network.host
    ports = ("-p", "18090:80", "-p", "127.0.0.1:18092:80", "-p", "18091:81/udp")
    podman.serve("web", "--network", network.name, *ports)
    assert fetch(host.netns, "127.0.0.1", 18090) == "web"
    assert fetch(host.outside, UPLINK, 18090) == "web"
    assert fetch(host.netns, "127.0.0.1", 18092) == "web"
    assert silent(host.outside, UPLINK, 18092)


def test_a_static_address_and_mac_are_given(network: Net, podman: Podman) -> None:
    wanted = f"10.{network.number}.0.50"
    podman.serve("fixed", "--network", network.name, "--ip", wanted, "--mac-address", "02:11:22:33:44:55")
    seen = podman.addresses("fixed", network.name)
    assert (seen["IPAddress"], seen["MacAddress"]) == (wanted, "02:11:22:33:44:55")
    assert fetch(network.host.netns, wanted, 80) == "fixed"


def test_two_families_reach_each_other(host: Host, podman: Podman) -> None:
    net = new_net(host)
    podman.networks.write(net.name, *plugins(net, ipam=net.dual()))
    try:
        podman.serve("six", "--network", net.name)
        seen = podman.addresses("six", net.name)
        assert seen["GlobalIPv6Address"].startswith(f"fd00:{net.number}:")
        end = time.monotonic() + 3  # the reference's gateway is tentative at first
        while fetch(host.netns, f"[{seen['GlobalIPv6Address']}]", 80) != "six":
            assert time.monotonic() < end
    finally:
        podman.run("rm", "-f", "-a", "-t", "0")
        net.close()


def test_a_reload_brings_ports_back_after_a_flush(network: Net, podman: Podman) -> None:
    """podman network reload is DEL and ADD: the container keeps running."""
    podman.serve("web", "--network", network.name, "-p", "18093:80")
    before = podman.addresses("web", network.name)["IPAddress"]
    if not REFERENCE:
        network.host.netns.run("nft", "flush", "table", "inet", "towpath")
    try:
        podman.run("network", "reload", "web")
    except CommandFailed:
        if not REFERENCE:  # there DEL fails over the rules that are gone
            raise
        pytest.skip("the reference plug-ins cannot")
    assert podman.addresses("web", network.name)["IPAddress"] == before
    assert fetch(network.host.outside, UPLINK, 18093) == "web"


def test_podman_lists_our_network_and_stops_without_a_trace(network: Net, podman: Podman) -> None:
    assert network.name in {row["name"] for row in json.loads(podman.run("network", "ls", "--format", "json"))}
    podman.serve("first", "--network", network.name, "-p", "18094:80")
    full = picture(network.host)
    podman.serve("second", "--network", network.name, "-p", "18095:80")
    podman.run("rm", "-f", "-t", "0", "second")
    assert REFERENCE or left(full, network.host) == []


def left(before: Picture, host: Host) -> list[str]:
    return picture(host) - before
