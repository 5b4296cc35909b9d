"""The backends that the conformance suite is run against, and what tests of all of them need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from tests.store.hand_clock import HandClock
from towpath.store.contract import Batch, Event, Progress, Reset, Store
from towpath.store.local import LocalStore
from towpath.store.memory import MemoryStore
from towpath.store.sqlite import SqliteStore
from towpath.store.watch import Watch

Said = Batch | Progress | Reset

BACKENDS: dict[str, Callable[[Path, HandClock, int], LocalStore]] = {
    "memory": lambda _, clock, history: MemoryStore(clock=clock, history=history),
    "sqlite": lambda path, clock, history: SqliteStore(path, ballast=False, clock=clock, history=history),
}


async def settle() -> None:
    """Let every task run as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def heard(watch: Watch) -> list[Said]:
    """All that a watch has to say now."""
    said: list[Said] = []
    while True:
        asking = asyncio.ensure_future(anext(watch))
        await settle()
        if not asking.done():
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return said
        said.append(asking.result())


def told(batch: Said) -> list[str]:
    """A batch in short: +key=value, -key."""
    assert isinstance(batch, Batch)
    return [_short(event) for event in batch.events]


def _short(event: Event) -> str:
    return f"-{event.item.key}" if event.deleted else f"+{event.item.key}={event.item.value.decode()}"


async def keys(store: Store, prefix: str = "") -> list[str]:
    return [item.key for item in (await store.list(prefix)).items]
