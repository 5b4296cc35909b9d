"""Token buckets on a container's wire: what it receives at its host end, what it sends on an ifb (tc-tbf(8)).

The limit of a bucket is burst + 25 ms of the rate, as the reference bandwidth plug-in has it.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

from towpath.kernel import links
from towpath.kernel.contract import ShapeSeen
from towpath.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    U64,
    Message,
    Netlink,
    attribute,
    attributes,
    nest,
    text,
    u32,
    word,
)
from towpath.plan import Shape

RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC, RTM_NEWTFILTER = 36, 37, 38, 44
TC_H_ROOT, TC_H_INGRESS, INGRESS_HANDLE = 0xFFFFFFFF, 0xFFFFFFF1, 0xFFFF0000
TCA_KIND, TCA_OPTIONS = 1, 2
TBF_PARMS, TBF_RATE64, TBF_BURST = 1, 4, 6
LINKLAYER_ETHERNET = 1  # the kernel computes the rate itself and wants no table of ours
U32_CLASSID, U32_SEL, U32_ACT = 1, 5, 7
TC_U32_TERMINAL = 1
ACT_KIND, ACT_OPTIONS, MIRRED_PARMS = 1, 2, 2
TC_ACT_STOLEN, EGRESS_REDIR = 4, 1
ETH_P_ALL = 0x0003

LATENCY = 0.025  # seconds that a packet may wait in a full queue
TICK = 64e-9  # seconds; include/net/pkt_sched.h PSCHED_SHIFT
MAX_U32 = 0xFFFFFFFF

TCMSG = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
RATESPEC = struct.Struct("=BBHhHI")  # cell log, link layer, overhead, cell align, mpu, rate in bytes/s
TBF_QOPT = struct.Struct("=12s12sIII")  # rate, peak rate, limit in bytes, buffer in ticks, mtu
MIRRED = struct.Struct("=IIiiiiI")  # index, capabilities, action, references, bindings, what to do, link
SELECTOR = struct.Struct("=BBBxHHhhI")  # flags, offset shift, keys, offset mask, offset, ...

NOT_THERE = frozenset({errno.ENOENT, errno.EINVAL, errno.ENODEV})  # which one depends on the kernel's age


def apply(netlink: Netlink, op: Shape, port: int) -> None:
    """Shape the link `port` (an index) as `op` says. Raises OSError with the kernel's text."""
    wanted = op.bandwidth
    if wanted.ingress_rate:
        netlink.must(bucket(port, wanted.ingress_rate, wanted.ingress_burst))
    if not wanted.egress_rate:
        return
    made = netlink.ask(links.new_ifb(op.ifb, op.mtu))
    if made.errno not in (0, errno.EEXIST):
        raise OSError(made.errno, made.text)
    netlink.must(links.mark(op.ifb))
    ifb = links.read_link(netlink.must(links.get_link(op.ifb)).data[0])[0]
    if ifb.kind != "ifb":
        raise OSError(errno.EEXIST, f'"{op.ifb}" already exists but is not an ifb')
    netlink.must(bucket(ifb.index, wanted.egress_rate, wanted.egress_burst))
    netlink.ask(drop_ingress(port))  # a redirect of an earlier, unfinished try
    netlink.must(add_ingress(port))
    netlink.must(redirect(port, ifb.index))


def remove(port: int) -> tuple[Message, Message]:
    """What takes our disciplines from a port; the errnos in NOT_THERE mean that it has none."""
    return Message(RTM_DELQDISC, 0, TCMSG.pack(0, port, 0, TC_H_ROOT, 0)), drop_ingress(port)


def bucket(index: int, rate: int, burst: int) -> Message:
    """A tbf at the root of a link: rate in bits/s, burst in bits. One that is there already takes the new figures."""
    per_second, size = max(1, rate // 8), min(max(1, burst // 8), MAX_U32)
    ticks = min(int(size / per_second / TICK), MAX_U32)
    limit = min(int(per_second * LATENCY) + size, MAX_U32)
    spec = RATESPEC.pack(0, LINKLAYER_ETHERNET, 0, 0, 0, min(per_second, MAX_U32))
    options = attribute(TBF_PARMS, TBF_QOPT.pack(spec, bytes(RATESPEC.size), limit, ticks, 0)) + u32(TBF_BURST, size)
    if per_second > MAX_U32:
        options += attribute(TBF_RATE64, U64.pack(per_second))
    body = TCMSG.pack(0, index, 0x10000, TC_H_ROOT, 0) + text(TCA_KIND, "tbf") + nest(TCA_OPTIONS, options)
    return Message(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body)


def add_ingress(index: int) -> Message:
    body = TCMSG.pack(0, index, INGRESS_HANDLE, TC_H_INGRESS, 0) + text(TCA_KIND, "ingress")
    return Message(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, body)


def drop_ingress(index: int) -> Message:
    return Message(RTM_DELQDISC, 0, TCMSG.pack(0, index, INGRESS_HANDLE, TC_H_INGRESS, 0))


def redirect(index: int, target: int) -> Message:
    """Everything that enters link `index` leaves through link `target` first (u32 with one key that always fits)."""
    action = nest(
        1, text(ACT_KIND, "mirred"), nest(ACT_OPTIONS, attribute(MIRRED_PARMS, mirred(target)))
    )  # 1: the first and only action
    selector = SELECTOR.pack(TC_U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + bytes(16)
    options = u32(U32_CLASSID, 0x10001) + attribute(U32_SEL, selector) + nest(U32_ACT, action)
    info = (1 << 16) | int.from_bytes(struct.pack(">H", ETH_P_ALL), "little" if little_endian() else "big")
    body = TCMSG.pack(0, index, 0, INGRESS_HANDLE, info) + text(TCA_KIND, "u32") + nest(TCA_OPTIONS, options)
    return Message(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, body)


def mirred(target: int) -> bytes:
    return MIRRED.pack(0, 0, TC_ACT_STOLEN, 0, 0, EGRESS_REDIR, target)


def little_endian() -> bool:
    return struct.pack("=H", 1) == b"\1\0"


def list_disciplines(index: int) -> Message:
    return Message(RTM_GETQDISC, 0, TCMSG.pack(0, index, 0, 0, 0))


def read_shapes(name: str, index: int, bodies: Iterable[bytes]) -> tuple[ShapeSeen, ...]:
    """The disciplines of one link. A burst reads back within 0.1 % or a tick's worth of bytes of what was asked."""
    seen = []
    for body in bodies:
        if TCMSG.unpack_from(body)[1] != index:
            continue  # an older kernel lists those of every link
        found = attributes(body, TCMSG.size)
        kind = word(found.get(TCA_KIND, b""))
        options = attributes(found.get(TCA_OPTIONS, b"")) if kind == "tbf" else {}
        rate, burst = read_bucket(options) if TBF_PARMS in options else (0, 0)
        seen.append(ShapeSeen(name, kind, rate, burst))
    return tuple(seen)


def read_bucket(options: dict[int, bytes]) -> tuple[int, int]:
    """Rate in bits/s and burst in bits of a tbf."""
    spec, _, _, ticks, _ = TBF_QOPT.unpack_from(options[TBF_PARMS])
    per_second = RATESPEC.unpack(spec)[5]
    if TBF_RATE64 in options:
        per_second = U64.unpack_from(options[TBF_RATE64])[0]
    return per_second * 8, round(per_second * ticks * TICK) * 8
