"""What somebody else took away comes back, and what hung on it works again."""

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
    node = open_host()
    network = new_net(node)
    try:
        yield network
    finally:
        network.close()
        node.close()


def test_a_bridge_taken_away_comes_back_with_its_containers_within_two_seconds(net: Net) -> None:
    member = publish(net, publisher(net, "one call"), port(8100, 80))
    other = publish(net, publisher(net, "one call"), port(8101, 80))
    assert reaches(net.host.outside, UPLINK, 8100)
    (bridge,) = [row["bridge"] for row in net.host.agent.get("/v1/networks")]
    net.host.netns.run("ip", "link", "del", bridge)
    end = time.monotonic() + 2.5  # half a second for the machine
    while not reaches(net.host.outside, UPLINK, 8100, wait=0.2):
        assert time.monotonic() < end, "the published port does not serve"
    assert reaches(net.host.outside, UPLINK, 8101)
    for one in (member, other):
        reply = one.runtime.check(one.container.id, one.container.path)
        assert reply.ok, str(reply)
