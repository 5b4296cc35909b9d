"""Every firewall rule that one record wants: the one place that ADD, DEL, heal and GC ask."""

from __future__ import annotations

from collections.abc import Iterator

from towpath.model import Attachment
from towpath.parts import ports
from towpath.plan import Accept, AddRule, DropRule, Fence, Masquerade, Phase, PinMac, Plan, Rule


def rules(record: Attachment) -> Iterator[Rule]:
    """In the order in which they should appear; every rule names its owner."""
    owner = str(record.key)
    if "wire" in record.parts:
        if record.spoof_check:
            yield PinMac(record.veth, record.mac, owner)
        if record.masquerade:
            for lease in record.leases:
                yield Masquerade(lease.address, record.home, owner, inner=record.mode == "overlay")
    if "firewall" in record.parts:
        for address in record.addresses:
            yield Accept(address, record.home, owner)
            if record.isolation != "open":
                yield Fence(address, record.home, record.isolation, owner)
    if "ports" in record.parts:
        yield from ports.rules(record)


def plan_rules(record: Attachment) -> Plan:
    """All of them in one transaction."""
    ops = tuple(AddRule(rule) for rule in rules(record))
    return (Phase("firewall", ops, firewall=record.firewall),) if ops else ()


def plan_drop_rules(record: Attachment) -> Plan:
    ops = tuple(DropRule(rule) for rule in rules(record))
    return (Phase("firewall", ops, firewall=record.firewall),) if ops else ()
