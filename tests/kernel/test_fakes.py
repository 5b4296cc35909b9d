"""The fake kernel refuses, forgets, fails and dies as its head comment says."""

from __future__ import annotations

import errno
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from tests.fakes import Crash, FakeKernel
from towpath.errors import BadNetns, PhaseFailed
from towpath.model import PortMap, Route
from towpath.plan import (
    AddAddress,
    AddRoute,
    AddRule,
    AddVeth,
    DropLink,
    DropRule,
    EnsureBridge,
    Phase,
    Plan,
    Publish,
    SetLink,
    Sysctl,
)

NETNS = "/run/netns/a"
BRIDGE = EnsureBridge("br-t", "02:00:00:00:00:01")
VETH = AddVeth("tp1", "eth0", NETNS, "02:00:00:00:00:02", master="br-t", hairpin=True)
INSIDE = (
    SetLink("eth0", up=True),
    AddAddress("eth0", ip_interface("10.0.0.2/24")),
    AddRoute("eth0", Route(ip_network("0.0.0.0/0"), ip_address("10.0.0.1"))),
)
WEB = Publish(PortMap(8080, 80), ip_address("10.0.0.2"), "br-t", "me")
PLAN: Plan = (Phase("host", (BRIDGE, VETH)), Phase("netns", INSIDE, NETNS), Phase("firewall", (AddRule(WEB),)))
UNDO: Plan = (
    Phase("firewall", (DropRule(WEB),)),
    Phase("host", (DropLink("tp1"), DropLink("br-t"))),
    Phase("netns", (DropLink("eth0"),), NETNS, tolerant=True),
)


async def test_state_reads_as_text_and_undo_leaves_nothing() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    empty = kernel.state
    await kernel.apply(PLAN)
    assert kernel.state[NETNS] == {
        "link eth0 veth 02:00:00:00:00:02 up",
        "address 10.0.0.2/24 on eth0",
        "route 0.0.0.0/0 via 10.0.0.1 on eth0",
    }
    assert "master br-t hairpin" in str(kernel)
    await kernel.apply(UNDO)
    await kernel.apply(UNDO)
    assert kernel.state == empty


@pytest.mark.parametrize(
    ("op", "number"),
    [
        pytest.param(AddVeth("tp1", "eth1", NETNS, ""), errno.EEXIST, id="host name taken"),
        pytest.param(AddVeth("tp2", "eth0", NETNS, ""), errno.EEXIST, id="peer name taken"),
        pytest.param(EnsureBridge("tp1", ""), errno.EEXIST, id="no bridge"),
        pytest.param(SetLink("nope", up=True), errno.ENODEV, id="no link"),
        pytest.param(AddRoute("tp1", Route(ip_network("::/0"), ip_address("2001:db8::1"))), errno.ENETUNREACH, id="gw"),
        pytest.param(Sysctl("net/ipv4/conf/nope/forwarding", "1"), errno.ENOENT, id="no such file"),
    ],
)
async def test_an_impossible_op_is_refused(op: AddVeth | EnsureBridge | SetLink, number: int) -> None:
    kernel = FakeKernel(netns=(NETNS,))
    await kernel.apply(PLAN)
    with pytest.raises(PhaseFailed) as failure:
        await kernel.apply((Phase("host", (op,)),))
    assert failure.value.errno == number


async def test_it_fails_once_and_dies_once_where_told() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    kernel.fail_on = AddAddress
    with pytest.raises(PhaseFailed, match="EBUSY"):
        await kernel.apply(PLAN)
    assert kernel.log[-1] == INSIDE[0]
    kernel = FakeKernel(netns=(NETNS,))
    kernel.die_after = 2
    with pytest.raises(Crash):
        await kernel.apply(PLAN)
    assert kernel.log == [BRIDGE, VETH]


async def test_a_netns_that_dies_takes_its_veths_along() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    await kernel.apply(PLAN)
    kernel.drop_netns(NETNS)
    assert kernel.netns_id(NETNS) == 0
    assert "tp1" not in kernel.host.links
    await kernel.apply(UNDO)
    with pytest.raises(BadNetns):
        await kernel.apply(PLAN[1:])
