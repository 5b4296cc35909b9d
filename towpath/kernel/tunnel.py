"""Packs and reads rtnetlink's messages about VXLAN devices, their neighbours and forwarding entries, and policy rules.

Sources: linux/if_link.h (IFLA_VXLAN_*), linux/neighbour.h (NDA_*), linux/fib_rules.h (FRA_*).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from towpath.kernel.inet import NDMSG, ROUTE_PROTOCOL, RTM_DELNEIGH, family
from towpath.kernel.links import (
    AF_BRIDGE,
    IFF_UP,
    IFINFO,
    IFLA_ADDRESS,
    IFLA_IFNAME,
    IFLA_LINKINFO,
    IFLA_MTU,
    INFO_DATA,
    INFO_KIND,
    RTM_NEWLINK,
    header,
    mac_bytes,
)
from towpath.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    attribute,
    attributes,
    nest,
    number,
    text,
    u8,
    u32,
)
from towpath.model import Address, Subnet
from towpath.plan import AddFdb, AddNeighbour, AddPolicyRule, DropFdb, DropPolicyRule, EnsureVxlan

RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
VXLAN_ID, VXLAN_LOCAL, VXLAN_LEARNING, VXLAN_PORT, VXLAN_LOCAL6 = 1, 4, 7, 15, 17
NDA_DST, NDA_LLADDR, NDA_IFINDEX, NDA_PROTOCOL = 1, 2, 8, 12
NUD_NOARP, NUD_PERMANENT, NTF_SELF = 0x40, 0x80, 0x02
FRA_SRC, FRA_PRIORITY, FRA_TABLE, FRA_PROTOCOL = 2, 6, 15, 21
FR_ACT_TO_TBL = 1
RULE = struct.Struct("=BBBBBxxBI")  # family, dst length, src length, tos, table, action, flags


@dataclass(frozen=True, slots=True)
class Vxlan:
    """What makes one VXLAN device another than the next."""

    vni: int
    port: int
    local: Address | None
    learning: bool = False


def new_vxlan(op: EnsureVxlan) -> Message:
    """The device, up from birth, without a peer to flood to."""
    data = u32(VXLAN_ID, op.vni) + attribute(VXLAN_PORT, op.port.to_bytes(2, "big")) + u8(VXLAN_LEARNING, 0)
    data += attribute(VXLAN_LOCAL if op.local.version == 4 else VXLAN_LOCAL6, op.local.packed)
    body = header(0, IFF_UP, IFF_UP) + text(IFLA_IFNAME, op.name) + attribute(IFLA_ADDRESS, mac_bytes(op.mac))
    body += u32(IFLA_MTU, op.mtu) if op.mtu else b""
    body += nest(IFLA_LINKINFO, text(INFO_KIND, "vxlan"), nest(INFO_DATA, data))
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def add_neighbour(index: int, op: AddNeighbour) -> Message:
    head = NDMSG.pack(family(op.address.version), index, NUD_PERMANENT, 0, 0)
    body = head + attribute(NDA_DST, op.address.packed) + attribute(NDA_LLADDR, mac_bytes(op.mac))
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body + u8(NDA_PROTOCOL, ROUTE_PROTOCOL))


def add_fdb(index: int, op: AddFdb) -> Message:
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, fdb_body(index, op.mac, op.to))


def drop_fdb(index: int, op: DropFdb) -> Message:
    return Message(RTM_DELNEIGH, 0, fdb_body(index, op.mac, op.to))


def fdb_body(index: int, mac: str, to: Address) -> bytes:
    head = NDMSG.pack(AF_BRIDGE, index, NUD_PERMANENT | NUD_NOARP, NTF_SELF, 0)
    return head + attribute(NDA_LLADDR, mac_bytes(mac)) + attribute(NDA_DST, to.packed)


def add_rule(op: AddPolicyRule) -> Message:
    return Message(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, rule_body(op.source, op.table, op.priority))


def drop_rule(op: DropPolicyRule) -> Message:
    return Message(RTM_DELRULE, 0, rule_body(op.source, op.table, op.priority))


def rule_body(source: Subnet, table: int, priority: int) -> bytes:
    short = table if table < 256 else 0
    head = RULE.pack(family(source.version), 0, source.prefixlen, 0, short, FR_ACT_TO_TBL, 0)
    body = head + (attribute(FRA_SRC, source.network_address.packed) if source.prefixlen else b"")
    return body + u32(FRA_PRIORITY, priority) + u32(FRA_TABLE, table) + u8(FRA_PROTOCOL, ROUTE_PROTOCOL)


def list_neighbours(index: int, af: int) -> Message:
    """Neighbours of one link: AF_INET, AF_INET6, or AF_BRIDGE for its forwarding entries."""
    return Message(RTM_GETNEIGH, 0, NDMSG.pack(af, 0, 0, 0, 0) + u32(NDA_IFINDEX, index))


def list_rules(version: int) -> Message:
    return Message(RTM_GETRULE, 0, RULE.pack(family(version), 0, 0, 0, 0, 0, 0))


# --- reading -----------------------------------------------------------------------------------------------------


def read_vxlan(body: bytes) -> Vxlan:
    """The settings of a VXLAN device, as RTM_NEWLINK tells them."""
    info = attributes(attributes(body, IFINFO.size).get(IFLA_LINKINFO, b""))
    found = attributes(info.get(INFO_DATA, b""))
    local = found.get(VXLAN_LOCAL) or found.get(VXLAN_LOCAL6)
    return Vxlan(
        number(found.get(VXLAN_ID, b"")),
        int.from_bytes(found.get(VXLAN_PORT, b""), "big"),
        ip_address(local) if local else None,
        bool(number(found.get(VXLAN_LEARNING, b""))),
    )


def read_neighbour(link: str, index: int, body: bytes) -> AddNeighbour | None:
    """One RTM_NEWNEIGH; None where it is another link's, or nothing that somebody wrote down for good."""
    _, at, state, _, _ = NDMSG.unpack_from(body)
    found = attributes(body, NDMSG.size)
    if at != index or not state & NUD_PERMANENT or len(found.get(NDA_LLADDR, b"")) != 6:
        return None
    return AddNeighbour(link, ip_address(found[NDA_DST]), found[NDA_LLADDR].hex(":"))


def read_fdb(link: str, index: int, body: bytes) -> AddFdb | None:
    """One RTM_NEWNEIGH of the bridge family; None where it leads nowhere, or from another link."""
    af, at, *_ = NDMSG.unpack_from(body)
    found = attributes(body, NDMSG.size)
    if af != AF_BRIDGE or at != index or NDA_DST not in found or NDA_LLADDR not in found:
        return None
    return AddFdb(link, found[NDA_LLADDR].hex(":"), ip_address(found[NDA_DST]))


def read_rule(body: bytes) -> AddPolicyRule | None:
    """One RTM_NEWRULE; None where it does not carry our mark."""
    af, _, bits, _, table, action, _ = RULE.unpack_from(body)
    found = attributes(body, RULE.size)
    if action != FR_ACT_TO_TBL or number(found.get(FRA_PROTOCOL, b"")) != ROUTE_PROTOCOL:
        return None
    packed = found.get(FRA_SRC) or bytes(4 if af == socket.AF_INET else 16)
    table = number(found[FRA_TABLE]) if FRA_TABLE in found else table
    return AddPolicyRule(ip_network((packed, bits)), table, number(found.get(FRA_PRIORITY, b"")))
