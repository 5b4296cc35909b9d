"""The store on an etcd cluster: `etcd://host:2379,host:2379`.

Revisions are the engine's, counted so that a fresh one is at 0. On an engine that serves others too they leave gaps,
and compacting forgets everybody's history. Leases count whole seconds, at least about 2 (the engine's floor).
"""

from __future__ import annotations

import math
import secrets
import ssl
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
from towpath.store.etcd.follow import Follower
from towpath.store.etcd.gateway import STATUS, Gateway, Limits
from towpath.store.etcd.transactions import Asked
from towpath.store.etcd.verdict import COMPACTED, LEASE_THERE, NO_LEASE, Effect, Refused
from towpath.store.etcd.wire import EMPTY, PREFIX, Json, Scope, header_revision, number
from towpath.store.etcd.writer import Writer
from towpath.store.history import EventLog
from towpath.store.local import HISTORY
from towpath.store.ownership import Term, allocate, elect
from towpath.store.transaction import check, check_key
from towpath.store.watch import Watch, Watches

RANGE = "/v3/kv/range"
PAGE = 5000  # items read at once


class EtcdStore:
    """endpoints: host:port of the members.

    writer: a name that no other process writes by at the same time, such as the node's; by it a restarted process takes
    its old marks again. "" = a random one.
    origin: the engine's revision that counts as 0 here; it never changes in the life of a store.
    """

    def __init__(
        self,
        endpoints: tuple[str, ...],
        prefix: str = PREFIX,
        tls: ssl.SSLContext | None = None,
        *,
        writer: str = "",
        clock: Clock | None = None,
        history: int = HISTORY,
        limits: Limits | None = None,
        origin: int = EMPTY,
    ) -> None:
        limits = limits or Limits()
        self._scope = Scope(prefix, origin)
        self._gateway = Gateway(endpoints, tls, limits)
        self._writer = Writer(self._gateway, self._scope, writer)
        self._clock = clock or LoopClock()
        self._log = EventLog(history)
        self._watches = Watches()
        self._follower = Follower(self._gateway, self._scope, self._log, self._watches, limits)
        self._terms: WeakSet[Term] = WeakSet()
        self._known = 0  # the highest revision that any answer has told
        self._is_open = False

    async def open(self) -> None:
        """Also raises StoreUnavailable: without a quorum there is nothing to begin with."""
        if self._is_open:
            raise ValueError("the store is open already")
        self._is_open = True
        try:
            await self._gateway.start()
            await self._gateway.check_members()
            self._known = 0
            await self._count()
            self._log.begin(self._known)
            self._follower.start()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        for term in list(self._terms):
            term.abandon()
        self._watches.end()
        await self._follower.stop()
        await self._gateway.stop()

    @property
    def cluster(self) -> str:
        """The engine's own id of its cluster; "" before the first answer."""
        return self._gateway.cluster

    @property
    def following(self) -> bool:
        """Whether the engine tells us now what happens in it."""
        return self._is_open and self._follower.connected

    async def get(self, key: str, *, stale: bool = False) -> Item | None:
        """stale: as a member knows it, without asking the others: answers without a quorum, perhaps with the past."""
        self._check_open()
        check_key(key)
        reply = await self._read({"key": self._scope.key(key)}, stale)
        return next(iter(self._scope.items(reply)), None)

    async def list(self, prefix: str, *, limit: int = 0, after: str = "", stale: bool = False) -> Listing:
        self._check_open()
        if limit < 0:
            raise ValueError(f"limit {limit} is negative")
        check_key(prefix + after or "-")
        while True:
            try:
                return await self._list(prefix, limit, after, stale)
            except Refused as refused:
                if COMPACTED not in refused.words:
                    raise
                # The revision of the first page is gone before the last one was read: begin anew.

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
        """Every write is durable: a majority has synced it. At most 60 compares, 3,600 changes and 1.5 MB.

        One that only deletes is not sent twice: where its answer is lost it raises OutcomeUnknown.
        """
        self._check_open()
        check(compares, then, orelse)
        result = await self._writer.txn(Asked(compares, then, orelse))
        self._known = max(self._known, result.revision)
        return result

    def watch(self, prefix: str, from_revision: int = 0) -> Watch:
        self._check_open()
        if from_revision < 0:
            raise ValueError(f"from_revision {from_revision} is negative")
        first = from_revision or self._known + 1
        if max(self._log.gone, self._known - self._log.depth) < first <= self._log.forgotten:
            self._follower.rewind(first)
        return self._watches.add(Watch(self, prefix, first, self._known))

    async def grant(self, ttl: float) -> int:
        self._check_open()
        if not 0 < ttl < math.inf:
            raise ValueError(f"a lease of {ttl} seconds cannot be")
        lease = secrets.randbits(62) + 1  # ours to choose, so that a second sending is recognised
        try:
            await self._call("/v3/lease/grant", {"ID": str(lease), "TTL": str(math.ceil(ttl))}, Effect.AGAIN)
        except Refused as refused:
            if LEASE_THERE not in refused.words:
                raise
        return lease

    async def keep_alive(self, lease: int) -> float:
        self._check_open()
        said = await self._call("/v3/lease/keepalive", {"ID": str(lease)}, Effect.AGAIN)
        ttl = number(said.get("result", {}), "TTL")
        if ttl <= 0:
            raise LeaseGone(f"lease {lease} does not exist", hint="it ended, or was revoked: ask for a new one")
        return float(ttl)

    async def revoke(self, lease: int) -> None:
        self._check_open()
        try:
            await self._call("/v3/lease/revoke", {"ID": str(lease)}, Effect.AGAIN)
        except Refused as refused:
            if NO_LEASE not in refused.words:
                raise

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
        await self._count()
        target = self._known - keep
        if target <= 0:
            return
        try:
            await self._call("/v3/kv/compaction", {"revision": str(self._scope.to_engine(target))}, Effect.AGAIN)
        except Refused as refused:
            if COMPACTED not in refused.words:
                raise
        else:
            if target <= self._log.revision:
                self._log.forget(target)
                self._watches.wake()

    async def status(self) -> Status:
        self._check_open()
        revision, keys = await self._count()
        leases = await self._call("/v3/lease/leases", {}, Effect.READ)
        member = await self._call(STATUS, {}, Effect.LOCAL)
        detail = {
            "leases": str(len(leases.get("leases", ()))),
            "watches": str(len(self._watches)),
            "cluster": self.cluster,
            "version": str(member.get("version", "")),
            "leader": str(member.get("leader", "")),
            "bytes": str(number(member, "dbSize")),
            "behind": str(max(0, revision - self._log.revision)),
        }
        return Status("etcd", revision, keys, tuple(detail.items()))

    # --- what watches read ---

    @property
    def revision(self) -> int:
        """Up to where the watches of this store know what happened."""
        return self._log.revision

    @property
    def forgotten(self) -> int:
        return self._log.forgotten

    def events(self, first: int, last: int, prefix: str) -> Sequence[Event]:
        return self._log.events(first, last, prefix)

    # --- inside ---

    def _check_open(self) -> None:
        if not self._is_open:
            raise StoreUnavailable("the store is not open")

    async def _call(self, path: str, body: Json, effect: Effect) -> Json:
        return (await self._gateway.call(path, body, effect)).said

    async def _read(self, body: Json, stale: bool = False) -> Json:
        said = await self._call(RANGE, {**body, "serializable": stale}, Effect.LOCAL if stale else Effect.READ)
        if not stale:
            self._known = max(self._known, self._scope.from_engine(header_revision(said)))
        return said

    async def _count(self) -> tuple[int, int]:
        """(revision, keys) now."""
        said = await self._read({**self._scope.span(), "count_only": True})
        return self._scope.from_engine(header_revision(said)), number(said, "count")

    async def _list(self, prefix: str, limit: int, after: str, stale: bool) -> Listing:
        items: list[Item] = []
        at: Json = {}
        while True:
            size = min(PAGE, limit - len(items)) if limit else PAGE
            span = self._scope.span(prefix, items[-1].key if items else after)
            said = await self._read({**span, **at, "limit": str(size)}, stale)
            items += self._scope.items(said)
            more = bool(said.get("more"))
            # Later pages tell the engine's revision then: the list is the store as it was at the first.
            at = at or {"revision": str(header_revision(said))}
            if not more or len(items) == limit:
                return Listing(tuple(items), self._scope.from_engine(int(at["revision"])), more)
