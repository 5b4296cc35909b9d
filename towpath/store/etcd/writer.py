"""Transactions on etcd, each applied once at most, however often its answer is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from towpath.store.contract import Item, LeaseGone, OutcomeUnknown, StoreError, StoreFull, StoreUnavailable, TxnResult
from towpath.store.etcd.gateway import Gateway
from towpath.store.etcd.marks import Marks
from towpath.store.etcd.transactions import Asked, Mark, MarkMoved, items_read, reads_before, request, result
from towpath.store.etcd.verdict import NO_LEASE, SPACE, Effect, Refused
from towpath.store.etcd.wire import Json, Scope
from towpath.store.transaction import decide

TXN = "/v3/kv/txn"


class Before:
    """What was read of the store as it was before a transaction (a View)."""

    def __init__(self, items: dict[str, Item]) -> None:
        self._items = items

    def read(self, keys: Iterable[str]) -> dict[str, Item]:
        return {key: self._items[key] for key in keys if key in self._items}

    def scan(self, prefix: str, after: str = "", limit: int = 0) -> list[Item]:
        found = [item for key, item in sorted(self._items.items()) if key.startswith(prefix) and key > after]
        return found[:limit] if limit else found


class Writer:
    def __init__(self, gateway: Gateway, scope: Scope, name: str = "") -> None:
        self._gateway = gateway
        self._scope = scope
        self._marks = Marks(scope.marks, name)

    async def txn(self, asked: Asked) -> TxnResult:
        if asked.markable:
            return await self._marked(asked)
        effect = Effect.ONCE if asked.writes else Effect.READ
        try:
            reply = await self._gateway.call(TXN, request(self._scope, asked), effect)
        except Refused as refused:
            raise _translated(refused, asked) from None
        answer = result(self._scope, asked, None, reply.said)
        assert isinstance(answer, TxnResult)
        return answer

    async def _marked(self, asked: Asked) -> TxnResult:
        mark = self._marks.take()
        try:
            return await self._until_known(asked, mark)
        except Refused as refused:
            if SPACE in refused.words:
                # The write that fills the quota up is applied and answered with this error all the same
                # (etcdserver/apply.go, quotaApplierV3).
                return await self._despite(asked, mark, refused)
            self._marks.give_back(mark)
            raise _translated(refused, asked) from None
        except StoreUnavailable:
            self._marks.give_back(mark)
            raise
        except (StoreError, asyncio.CancelledError):
            self._marks.doubt(mark)
            raise

    async def _until_known(self, asked: Asked, mark: Mark) -> TxnResult:
        while True:
            reply = await self._gateway.call(TXN, request(self._scope, asked, mark), Effect.AGAIN)
            answer = result(self._scope, asked, mark, reply.said)
            if isinstance(answer, TxnResult):
                moved = bool(asked.then if answer.ok else asked.orelse)
                if reply.again and not moved and (applied := await self._fence(mark)):
                    return await self._recall(asked, mark, applied)
                self._marks.give_back(mark, self._scope.to_engine(answer.revision) if moved else 0)
                return answer
            if answer.name == mark.name.encode():
                return await self._recall(asked, mark, answer.revision)
            mark = self._marks.again(mark, answer.revision)

    async def _fence(self, mark: Mark) -> int:
        """Let no earlier sending be applied any more; the engine's revision at which one was, 0 = none was.

        The last sending found the compares not to hold and so left the mark where it was: an earlier one that still
        waits in a member could find them to hold.
        """
        fence = replace(mark, name=f"{mark.name}/fence")
        body: Json = {"compare": [fence.compare()], "success": fence.puts(), "failure": [fence.read()]}
        said = (await self._gateway.call(TXN, body, Effect.AGAIN)).said
        moved = MarkMoved(b"", 0) if said.get("succeeded") else self._moved(mark, said)
        return moved.revision if moved.name == mark.name.encode() else 0

    async def _recall(self, asked: Asked, mark: Mark, applied_at: int) -> TxnResult:
        """The answer that was lost: what the transaction did to the store as it was just before."""
        self._marks.give_back(mark, applied_at)
        revision = self._scope.from_engine(applied_at)
        try:
            body = reads_before(self._scope, asked, revision)
            reply = await self._gateway.call(TXN, body, Effect.READ)
        except StoreError as exc:
            raise OutcomeUnknown(f"the write was done, but what came of it cannot be read ({exc.what})") from None
        before = Before(items_read(self._scope, reply.said))
        decision = decide(before, asked.compares, asked.then, asked.orelse, revision)
        return TxnResult(decision.ok, revision, decision.failed, tuple(e.item.key for e in decision.events))

    async def _despite(self, asked: Asked, mark: Mark, refused: Refused) -> TxnResult:
        """The engine said that it is full: was it done before that?"""
        try:
            body: Json = {"success": [mark.read()]}
            moved = self._moved(mark, (await self._gateway.call(TXN, body, Effect.READ)).said)
        except StoreError:
            self._marks.doubt(mark)
            raise OutcomeUnknown(f"the write may or may not be done ({refused.words})") from None
        if moved.name == mark.name.encode():
            return await self._recall(asked, mark, moved.revision)
        self._marks.doubt(mark)
        raise _translated(refused, asked) from None

    def _moved(self, mark: Mark, said: Json) -> MarkMoved:
        answer = result(self._scope, Asked((), (), ()), replace(mark, seen=-1), {**said, "succeeded": False})
        assert isinstance(answer, MarkMoved)
        return answer


def _translated(refused: Refused, asked: Asked) -> StoreError:
    if NO_LEASE in refused.words:
        puts = asked.leases()
        keys = ", ".join(repr(put.key) for put in puts)
        leases = " or ".join(str(lease) for lease in sorted({put.lease for put in puts}))
        return LeaseGone(f"{keys} cannot be written: lease {leases} does not exist")
    if SPACE in refused.words:
        return StoreFull("etcd is full (its space quota is used up)", hint="compact, defragment, disarm its alarm")
    return refused
