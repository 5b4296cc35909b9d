"""`firewall: auto` follows the host's own manager: whoever owns the filter table, published ports keep serving."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from integration.conftest import open_host
from integration.lab import UPLINK
from integration.networks import Net, new_net
from integration.sockets import reaches
from integration.test_rows_portmap import port, publish, publisher


@pytest.fixture
def net() -> Iterator[Net]:
    node = open_host(firewall="auto")
    network = new_net(node)
    try:
        yield network
    finally:
        network.close()
        node.close()


def serves(net: Net, outer: int, within: float = 3.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if reaches(net.host.outside, UPLINK, outer, wait=0.3):
            return True
    return False


def backend(net: Net) -> str:
    return str(net.host.agent.get("/v1/status")["firewall"])


def test_a_manager_that_drops_forwarding_cuts_no_published_port_off_and_its_leaving_neither(net: Net) -> None:
    """FW4: Docker sets the policy of FORWARD to DROP when it starts."""
    publish(net, publisher(net, "one call"), port(8097, 80))
    assert serves(net, 8097)
    assert backend(net) == "nftables"
    net.host.netns.run("iptables", "-P", "FORWARD", "DROP")
    assert serves(net, 8097)
    assert backend(net) == "iptables"
    publish(net, publisher(net, "one call"), port(8098, 80))
    assert serves(net, 8098)
    net.host.netns.run("iptables", "-P", "FORWARD", "ACCEPT")
    deadline = time.monotonic() + 5
    while backend(net) != "nftables" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert backend(net) == "nftables"
    assert serves(net, 8097)
    assert serves(net, 8098)
