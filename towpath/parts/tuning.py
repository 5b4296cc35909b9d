"""Sysctls and link settings inside the container, and how they are put back."""

from __future__ import annotations

from towpath.model import Attachment, Tuning
from towpath.plan import LinkOp, Phase, Plan, SetLink, Sysctl


def settings(ifname: str, tuning: Tuning) -> tuple[LinkOp, ...]:
    ops: list[LinkOp] = [Sysctl(path, value) for path, value in tuning.sysctl]
    link = SetLink(
        ifname,
        mac=tuning.mac or None,
        mtu=tuning.mtu or None,
        promiscuous=tuning.promiscuous,
        allmulti=tuning.allmulti,
        tx_queue=tuning.tx_queue or None,
    )
    if link != SetLink(ifname):
        ops.append(link)
    return tuple(ops)


def plan_tune(record: Attachment) -> Plan:
    ops = settings(record.key.ifname, record.tuning)
    return (Phase("netns", ops, record.netns),) if ops else ()


def plan_untune(record: Attachment) -> Plan:
    """Put back what was there before. Not needed where the interface is ours and goes away."""
    if "wire" in record.parts or not record.netns or not record.tuning.before:
        return ()
    before = dict(record.tuning.before)
    was = Tuning(
        sysctl=tuple((path, before[path]) for path, _ in record.tuning.sysctl if path in before),
        mac=before.get("mac", ""),
        mtu=int(before.get("mtu", 0)),
        promiscuous=None if "promisc" not in before else before["promisc"] == "1",
        allmulti=None if "allmulti" not in before else before["allmulti"] == "1",
        tx_queue=int(before.get("txQLen", 0)),
    )
    ops = settings(record.key.ifname, was)
    return (Phase("netns", ops, record.netns, tolerant=True),) if ops else ()
