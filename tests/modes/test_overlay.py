"""Overlay mode: bridge mode on a node's slice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modes.overlay import Overlay
from tests.overlay.cluster import grown
from towpath.kernel.contract import NetnsSeen
from towpath.model import Network
from towpath.overlay.config import DCOS
from towpath.overlay.networks import DOCKER, homes, networks
from towpath.plan import AddAddress, EnsureBridge

SECOND = grown(2)[1]
CNI, CNI6 = networks(DCOS, SECOND, 1450)
EMPTY = NetnsSeen((), (), ())


def test_a_network_is_the_lower_half_of_the_nodes_block_on_the_bridge_of_its_name() -> None:
    assert (CNI.name, CNI.mode, CNI.device, CNI.mtu) == ("dcos", "overlay", "m-dcos", 1450)
    assert [str(span) for pool in CNI.pools for span in pool.ranges] == ["9.0.1.1-9.0.1.126"]
    assert [str(pool) for pool in CNI6.pools] == ["fd01:b::1:0:0:1-fd01:b::1:7fff:ffff:ffff"]


def test_dockers_is_the_upper_half() -> None:
    docker, docker6 = networks(DCOS, SECOND, 1450, DOCKER)
    assert (docker.device, str(docker.pools[0])) == ("d-dcos", "9.0.1.129-9.0.1.254")
    assert (docker6.device, str(docker6.pools[0].ranges[0].subnet)) == ("d-dcos6", "fd01:b::1:8000:0:0/81")


def test_what_is_not_split_is_one_network_for_both() -> None:
    whole = replace(DCOS, overlays=(replace(DCOS.overlays[0], split="none"),))
    assert networks(whole, SECOND, 1450) == networks(whole, SECOND, 1450, DOCKER)
    assert homes(whole, SECOND) == ("m-dcos",)
    assert homes(DCOS, SECOND) == ("m-dcos", "d-dcos", "m-dcos6", "d-dcos6")


def test_a_node_without_a_slice_has_no_network() -> None:
    assert networks(DCOS, replace(SECOND, slices=()), 1450) == ()


def test_its_bridge_is_the_gateway_with_the_tunnels_mtu() -> None:
    ops = [op for phase in Overlay().plan_network(CNI) for op in phase.ops]
    bridge = next(op for op in ops if isinstance(op, EnsureBridge))
    assert (bridge.name, bridge.mtu) == ("m-dcos", 1450)
    assert [str(op.address) for op in ops if isinstance(op, AddAddress)] == ["9.0.1.1/25"]


@pytest.mark.parametrize(
    ("network", "words"),
    [
        pytest.param(CNI, "", id="a slice"),
        pytest.param(CNI6, "", id="a slice in IPv6"),
        pytest.param(replace(CNI, mtu=600), "", id="IPv4 is content with less"),
        pytest.param(replace(CNI6, mtu=1279), "IPv6 needs 1280", id="MTU too small for IPv6"),
        pytest.param(replace(CNI, pools=()), "has no block of overlay 'dcos'", id="no slice"),
        pytest.param(replace(CNI, vlan=7), "vlan and trunk have no meaning", id="VLAN"),
    ],
)
def test_what_stands_in_the_way(network: Network, words: str) -> None:
    reason = Overlay().check_network(network, EMPTY)
    assert words in reason
    assert bool(reason) is bool(words)
