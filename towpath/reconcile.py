"""The one reconcile loop: at start, on change, on a timer, the kernel is brought to what the tables say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial

from towpath.attach import Attacher
from towpath.errors import TowpathError
from towpath.kernel.contract import Wanted
from towpath.parts import rules

log = logging.getLogger(__name__)

SETTLE = 0.2  # seconds: a burst of changes becomes one run
INTERVAL = 30.0  # seconds between runs where nothing was heard


async def heal(attacher: Attacher, full: bool = True) -> int:
    """One run: firewall rules, then shared devices. Returns how many things had to be changed (0 = nothing written).

    full=False: the rules are read only where somebody else wrote to the firewall.
    """
    name = attacher.setting.firewall
    backends = {name, *(record.firewall for record in attacher.records.values() if record.firewall)}
    changed = 0
    for backend in sorted(backends):
        changed += await attacher.kernel.heal(backend, partial(_wanted, attacher, backend), full)
    await look_at_node(attacher)
    if full:
        await attacher.sweep()
    return changed + await attacher.networks.verify()


def _wanted(attacher: Attacher, firewall: str) -> Wanted:
    """Called in the writer's thread: the copy is one step of the interpreter, so no ADD changes the dict under it."""
    records = [record for record in list(attacher.records.values()) if record.firewall == firewall]
    settled = [rule for record in records if record.phase == "attached" for rule in rules.rules(record)]
    moving = [rule for record in records if record.phase != "attached" for rule in rules.rules(record)]
    return Wanted(tuple(settled), tuple(moving))


async def look_at_node(attacher: Attacher) -> None:
    """The node's own addresses, as host mode reports them: neither loopback and link-local ones nor our gateways'."""
    seen = await attacher.kernel.look()
    ours = {link.name for link in seen.links if link.name == "lo" or link.alias == "towpath"}
    addresses = tuple(a for link, a in seen.addresses if link not in ours and not a.ip.is_link_local)
    attacher.node = replace(attacher.node, addresses=addresses)


async def adopt_devices(attacher: Attacher) -> None:
    """After a start: networks that have attachments are watched over again."""
    for name in {key.network for key, record in attacher.records.items() if "wire" in record.parts}:
        if name in attacher.networks.rows:
            attacher.networks.up.add(name)


async def follow(changes: AsyncIterator[str], dirty: asyncio.Event) -> None:
    """Mark dirty whenever the kernel says that something changed."""
    async for _ in changes:
        dirty.set()


async def reconcile(dirty: asyncio.Event, run: Callable[[bool], Awaitable[int]]) -> None:
    """In full at start and every INTERVAL seconds, once per burst of changes; a run that fails is tried again."""
    full = True
    while True:
        dirty.clear()  # first: a change that arrives meanwhile is not lost
        try:
            if changed := await run(full):
                log.warning("kernel brought back to the tables", extra={"changed": changed})
        except TowpathError as failed:
            log.error("reconcile failed", extra={"error": str(failed)})
        try:
            await asyncio.wait_for(dirty.wait(), INTERVAL)
        except TimeoutError:
            full = True
            continue
        full = False
        await asyncio.sleep(SETTLE)
