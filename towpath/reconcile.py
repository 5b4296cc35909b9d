"""The one reconcile loop: at start, on change, on a timer, the kernel is brought to what the tables say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from towpath.attach import Attacher
from towpath.errors import TowpathError
from towpath.kernel.contract import Wanted
from towpath.parts import rules

log = logging.getLogger(__name__)

SETTLE = 0.2  # seconds: a burst of changes becomes one run
INTERVAL = 30.0  # seconds between runs where nothing was heard


ALL = frozenset({"firewall", "links", "addresses"})


class Dirty:
    """What changed since the last run: words of Kernel.changes."""

    def __init__(self) -> None:
        self._words: set[str] = set()
        self._event = asyncio.Event()

    def mark(self, word: str) -> None:
        self._words.add(word)
        self._event.set()

    def take(self) -> frozenset[str]:
        """What was marked; from now on it counts as clean."""
        words, self._words = frozenset(self._words), set()
        self._event.clear()
        return words

    async def wait(self) -> None:
        await self._event.wait()


async def heal(attacher: Attacher, setting: str, words: frozenset[str] = ALL) -> int:
    """One run over what `words` name; returns how many things had to be changed (0 = nothing was written).

    setting: the configuration's firewall: auto, nftables or iptables.

    ALL reads everything. Otherwise the rules are read only where somebody else wrote to the firewall, and of the links
    only the shared devices: every ADD changes links, and a node may hold thousands.
    """
    full = words == ALL
    changed = 0
    if "firewall" in words:
        before = attacher.setting.firewall
        await attacher.follow_firewall(setting)
        used = {record.firewall for record in attacher.records.values() if record.firewall}
        # The one that moved in first, so that no port is closed for a moment; the one that was left last.
        for backend in dict.fromkeys((attacher.setting.firewall, *sorted(used), before)):
            changed += await attacher.kernel.heal(backend, partial(_wanted, attacher, backend), full)
    if "addresses" in words:
        await attacher.look_at_node()
        changed += await attacher.networks.verify()
    elif "links" in words:
        changed += await attacher.networks.verify_devices()
    if full:
        await attacher.sweep()
    return changed


def _wanted(attacher: Attacher, firewall: str) -> Wanted:
    """Called in the writer's thread: the copy is one step of the interpreter, so no ADD changes the dict under it."""
    records = [record for record in list(attacher.records.values()) if record.firewall == firewall]
    settled = [rule for record in records if record.phase == "attached" for rule in rules.rules(record)]
    settled += attacher.standing() if firewall == attacher.setting.firewall else ()
    moving = [rule for record in records if record.phase != "attached" for rule in rules.rules(record)]
    return Wanted(tuple(settled), tuple(moving))


async def adopt_devices(attacher: Attacher) -> None:
    """After a start: networks that have attachments are watched over again."""
    for name in {key.network for key, record in attacher.records.items() if "wire" in record.parts}:
        if name in attacher.networks.rows:
            attacher.networks.up.add(name)


async def follow(changes: AsyncIterator[str], dirty: Dirty) -> None:
    """Mark dirty whatever the kernel says has changed."""
    async for word in changes:
        dirty.mark(word)


async def reconcile(dirty: Dirty, run: Callable[[frozenset[str]], Awaitable[int]]) -> None:
    """In full at start and every INTERVAL seconds, once per burst of changes; a run that fails is tried again."""
    words, last = ALL, 0.0
    now = asyncio.get_running_loop().time
    while True:
        if words == ALL:
            last = now()
        try:
            if changed := await run(words):
                log.warning("kernel brought back to the tables", extra={"changed": changed})
        except TowpathError as failed:
            log.error("reconcile failed", extra={"error": str(failed)})
        try:
            await asyncio.wait_for(dirty.wait(), max(0.0, last + INTERVAL - now()))
        except TimeoutError:
            words = ALL
            continue
        await asyncio.sleep(SETTLE)
        words = dirty.take()  # before the run: a change that arrives meanwhile is not lost
