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
from towpath.model import Attachment
from towpath.parts import rules

log = logging.getLogger(__name__)

SETTLE = 0.6  # seconds: a burst of changes becomes one run, and a CHECK meanwhile still sees what is wrong
INTERVAL = 120.0  # seconds between looks for what makes no sound: a thousand namespaces cost 0.1 s
FULL = 600.0  # seconds between readings of everything: nothing should be found then


# What a run looks at. The kernel names the first three when they change; the dead say nothing.
ALL = frozenset({"firewall", "links", "addresses", "dead"})
ROUTINE = frozenset({"firewall", "links", "dead"})


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
    if full or ("firewall" in words and await attacher.kernel.touched(attacher.setting.firewall)):
        changed += await _heal_firewall(attacher, setting)
    if "addresses" in words:
        await attacher.look_at_node()
        changed += await attacher.networks.verify()
    elif "links" in words:
        changed += await attacher.networks.verify_devices()
    if "dead" in words:
        await attacher.sweep()
    return changed


async def _heal_firewall(attacher: Attacher, setting: str) -> int:
    before, changed = attacher.setting.firewall, 0
    await attacher.follow_firewall(setting)
    used = {record.firewall for record in attacher.records.values() if record.firewall}
    # The one that moved in first, so that no port is closed for a moment; the one that was left last.
    for backend in dict.fromkeys((attacher.setting.firewall, *sorted(used), before)):
        changed += await attacher.kernel.heal(backend, partial(_wanted, attacher, backend))
    return changed


def _wanted(attacher: Attacher, firewall: str) -> Wanted:
    """Called in the writer's thread: the copy is one step of the interpreter, so no ADD changes the dict under it."""
    records = [record for record in list(attacher.records.values()) if record.firewall == firewall]
    settled = [rule for record in records for rule in rules.rules(with_parts(record, settled_parts(record)))]
    settled += attacher.standing() if firewall == attacher.setting.firewall else ()
    under_way = [record for record in records if record.phase != "attached"]
    moving = [rule for record in under_way for rule in rules.rules(with_parts(record, moving_parts(record)))]
    return Wanted(tuple(settled), tuple(moving))


def moving_parts(record: Attachment) -> tuple[str, ...]:
    """The parts that an ADD or DEL is at work on."""
    if record.phase == "attached":
        return ()
    return record.making if record.phase == "claimed" and record.making else record.parts


def settled_parts(record: Attachment) -> tuple[str, ...]:
    moving = moving_parts(record)
    return tuple(part for part in record.parts if part not in moving)


def with_parts(record: Attachment, parts: tuple[str, ...]) -> Attachment:
    return record if parts == record.parts else replace(record, parts=parts)


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
    """In full at start and every FULL seconds, ROUTINE every INTERVAL, else once per burst of what changed.

    A run that fails is tried again by the next one.
    """
    now = asyncio.get_running_loop().time
    words, routine, full = ALL, now() + INTERVAL, now() + FULL
    missed: frozenset[str] = frozenset()
    while True:
        words, missed = words | missed, words | missed
        try:
            if changed := await run(words):
                log.warning("kernel brought back to the tables", extra={"changed": changed})
            missed = frozenset()
        except TowpathError as failed:
            log.error("reconcile failed", extra={"error": str(failed)})
        except Exception:  # a netlink socket that overflowed, say: whatever it was, there is a next run
            log.exception("reconcile failed")
        try:
            async with asyncio.timeout(max(0.0, routine - now())):  # wait_for may swallow a cancellation (3.11)
                await dirty.wait()
        except TimeoutError:
            words, routine = (ALL if now() >= full else ROUTINE), now() + INTERVAL
            full = now() + FULL if words == ALL else full
            continue
        await asyncio.sleep(SETTLE)
        words = dirty.take()  # before the run: a change that arrives meanwhile is not lost
