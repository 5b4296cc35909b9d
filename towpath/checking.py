"""CHECK: in words, how the kernel differs from what a record says of its parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from towpath import mode
from towpath.kernel.contract import Kernel
from towpath.model import Attachment
from towpath.networks import Networks
from towpath.parts import rules


async def problems(kernel: Kernel, record: Attachment, networks: Networks, asked: tuple[str, ...]) -> tuple[str, ...]:
    """() = all is as the record says."""
    found = [f"{record.key} has no {part}" for part in asked if part not in record.parts]
    held = replace(record, parts=tuple(part for part in record.parts if part in asked))
    if "wire" in held.parts:
        node, inside = await kernel.look(), await kernel.look(record.netns)
        found += mode.get(record.mode).check(record, networks.get(record.key.network), node, inside)
    found += await _missing_rules(kernel, held)
    if "bandwidth" in held.parts:
        found += [problem async for problem in _unshaped(kernel, held)]
    if "tuning" in held.parts:
        found += await _untuned(kernel, held)
    return tuple(found)


async def _missing_rules(kernel: Kernel, record: Attachment) -> list[str]:
    wanted = list(rules.rules(record))
    if not wanted:
        return []
    firewall = kernel.firewall(record.firewall)
    seen = await asyncio.to_thread(firewall.seen)
    return [
        f"firewall rule is missing: {firewall.describe(rule)}"
        for rule in wanted
        if not firewall.fingerprints([rule]) <= seen
    ]


async def _unshaped(kernel: Kernel, record: Attachment) -> AsyncIterator[str]:
    shape = record.bandwidth
    for link, rate in ((record.veth, shape.ingress_rate), (record.key.ifb(), shape.egress_rate)):
        if rate:
            seen = {s.rate for s in await kernel.shapes(link) if s.kind == "tbf"}
            # The kernel keeps whole bytes per second.
            if not any(abs(rate - held) < 8 for held in seen):
                yield f"bandwidth of {link} is {', '.join(map(str, seen)) or 'not limited'}, not {rate} bit/s"


async def _untuned(kernel: Kernel, record: Attachment) -> list[str]:
    tuned, ifname = record.tuning, record.key.ifname
    values = [(path, value, await kernel.sysctl(path, record.netns)) for path, value in tuned.sysctl]
    found = [f"sysctl {path} is {now!r}, not {value!r}" for path, value, now in values if now != value]
    link = await kernel.link(ifname, record.netns)
    if link is None:
        return [*found, f"interface {ifname} is missing in {record.netns}"]
    for what, wanted, now in (
        ("MAC", tuned.mac or link.mac, link.mac),
        ("MTU", tuned.mtu or link.mtu, link.mtu),
        ("promisc", link.promiscuous if tuned.promiscuous is None else tuned.promiscuous, link.promiscuous),
        ("allmulti", link.allmulti if tuned.allmulti is None else tuned.allmulti, link.allmulti),
        ("txQLen", tuned.tx_queue or link.tx_queue, link.tx_queue),
    ):
        if wanted != now:
            found.append(f"{what} of {ifname} is {now}, not {wanted}")
    return found
