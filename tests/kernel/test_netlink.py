"""Messages are packed as netlink wants them, answers are read whole, plans are cut where they must be. No kernel."""

from __future__ import annotations

import errno
import struct
from ipaddress import ip_address, ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towpath.errors import BadConfig, BadNetns
from towpath.kernel import links, netlink, netns, sysctl
from towpath.kernel.apply import Reap, Stretch, Work, stretches
from towpath.kernel.batch import host_addresses_only, names
from towpath.kernel.shape import bucket, read_shapes
from towpath.kernel.writer import Rules
from towpath.model import PortMap, Route, Trunk
from towpath.plan import (
    AddAddress,
    AddRoute,
    AddRule,
    AddVeth,
    DropLink,
    EnsureBridge,
    ForgetNeighbours,
    Op,
    Phase,
    Plan,
    PortVlans,
    Publish,
    SetLink,
    Unshape,
)


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=40)))
def test_attributes_read_as_they_were_packed(given_ones: dict[int, bytes]) -> None:
    packed = b"".join(netlink.attribute(kind, payload) for kind, payload in given_ones.items())
    assert len(packed) % 4 == 0
    assert netlink.attributes(packed) == given_ones


@given(st.binary(max_size=200))
def test_no_bytes_break_the_readers(data: bytes) -> None:
    netlink.attributes(data)
    list(netlink.split(data))


@pytest.mark.parametrize("capped", [pytest.param(True, id="request cut off"), pytest.param(False, id="request echoed")])
def test_the_text_of_an_extended_ack_is_found(capped: bool) -> None:
    request = netlink.HEADER.pack(24, 16, 0, 1, 0) + bytes(8)
    echoed = request[: netlink.HEADER.size] if capped else request
    body = struct.pack("=i", -errno.EINVAL) + echoed + netlink.text(netlink.NLMSGERR_ATTR_MSG, "Nexthop is bad")
    flags = netlink.NLM_F_ACK_TLVS | (netlink.NLM_F_CAPPED if capped else 0)
    assert netlink.read_ack(flags, body) == netlink.Answer(errno.EINVAL, "Nexthop is bad")


def test_an_ack_without_text_is_read() -> None:
    assert netlink.read_ack(0, struct.pack("=i", 0) + bytes(16)) == netlink.Answer(0)


# --- VLANs: not every kernel filters them, so the bytes are compared ----------------------------------------------


def vlan_words(message: netlink.Message) -> list[tuple[int, int]]:
    spec = netlink.attributes(message.body, links.IFINFO.size)[links.IFLA_AF_SPEC]
    return [links.VLAN_INFO.unpack(payload) for _, payload in netlink.attribute_list(spec)]


PVID, BEGIN, END = links.VLAN_PVID | links.VLAN_UNTAGGED, links.VLAN_RANGE_BEGIN, links.VLAN_RANGE_END


@pytest.mark.parametrize(
    ("op", "added", "dropped"),
    [
        pytest.param(PortVlans("p", pvid=10), [(PVID, 10)], [], id="one untagged"),
        pytest.param(PortVlans("p", 10, keep_default=False), [(PVID, 10)], [(0, 1)], id="without the default one"),
        pytest.param(PortVlans("p", 1, keep_default=False), [(PVID, 1)], [], id="the default one is asked for"),
        pytest.param(
            PortVlans("p", trunk=(Trunk(20, 30), Trunk(40, 40))), [(BEGIN, 20), (END, 30), (0, 40)], [], id="trunk"
        ),
    ],
)
def test_port_vlans_say(op: PortVlans, added: list[tuple[int, int]], dropped: list[tuple[int, int]]) -> None:
    found: dict[int, list[tuple[int, int]]] = {links.RTM_SETLINK: [], links.RTM_DELLINK: []}
    for message in links.port_vlans(op, 7):
        found[message.type] += vlan_words(message)
    assert found == {links.RTM_SETLINK: added, links.RTM_DELLINK: dropped}


# --- shaping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 1_000_000, 10_000_000_000, 100_000_000_000])
@pytest.mark.parametrize("burst", [80_000, 800_000_000])
def test_a_bucket_reads_back_as_it_was_asked(rate: int, burst: int) -> None:
    message = bucket(7, rate, burst)
    (seen,) = read_shapes("eth0", 7, [message.body])
    assert (seen.kind, seen.rate) == ("tbf", rate)
    longest = 0xFFFFFFFF * 64e-9 * rate  # what the kernel's clock of 32 bits can hold
    assert seen.burst == pytest.approx(min(burst, longest), rel=0.01, abs=rate * 64e-9 + 8)


# --- plans --------------------------------------------------------------------------------------------------------

A, B = "/run/netns/a", "/run/netns/b"
VETH, UP, LO = AddVeth("tp1", "eth0", A, "02:00:00:00:00:01", "br0"), SetLink("eth0", up=True), SetLink("lo", up=True)
FORGET = ForgetNeighbours("br0", (ip_address("10.0.0.2"),))
RULE = AddRule(Publish(PortMap(80, 80), ip_address("10.0.0.2"), "br0", "me"))


@pytest.mark.parametrize(
    ("plan", "want"),
    [
        pytest.param((), [], id="nothing"),
        pytest.param((Phase("host", ()), Phase("firewall", ())), [], id="empty phases"),
        pytest.param(
            (Phase("host", (VETH,)), Phase("netns", (LO, UP), A)),
            [Work((Phase("host", (VETH,)), Phase("netns", (LO, UP), A)))],
            id="host and container go in one hop",
        ),
        pytest.param(
            (Phase("netns", (UP,), A), Phase("netns", (UP,), B), Phase("netns", (LO,), B)),
            [Work((Phase("netns", (UP,), A), Phase("netns", (UP, LO), B)))],
            id="phases of one container become one",
        ),
        pytest.param(
            (Phase("netns", (UP,), A), Phase("netns", (LO,), A, tolerant=True)),
            [Work((Phase("netns", (UP,), A), Phase("netns", (LO,), A, tolerant=True)))],
            id="a tolerant phase stays apart",
        ),
        pytest.param(
            (Phase("host", (DropLink("a"), DropLink("b"), FORGET)), Phase("host", (DropLink("c"),))),
            [Reap(("a", "b")), Work((Phase("host", (FORGET,)),)), Reap(("c",))],
            id="deletions go together, in their place",
        ),
        pytest.param(
            (Phase("netns", (DropLink("eth0"),), A),),
            [Work((Phase("netns", (DropLink("eth0"),), A),))],
            id="a link of a container is not the reaper's",
        ),
        pytest.param(
            (Phase("host", (UP,)), Phase("firewall", (RULE,), firewall="iptables"), Phase("host", (LO,))),
            [Work((Phase("host", (UP,)),)), Rules((RULE,), "iptables"), Work((Phase("host", (LO,)),))],
            id="rules keep their place",
        ),
    ],
)
def test_a_plan_is_cut_into(plan: Plan, want: list[Stretch]) -> None:
    assert stretches(plan) == want


def test_names_are_those_that_no_operation_makes() -> None:
    ops = (EnsureBridge("br0", ""), VETH, AddAddress("eth9", ip_interface("10.0.0.1/24")), Unshape("tp1"))
    assert names(ops) == ("eth9",)
    assert names((SetLink("eth0", master="br1"), SetLink("eth0", master=""), UP)) == ("br1",)


@pytest.mark.parametrize(
    ("addresses", "want"),
    [
        pytest.param(["10.0.0.1/32"], {("eth0", 4)}, id="a host address"),
        pytest.param(["10.0.0.1/32", "10.1.0.1/24"], set(), id="a subnet besides"),
        pytest.param(["10.0.0.1/24", "fd00::1/128"], {("eth0", 6)}, id="by family"),
    ],
)
def test_a_gateway_is_on_link_beside(addresses: list[str], want: set[tuple[str, int]]) -> None:
    ops: list[Op] = [AddAddress("eth0", ip_interface(a)) for a in addresses]
    ops.append(AddRoute("eth0", Route(ip_network("0.0.0.0/0"), ip_address("169.254.1.1"))))
    assert host_addresses_only(ops) == want


# --- paths that users name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../../etc/passwd", "net/../../x"])
def test_a_sysctl_outside_of_proc_sys_is_refused(path: str) -> None:
    with pytest.raises(BadConfig):
        sysctl.write(path, "1")
    with pytest.raises(BadConfig):
        sysctl.read(path)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/nowhere/at/all", id="missing"),
        pytest.param("/etc/hostname", id="plain file"),
        pytest.param("/dev/null", id="device"),
        pytest.param("/proc/self/ns/uts", id="namespace of another kind"),
        pytest.param("/", id="directory"),
        pytest.param("a\0b", id="no path at all"),
        pytest.param("", id="empty"),
    ],
)
def test_what_is_no_network_namespace_is_named(path: str) -> None:
    with pytest.raises(BadNetns) as refusal:
        netns.open_netns(path)
    assert repr(path) in refusal.value.what
    assert netns.netns_id(path) == 0
