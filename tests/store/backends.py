"""The backends that the conformance suite is run against, and what tests of all of them need."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store import engine
from tests.store.hand_clock import HandClock
from towpath.store.cached import CachedStore
from towpath.store.contract import Batch, Event, Progress, Reset, Store
from towpath.store.etcd.store import EtcdStore
from towpath.store.local import LocalStore
from towpath.store.memory import MemoryStore
from towpath.store.sqlite import SqliteStore
from towpath.store.watch import Watch

Said = Batch | Progress | Reset

AnyStore = LocalStore | EtcdStore | CachedStore

_numbers = itertools.count()
on_the_way = 0.0  # seconds that a request takes at most, where the backend of the test is another process


def etcd_store(_: Path, clock: HandClock, history: int) -> EtcdStore:
    """A store as if its engine were new: a prefix and a first revision of its own on the one engine of the run."""
    if not engine.installed():
        pytest.skip(engine.MISSING)
    clock.stuck = "etcd counts the time of leases itself: see test_etcd.py"
    member = engine.one_member()
    prefix = f"/test-{next(_numbers)}/"
    origin = engine.fresh_origin(member)
    return EtcdStore((member.endpoint,), prefix, clock=clock, history=history, origin=origin)


def cached_store(path: Path, clock: HandClock, history: int) -> CachedStore:
    engine = MemoryStore(clock=clock, history=history)
    return CachedStore(engine, path.with_suffix(".snap"), cluster="c", clock=clock, history=history)


BACKENDS: dict[str, Callable[[Path, HandClock, int], AnyStore]] = {
    "cached": cached_store,
    "etcd": etcd_store,
    "memory": lambda _, clock, history: MemoryStore(clock=clock, history=history),
    "sqlite": lambda path, clock, history: SqliteStore(path, ballast=False, clock=clock, history=history),
}


async def settle() -> None:
    """Let every task run as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)
    await asyncio.sleep(on_the_way)


async def caught_up(store: EtcdStore | CachedStore) -> None:
    """Wait until the store's watches know all that happened in the engine."""
    async with asyncio.timeout(10):
        target = (await store.list("none")).revision
        while store.revision < target:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def heard(watch: Watch) -> list[Said]:
    """All that a watch has to say now."""
    said: list[Said] = []
    if isinstance(watch._history, (EtcdStore, CachedStore)) and not watch._ended:
        await caught_up(watch._history)
    while True:
        asking = asyncio.ensure_future(anext(watch))
        for _ in range(10):
            await asyncio.sleep(0)
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
