"""Packs and reads rtnetlink's messages about links: veths, bridges, ifbs, their ports and VLANs (linux/if_link.h)."""

from __future__ import annotations

import struct

from towpath.kernel.contract import LinkSeen
from towpath.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    attribute,
    attributes,
    nest,
    number,
    text,
    u8,
    u32,
    word,
)
from towpath.model import Trunk
from towpath.plan import AddVeth, EnsureBridge, PortVlans, SetLink

ALIAS = "towpath"  # the mark of every link that we make: `ip -d link` shows it, a search by alias finds it

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
AF_UNSPEC, AF_BRIDGE = 0, 7
IFF_UP, IFF_PROMISC, IFF_ALLMULTI = 0x1, 0x100, 0x200

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER = 1, 3, 4, 5, 10
IFLA_TXQLEN, IFLA_LINKINFO, IFLA_IFALIAS = 13, 18, 20
IFLA_AF_SPEC, IFLA_GROUP, IFLA_NET_NS_FD, IFLA_EXT_MASK = 26, 27, 28, 29
IFLA_NUM_TX_QUEUES, IFLA_NUM_RX_QUEUES = 31, 32
RTEXT_FILTER_SKIP_STATS = 8  # counters are most of a reply and nobody here reads them
INFO_KIND, INFO_DATA, INFO_SLAVE_KIND, INFO_SLAVE_DATA = 1, 2, 4, 5
VETH_INFO_PEER = 1
BR_VLAN_FILTERING = 7
BRPORT_MODE, BRPORT_ISOLATED = 4, 33  # IFLA_BRPORT_MODE is the hairpin switch

BRIDGE_VLAN_INFO = 2
VLAN_PVID, VLAN_UNTAGGED, VLAN_RANGE_BEGIN, VLAN_RANGE_END = 2, 4, 8, 16
VLAN_INFO = struct.Struct("=HH")
DEFAULT_VLAN = 1

IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
SKIP_STATS = u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
# A veth is born with a pair of queues for every CPU, each with its own kobjects and events in sysfs: a third of the
# time on two CPUs, more on large hosts. Without XDP or GRO on the device no packet is handled by queue.
ONE_QUEUE = u32(IFLA_NUM_TX_QUEUES, 1) + u32(IFLA_NUM_RX_QUEUES, 1)


def header(index: int = 0, flags: int = 0, change: int = 0, family: int = AF_UNSPEC) -> bytes:
    return IFINFO.pack(family, 0, index, flags, change)


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def get_link(name: str) -> Message:
    return Message(RTM_GETLINK, 0, header() + text(IFLA_IFNAME, name) + SKIP_STATS)


def get_link_at(index: int) -> Message:
    return Message(RTM_GETLINK, 0, header(index) + SKIP_STATS)


def list_links() -> Message:
    return Message(RTM_GETLINK, 0, header() + SKIP_STATS)


def new_bridge(op: EnsureBridge) -> Message:
    """A bridge, up from birth. A MAC given now is kept when ports come and go (NET_ADDR_SET in net/bridge/br_if.c)."""
    flags = IFF_UP | (IFF_PROMISC if op.promiscuous else 0)
    data = nest(INFO_DATA, u8(BR_VLAN_FILTERING, 1)) if op.vlan_filtering else b""
    body = header(0, flags, flags) + text(IFLA_IFNAME, op.name)
    body += attribute(IFLA_ADDRESS, mac_bytes(op.mac)) if op.mac else b""
    body += u32(IFLA_MTU, op.mtu) if op.mtu else b""
    body += nest(IFLA_LINKINFO, text(INFO_KIND, "bridge"), data)
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def filter_vlans(name: str) -> Message:
    body = header() + text(IFLA_IFNAME, name)
    body += nest(IFLA_LINKINFO, text(INFO_KIND, "bridge"), nest(INFO_DATA, u8(BR_VLAN_FILTERING, 1)))
    return Message(RTM_NEWLINK, 0, body)


def new_veth(op: AddVeth, netns_fd: int, master: int = 0) -> Message:
    """The pair in one message: host end up and a port of `master`, peer born in its namespace.

    The peer may not be born up: the kernel opens it before the two are joined and says ENOTCONN.
    """
    mtu = (u32(IFLA_MTU, op.mtu) if op.mtu else b"") + ONE_QUEUE
    peer = header() + text(IFLA_IFNAME, op.peer) + mtu + u32(IFLA_NET_NS_FD, netns_fd)
    peer += attribute(IFLA_ADDRESS, mac_bytes(op.mac)) if op.mac else b""
    body = header(0, IFF_UP, IFF_UP) + text(IFLA_IFNAME, op.name) + mtu
    body += attribute(IFLA_ADDRESS, mac_bytes(op.host_mac)) if op.host_mac else b""
    body += u32(IFLA_MASTER, master) if master else b""
    info = nest(INFO_DATA, attribute(VETH_INFO_PEER, peer))
    body += nest(IFLA_LINKINFO, text(INFO_KIND, "veth"), info)
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def new_ifb(name: str, mtu: int = 0) -> Message:
    body = header(0, IFF_UP, IFF_UP) + text(IFLA_IFNAME, name) + (u32(IFLA_MTU, mtu) if mtu else b"")
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body + nest(IFLA_LINKINFO, text(INFO_KIND, "ifb")))


def mark(name: str, hairpin: bool = False, isolated: bool = False) -> Message:
    """Our alias, which the kernel does not take at birth, and the flags of a bridge port with it."""
    body = header() + text(IFLA_IFNAME, name) + text(IFLA_IFALIAS, ALIAS)
    if hairpin or isolated:
        flags = u8(BRPORT_MODE, hairpin) + u8(BRPORT_ISOLATED, isolated)
        body += nest(IFLA_LINKINFO, text(INFO_SLAVE_KIND, "bridge"), nest(INFO_SLAVE_DATA, flags))
    return Message(RTM_NEWLINK, 0, body)


def set_link(op: SetLink, master: int = 0) -> Message:
    flags = change = 0
    for bit, wanted in ((IFF_UP, op.up), (IFF_PROMISC, op.promiscuous), (IFF_ALLMULTI, op.allmulti)):
        if wanted is not None:
            change |= bit
            flags |= bit if wanted else 0
    body = header(0, flags, change) + text(IFLA_IFNAME, op.name)
    body += attribute(IFLA_ADDRESS, mac_bytes(op.mac)) if op.mac else b""
    body += u32(IFLA_MTU, op.mtu) if op.mtu else b""
    body += u32(IFLA_TXQLEN, op.tx_queue) if op.tx_queue is not None else b""
    body += u32(IFLA_MASTER, master) if op.master is not None else b""
    return Message(RTM_NEWLINK, 0, body)


def set_group(index: int, group: int) -> Message:
    return Message(RTM_NEWLINK, 0, header(index) + u32(IFLA_GROUP, group))


def drop_link(name: str) -> Message:
    return Message(RTM_DELLINK, 0, header() + text(IFLA_IFNAME, name))


def drop_group(group: int) -> Message:
    return Message(RTM_DELLINK, 0, header() + u32(IFLA_GROUP, group))


def port_vlans(op: PortVlans, index: int) -> list[Message]:
    """VLANs of a bridge port: first what is added, then VLAN 1 goes unless it stays or was asked for."""
    entries = b""
    if op.pvid:
        entries += attribute(BRIDGE_VLAN_INFO, VLAN_INFO.pack(VLAN_PVID | VLAN_UNTAGGED, op.pvid))
    for trunk in op.trunk:
        entries += vlan_range(trunk)
    messages = []
    if entries:
        messages.append(Message(RTM_SETLINK, 0, header(index, family=AF_BRIDGE) + nest(IFLA_AF_SPEC, entries)))
    asked = op.pvid == DEFAULT_VLAN or any(t.first <= DEFAULT_VLAN <= t.last for t in op.trunk)
    if not op.keep_default and not asked:
        gone = attribute(BRIDGE_VLAN_INFO, VLAN_INFO.pack(0, DEFAULT_VLAN))
        messages.append(Message(RTM_DELLINK, 0, header(index, family=AF_BRIDGE) + nest(IFLA_AF_SPEC, gone)))
    return messages


def vlan_range(trunk: Trunk) -> bytes:
    if trunk.first == trunk.last:
        return attribute(BRIDGE_VLAN_INFO, VLAN_INFO.pack(0, trunk.first))
    ends = ((VLAN_RANGE_BEGIN, trunk.first), (VLAN_RANGE_END, trunk.last))
    return b"".join(attribute(BRIDGE_VLAN_INFO, VLAN_INFO.pack(flag, vid)) for flag, vid in ends)


# --- reading -----------------------------------------------------------------------------------------------------


def read_link(body: bytes) -> tuple[LinkSeen, int]:
    """One RTM_NEWLINK: the link, and the index of its master (0 = none), whose name only another message tells."""
    _, _, index, flags, _ = IFINFO.unpack_from(body)
    found = attributes(body, IFINFO.size)
    info = attributes(found.get(IFLA_LINKINFO, b""))
    link = LinkSeen(
        name=word(found.get(IFLA_IFNAME, b"")),
        index=index,
        kind=word(info.get(INFO_KIND, b"")),
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
        mtu=number(found.get(IFLA_MTU, b"")),
        up=bool(flags & IFF_UP),
        peer_index=number(found.get(IFLA_LINK, b"")),
        promiscuous=bool(flags & IFF_PROMISC),
        alias=word(found.get(IFLA_IFALIAS, b"")),
        allmulti=bool(flags & IFF_ALLMULTI),
        tx_queue=number(found.get(IFLA_TXQLEN, b"")),
    )
    return link, number(found.get(IFLA_MASTER, b""))


def filters_vlans(body: bytes) -> bool:
    """Whether a bridge, as RTM_NEWLINK tells it, filters VLANs."""
    info = attributes(attributes(body, IFINFO.size).get(IFLA_LINKINFO, b""))
    return bool(number(attributes(info.get(INFO_DATA, b"")).get(BR_VLAN_FILTERING, b"")))
