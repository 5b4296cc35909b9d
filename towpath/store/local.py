"""The store of one process: transactions, watches and leases over rows that a backend keeps.

Methods are `async` because the contract is, but none waits for anything: from its first line to its last nobody else
runs on the loop, and that is what makes a transaction atomic. So a store belongs to one event loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakSet

from towpath.store.clock import Clock, LoopClock
from towpath.store.contract import (
    Change,
    Compare,
    Delete,
    Event,
    Item,
    LeaseGone,
    Listing,
    Put,
    Status,
    StoreUnavailable,
    TxnResult,
)
from towpath.store.leases import Leases
from towpath.store.ownership import Term, allocate, elect
from towpath.store.rows import Rows, Write
from towpath.store.transaction import check, check_key, decide, deletions
from towpath.store.watch import Watch, Watches

HISTORY = 10_000  # revisions whose events are kept
TRIM_EVERY = 64  # revisions: dropping events one by one would cost a tenth of each write


class LocalStore:
    """Store over `rows`. history: how many revisions a watch may lag behind before it hears Reset."""

    def __init__(self, rows: Rows, *, clock: Clock | None = None, history: int = HISTORY) -> None:
        self._rows = rows
        self._clock = clock or LoopClock()
        self._depth = history
        self._leases = Leases(self._clock, self._end_lease)
        self._watches = Watches()
        self._terms: WeakSet[Term] = WeakSet()
        self._revision = 0
        self._forgotten = 0
        self._is_open = False

    async def open(self) -> None:
        if self._is_open:
            raise ValueError("the store is open already")
        found = self._rows.open()
        self._revision = found.revision
        self._forgotten = found.forgotten
        self._is_open = True
        self._leases.start(found.leases)

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        for term in list(self._terms):
            term.abandon()
        self._leases.stop()
        self._watches.end()
        self._rows.close()

    async def get(self, key: str) -> Item | None:
        self._check_open()
        check_key(key)
        return self._rows.read((key,)).get(key)

    async def list(self, prefix: str, *, limit: int = 0, after: str = "") -> Listing:
        self._check_open()
        if limit < 0:
            raise ValueError(f"limit {limit} is negative")
        items = self._rows.scan(prefix, after, limit + 1 if limit else 0)
        more = 0 < limit < len(items)
        return Listing(tuple(items[:limit] if more else items), self._revision, more)

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
        decision = decide(self._rows, compares, then, orelse, self._revision + 1)
        if decision.events:
            self._check_leases(decision.events)
            self._write(decision.events, durable=durable, releasing=releasing)
        changed = tuple(event.item.key for event in decision.events)
        return TxnResult(decision.ok, self._revision, decision.failed, changed)

    def watch(self, prefix: str, from_revision: int = 0) -> Watch:
        self._check_open()
        if from_revision < 0:
            raise ValueError(f"from_revision {from_revision} is negative")
        return self._watches.add(Watch(self, prefix, from_revision or self._revision + 1))

    async def grant(self, ttl: float) -> int:
        self._check_open()
        if not 0 < ttl < math.inf:
            raise ValueError(f"a lease of {ttl} seconds cannot be")
        lease = self._rows.grant(ttl)
        self._leases.add(lease, ttl)
        return lease

    async def keep_alive(self, lease: int) -> float:
        self._check_open()
        return self._leases.renew(lease)

    async def revoke(self, lease: int) -> None:
        self._check_open()
        if lease in self._leases:
            self._end_lease(lease)

    async def elect(self, name: str, value: bytes, *, ttl: float = 6.0) -> Term:
        term = await elect(self, name, value, ttl=ttl, clock=self._clock)
        self._terms.add(term)
        return term

    async def allocate(self, prefix: str, candidates: tuple[str, ...], owner: bytes) -> str | None:
        return await allocate(self, prefix, candidates, owner)

    async def compact(self, keep: int) -> None:
        self._check_open()
        if keep < 0:
            raise ValueError(f"cannot keep {keep} revisions")
        forgotten = max(self.forgotten, self._revision - keep)
        self._rows.compact(forgotten, self._revision)
        self._forgotten = forgotten

    async def status(self) -> Status:
        self._check_open()
        own = (("leases", str(len(self._leases))), ("watches", str(len(self._watches))))
        return Status(self._rows.name, self._revision, self._rows.count(), own + self._rows.describe())

    # --- what watches read ---

    @property
    def revision(self) -> int:
        return self._revision

    @property
    def forgotten(self) -> int:
        return max(self._forgotten, self._revision - self._depth)

    def events(self, first: int, last: int, prefix: str) -> Sequence[Event]:
        return self._rows.events(first, last, prefix)

    # --- inside ---

    def _check_open(self) -> None:
        if not self._is_open:
            raise StoreUnavailable("the store is not open")

    def _check_leases(self, events: tuple[Event, ...]) -> None:
        for event in events:
            lease = event.item.lease
            if lease and not event.deleted and lease not in self._leases:
                raise LeaseGone(f"{event.item.key!r} cannot be written: lease {lease} does not exist")

    def _write(
        self, events: tuple[Event, ...], *, ended: int = 0, durable: bool = False, releasing: bool = False
    ) -> None:
        """Keep `events` as one revision (none: only the lease ends), then tell the watches."""
        revision = self._revision + 1 if events else self._revision
        releasing = releasing or all(event.deleted for event in events)
        forget = 0 if revision % TRIM_EVERY else max(0, revision - self._depth)
        self._rows.write(Write(revision, events, ended, forget, durable, releasing))
        self._revision = revision
        if events:
            self._watches.notice(revision, events, revision - 1)

    def _end_lease(self, lease: int) -> None:
        self._write(deletions(self._rows.leased(lease), self._revision + 1), ended=lease)
        self._leases.drop(lease)
