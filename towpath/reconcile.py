"""The one reconcile loop: at start, on change, on a timer, the kernel is brought to what the tables say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial

from towpath.attach import Attacher
from towpath.errors import TowpathError
from towpath.parts import rules
from towpath.plan import Rule

log = logging.getLogger(__name__)

SETTLE = 0.2  # seconds: a burst of changes becomes one run
INTERVAL = 30.0  # seconds between runs where nothing was heard


async def heal(attacher: Attacher) -> int:
    """One run: firewall rules, then shared devices. Returns how many things had to be changed (0 = nothing written)."""
    name = attacher.setting.firewall
    backends = {name, *(record.firewall for record in attacher.records.values() if record.firewall)}
    changed = 0
    for backend in sorted(backends):
        # Asked when the writer's turn has come: a rule whose ADD is under way is wanted already, one that leaves not.
        changed += await attacher.kernel.heal(backend, partial(_wanted, attacher, backend))
    await look_at_node(attacher)
    return changed + await attacher.networks.verify()


def _wanted(attacher: Attacher, firewall: str) -> list[Rule]:
    # In the writer's thread: the copy is one step of the interpreter, so that no ADD changes the dict under the loop.
    return list(rules.wanted(list(attacher.records.values()), firewall))


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


async def reconcile(dirty: asyncio.Event, run: Callable[[], Awaitable[int]]) -> None:
    """At start, once per burst of changes, and every INTERVAL seconds; one failed run is logged and tried again."""
    while True:
        dirty.clear()  # first: a change that arrives meanwhile is not lost
        try:
            if changed := await run():
                log.warning("kernel brought back to the tables", extra={"changed": changed})
        except TowpathError as failed:
            log.error("reconcile failed", extra={"error": str(failed)})
        try:
            await asyncio.wait_for(dirty.wait(), INTERVAL)
        except TimeoutError:
            continue
        await asyncio.sleep(SETTLE)
