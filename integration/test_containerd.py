"""containerd by `ctr run --cni` on our executables: it deletes with an empty CNI_NETNS, and still nothing is left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.lab import OUTSIDE, UPLINK, Host
from integration.networks import REFERENCE, Net, new_net
from integration.runtimes import Containerd, lacks
from integration.sockets import Server
from integration.traces import picture

pytestmark = pytest.mark.skipif(bool(lacks("containerd", "ctr", "runc")), reason=lacks("containerd", "ctr", "runc"))


@pytest.fixture(scope="module")
def network(host: Host) -> Net:
    return new_net(host)


@pytest.fixture(scope="module")
def containerd(host: Host, network: Net) -> Iterator[Containerd]:
    engine = Containerd(host)
    engine.networks.write(network.name, network.wire(), version="1.0.0")
    yield engine
    engine.close()
    network.close()


def test_a_container_has_our_address_and_route(containerd: Containerd, network: Net) -> None:
    said = containerd.run("first", "sh", "-c", "ip addr; ip route")
    assert f"inet 10.{network.number}.0." in said
    assert f"default via {network.gateway}" in said


def test_a_container_reaches_the_outside_under_the_hosts_address(containerd: Containerd, network: Net) -> None:
    server = Server(network.host.outside, "outside", tcp=(9000,))
    try:
        assert containerd.run("second", "nc", "-w", "5", OUTSIDE, "9000") == f"outside {UPLINK}"
    finally:
        server.close()


@pytest.mark.skipif(REFERENCE, reason="the reference leaks its masquerade chain each time")
def test_five_runs_leave_nothing_though_the_namespace_is_not_told(containerd: Containerd, network: Net) -> None:
    containerd.run("warm", "true")
    before = picture(network.host)
    for n in range(5):
        containerd.run(f"run{n}", "true")
    assert picture(network.host) - before == []
