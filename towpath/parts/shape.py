"""Bandwidth of one attachment as a plan: token buckets on its host end and on a device of its own."""

from __future__ import annotations

from towpath.model import Attachment
from towpath.plan import DropLink, LinkOp, Phase, Plan, Shape, Unshape


def plan_shape(record: Attachment, mtu: int = 0) -> Plan:
    """Needs record.veth. One ifb per attachment, made only where what the container sends is limited."""
    if not record.bandwidth:
        return ()
    return (Phase("host", (Shape(record.veth, record.key.ifb(), record.bandwidth, mtu),)),)


def plan_unshape(record: Attachment) -> Plan:
    """A wire of ours takes its queues along when it goes; on a foreign one they are removed first."""
    if not record.bandwidth:
        return ()
    ops: list[LinkOp] = []
    if "wire" not in record.parts and record.veth:
        ops.append(Unshape(record.veth))
    if record.bandwidth.egress_rate:
        ops.append(DropLink(record.key.ifb()))
    return (Phase("host", tuple(ops)),) if ops else ()
