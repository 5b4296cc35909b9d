"""Elections and allocations, built from transactions, leases and watches alone: one place for every backend."""

from __future__ import annotations

import asyncio

from towpath.store.clock import Clock, sleep
from towpath.store.contract import (
    Absent,
    Batch,
    LeaseGone,
    OutcomeUnknown,
    Put,
    Reset,
    Store,
    StoreUnavailable,
)


class Term:
    """Leadership of `name`, kept up by a task until it is resigned or lost."""

    def __init__(self, store: Store, name: str, lease: int, ttl: float, clock: Clock, since: float) -> None:
        self.name = name
        self._store = store
        self._lease = lease
        self._ttl = ttl
        self._clock = clock
        self._until = since + ttl
        self._over = False
        self._upkeep = asyncio.get_running_loop().create_task(self._keep_up(), name=f"leading {name}")

    @property
    def lost(self) -> bool:
        """True as soon as somebody else may lead: also while the store is away and the lease may have ended."""
        return self._over or self._clock.now() >= self._until

    async def resign(self) -> None:
        """Let somebody else lead at once."""
        self.abandon()
        await self._store.revoke(self._lease)

    def abandon(self) -> None:
        """Stop the upkeep; the lease ends by itself."""
        self._over = True
        self._upkeep.cancel()

    async def _keep_up(self) -> None:
        while not self.lost:
            await sleep(self._clock, self._ttl / 3)
            asked = self._clock.now()  # not when the answer came: the lease may be that much older
            try:
                await self._store.keep_alive(self._lease)
                item = await self._store.get(election_key(self.name))
            except LeaseGone:
                break
            except (StoreUnavailable, OutcomeUnknown):
                continue  # the lease may still live; `lost` turns true by itself when its time is over
            if item is None or item.lease != self._lease:
                break
            self._until = asked + self._ttl
        self._over = True


def election_key(name: str) -> str:
    return f"election/{name}"


async def elect(store: Store, name: str, value: bytes, *, ttl: float, clock: Clock) -> Term:
    """Wait until this caller leads `name`. A caller that is cancelled while it waits leaves nothing behind."""
    key = election_key(name)
    while True:
        since = clock.now()
        lease = await store.grant(ttl)
        result = await store.txn((Absent(key),), (Put(key, value, lease),))
        if result.ok:
            return Term(store, name, lease, ttl, clock, since)
        await store.revoke(lease)
        await _until_gone(store, key, result.revision)


async def _until_gone(store: Store, key: str, seen_at: int) -> None:
    """Wait until `key`, which was there at revision `seen_at`, may be gone."""
    async for said in store.watch(key, seen_at + 1):
        if isinstance(said, Reset):
            return
        if isinstance(said, Batch) and any(e.deleted and e.item.key == key for e in said.events):
            return


async def allocate(store: Store, prefix: str, candidates: tuple[str, ...], owner: bytes) -> str | None:
    """Claim the first free key prefix+candidate for `owner`; the candidate, or None where all are taken."""
    while True:
        holders = {item.key: item.value for item in (await store.list(prefix)).items}
        free = None
        for candidate in candidates:
            holder = holders.get(prefix + candidate)
            if holder == owner:
                return candidate
            if holder is None and free is None:
                free = candidate
        if free is None:
            return None
        key = prefix + free
        if (await store.txn((Absent(key),), (Put(key, owner),), durable=True)).ok:
            return free
        # Somebody was quicker: look again.
