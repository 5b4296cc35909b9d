"""A store that goes on serving while its engine is away: from memory, and from a snapshot after a restart.

While the engine is there, reads and writes are its own. While it is away:
- reads answer what was last known, with this node's own writes laid over it;
- writes without compares and leases are kept and written when it is back, of each key the last one: they are meant for
  rows that only this node writes. All others need the engine's agreement and raise StoreUnavailable at once;
- watches hear Reset when an own write changes what a list says, and again where the engine comes back with a past that
  cannot be told. Otherwise they go on where they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

from towpath.store.clock import Clock, LoopClock, sleep
from towpath.store.contract import (
    Batch,
    Change,
    Compare,
    Delete,
    Event,
    Item,
    Listing,
    OutcomeUnknown,
    Progress,
    Put,
    Status,
    Store,
    StoreError,
    StoreUnavailable,
    TxnResult,
)
from towpath.store.local import HISTORY
from towpath.store.mirror import Mirror
from towpath.store.ownership import Term, allocate, elect
from towpath.store.snapshot import Snapshot, SnapshotBroken, load, save
from towpath.store.transaction import check, check_key, decide
from towpath.store.watch import Watch, Watches

PROBE = 1.0  # seconds between looks whether the engine is there
SAVE = 1.0  # seconds between snapshots at least
PROBED = "probe"  # a key that nobody writes

T = TypeVar("T")
log = logging.getLogger(__name__)


class CachedStore:
    """`engine`: the true store, opened and closed here. path: of the snapshot; cluster: whose rows it may hold."""

    def __init__(
        self, engine: Store, path: Path, *, cluster: str, clock: Clock | None = None, history: int = HISTORY
    ) -> None:
        self._engine = engine
        self._path = path
        self._cluster = cluster
        self._clock = clock or LoopClock()
        self._mirror = Mirror(history)
        self._watches = Watches()
        self._terms: WeakSet[Term] = WeakSet()
        self._tasks: list[asyncio.Task[None]] = []
        self._looked = asyncio.Event()  # at the engine, once
        self._is_open = False
        self._synced = False  # the mirror follows the engine
        self._here = False  # the engine answers, and has all own writes
        self._known = 0
        self._saved = 0

    async def open(self) -> None:
        """Returns when the engine was found, or found to be away. Raises WrongCluster for a snapshot of another one."""
        if self._is_open:
            raise ValueError("the store is open already")
        self._load()
        self._is_open = True
        self._looked.clear()
        self._start(self._follow())
        self._start(self._probe())
        self._start(self._keep_saved())
        await self._looked.wait()

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = self._here = self._synced = False
        for term in list(self._terms):
            term.abandon()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._watches.end()
        await self._engine.close()
        await self._save()

    @property
    def away(self) -> bool:
        """Whether answers may be of the past."""
        return not self._here

    async def get(self, key: str) -> Item | None:
        self._check_open()
        check_key(key)
        if self._here:
            with contextlib.suppress(StoreUnavailable):
                return await self._ask(self._engine.get(key))
        return self._mirror.read((key,)).get(key)

    async def list(self, prefix: str, *, limit: int = 0, after: str = "") -> Listing:
        self._check_open()
        if limit < 0:
            raise ValueError(f"limit {limit} is negative")
        if self._here:
            with contextlib.suppress(StoreUnavailable):
                listing = await self._ask(self._engine.list(prefix, limit=limit, after=after))
                self._known = max(self._known, listing.revision)
                return listing
        items = self._mirror.scan(prefix, after, limit + 1 if limit else 0)
        more = 0 < limit < len(items)
        return Listing(tuple(items[:limit] if more else items), self._mirror.revision, more)

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        return (await self.txn((), (Put(key, value, lease),))).revision

    async def delete(self, key: str, *, prefix: bool = False) -> int:
        return (await self.txn((), (Delete(key, prefix),))).revision

    async def txn(
        self,
        compares: tuple[Compare, ...] = (),
        then: tuple[Change, ...] = (),
        orelse: tuple[Change, ...] = (),
        *,
        durable: bool = False,
        releasing: bool = False,
    ) -> TxnResult:
        self._check_open()
        check(compares, then, orelse)
        can_wait = not compares and not any(isinstance(change, Put) and change.lease for change in then)
        if not self._here and not can_wait:
            raise StoreUnavailable("the engine is away, and this write needs its agreement")
        if self._here:
            try:
                writing = self._engine.txn(compares, then, orelse, durable=durable, releasing=releasing)
                return self._written(await self._ask(writing), then, orelse)
            except (StoreUnavailable, OutcomeUnknown):
                if not can_wait or not self.away:
                    raise
        return self._wait_with(then)

    def watch(self, prefix: str, from_revision: int = 0) -> Watch:
        self._check_open()
        if from_revision < 0:
            raise ValueError(f"from_revision {from_revision} is negative")
        first = from_revision or max(self._known, self._mirror.revision) + 1
        return self._watches.add(Watch(self, prefix, first, self._known))

    async def grant(self, ttl: float) -> int:
        return await self._ask(self._engine.grant(ttl))

    async def keep_alive(self, lease: int) -> float:
        return await self._ask(self._engine.keep_alive(lease))

    async def revoke(self, lease: int) -> None:
        await self._ask(self._engine.revoke(lease))

    async def elect(self, name: str, value: bytes, *, ttl: float = 6.0) -> Term:
        term = await elect(self, name, value, ttl=ttl, clock=self._clock)
        self._terms.add(term)
        return term

    async def allocate(self, prefix: str, candidates: tuple[str, ...], owner: bytes) -> str | None:
        """While the engine is away, only what `owner` is known to hold already."""
        return await allocate(self, prefix, candidates, owner)

    async def compact(self, keep: int) -> None:
        await self._ask(self._engine.compact(keep))
        self._mirror.log.forget(max(0, self._mirror.revision - keep))
        self._watches.wake()

    async def status(self) -> Status:
        """As the engine's, or what is known here; detail: engine (here, away), waiting (own writes), watches."""
        self._check_open()
        found = Status("cached", self._mirror.revision, self._mirror.count())
        if self._here:
            with contextlib.suppress(StoreUnavailable):
                found = await self._ask(self._engine.status())
        own = {
            "engine": "away" if self.away else "here",
            "waiting": str(len(self._mirror.backlog)),
            "watches": str(len(self._watches)),
        }
        return Status(found.backend, found.revision, found.keys, tuple((dict(found.detail) | own).items()))

    # --- what watches read ---

    @property
    def revision(self) -> int:
        return self._mirror.revision

    @property
    def forgotten(self) -> int:
        return self._mirror.log.forgotten

    def events(self, first: int, last: int, prefix: str) -> Sequence[Event]:
        return self._mirror.log.events(first, last, prefix)

    # --- writes ---

    def _written(self, result: TxnResult, then: tuple[Change, ...], orelse: tuple[Change, ...]) -> TxnResult:
        self._known = max(self._known, result.revision)
        puts = {change.key: change for change in (then if result.ok else orelse) if isinstance(change, Put)}
        self._mirror.wrote([puts.get(key, Delete(key)) for key in result.changed], result.revision)
        return result

    def _wait_with(self, then: tuple[Change, ...]) -> TxnResult:
        """Keep these changes until the engine is back."""
        events = decide(self._mirror, (), then, (), self._mirror.revision).events
        puts = {change.key: change for change in then if isinstance(change, Put)}
        self._mirror.backlog.add(*(puts.get(event.item.key, Delete(event.item.key)) for event in events))
        for event in events:
            self._watches.lose(event.item.key)
        return TxnResult(True, self._mirror.revision, (), tuple(event.item.key for event in events))

    async def _flush(self) -> None:
        """Let the engine have what waits. Raises StoreUnavailable, OutcomeUnknown: then it goes on waiting."""
        backlog = self._mirror.backlog
        while changes := backlog.next():
            try:
                self._written(await self._engine.txn((), changes), changes, ())
            except (StoreUnavailable, OutcomeUnknown):
                raise
            except StoreError:
                if len(changes) > 1:  # one of them it will not have: find out which
                    await self._flush_singly(changes)
                else:
                    log.exception("the engine will never take this write", extra={"key": changes[0].key})
            backlog.done(changes)

    async def _flush_singly(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            try:
                self._written(await self._engine.txn((), (change,)), (change,), ())
            except (StoreUnavailable, OutcomeUnknown):
                raise
            except StoreError:
                log.exception("the engine will never take this write", extra={"key": change.key})

    # --- the engine ---

    def _check_open(self) -> None:
        if not self._is_open:
            raise StoreUnavailable("the store is not open")

    async def _ask(self, asking: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
        """What the engine says. Where it is away that is known at once from then on."""
        if not self._here:
            if isinstance(asking, Coroutine):
                asking.close()
            raise StoreUnavailable("the store is not open" if not self._is_open else "the engine is away")
        try:
            return await asking
        except (StoreUnavailable, OutcomeUnknown) as exc:
            self._lost(exc)
            raise

    def _lost(self, why: StoreError) -> None:
        if self._here:
            log.warning("the cluster store is away, serving what is known", extra={"reason": why.what})
        self._here = False
        self._looked.set()

    async def _follow(self) -> None:
        """Open the engine, copy all it has, and then what happens."""
        opened = False
        while True:
            try:
                if not opened:
                    await self._engine.open()
                    opened = True
                await self._copy()
            except StoreError as exc:
                self._lost(exc)
                await sleep(self._clock, PROBE)

    async def _copy(self) -> None:
        """Returns when the copy has to begin anew."""
        listing = await self._engine.list("")
        self._take_over(listing)
        async for said in self._engine.watch("", listing.revision + 1):
            if isinstance(said, Batch):
                before = self._mirror.revision
                self._mirror.add(said.revision, said.events)
                self._watches.notice(said.revision, said.events, before)
            elif isinstance(said, Progress):
                self._mirror.add(said.revision, ())
            else:
                return

    def _take_over(self, listing: Listing) -> None:
        self._mirror.replace(listing.items, listing.revision)
        self._known = max(self._known, listing.revision)
        self._synced = True
        self._watches.wake()  # those who were behind hear Reset

    async def _probe(self) -> None:
        while True:
            if self._synced:
                await self._look()
            await sleep(self._clock, PROBE if self._synced else PROBE / 20)

    async def _look(self) -> None:
        """Is the engine there? What waits is written before anybody else asks it."""
        try:
            await self._engine.get(PROBED)
            await self._flush()
        except (StoreUnavailable, OutcomeUnknown) as exc:
            self._lost(exc)
            return
        if not self._here:
            log.info("the cluster store is there")
        self._here = True
        self._looked.set()

    # --- the snapshot ---

    def _load(self) -> None:
        try:
            snapshot = load(self._path, self._cluster)
        except SnapshotBroken as exc:
            log.warning("the snapshot is not used", extra={"reason": exc.what})
            return
        if snapshot and snapshot.revision > self._mirror.revision:
            self._mirror.replace(snapshot.items, snapshot.revision)
            self._known = self._saved = snapshot.revision

    async def _keep_saved(self) -> None:
        while True:
            began = self._clock.now()
            await self._save()
            # A large cluster's snapshot costs what it costs: a twentieth of the time at most.
            await sleep(self._clock, max(SAVE, 20 * (self._clock.now() - began)))

    async def _save(self) -> None:
        revision = self._mirror.revision
        if revision == self._saved:
            return
        snapshot = Snapshot(self._cluster, revision, self._mirror.engine_items())
        try:
            await asyncio.to_thread(save, self._path, snapshot)
        except OSError as exc:
            log.warning("the snapshot is not written", extra={"path": str(self._path), "reason": str(exc)})
            return
        self._saved = revision

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(_tell_crash)
        self._tasks.append(task)


def _tell_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (exc := task.exception()):
        log.error("the cached store stopped working", exc_info=exc)
