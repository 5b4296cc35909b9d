"""One transaction of the store as one of etcd's, and what its answer says. No sockets.

etcd tells only which branch was taken. So the branch for failed compares first reads what was compared, and a prefix is
listed before it is deleted.

The engine takes 128 operations at once (its default --max-txn-ops), but an operation may be a transaction with the rest
of that number for itself: 60 groups of 60 pass, still all or nothing and in one revision.

A mark makes a transaction safe to send again (marks.py).
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from towpath.store.contract import (
    Absent,
    AtRevision,
    Change,
    Compare,
    Delete,
    HasValue,
    Item,
    Put,
    StoreError,
    TxnResult,
)
from towpath.store.etcd.wire import Json, Scope, bytes64, header_revision, number, text64
from towpath.store.transaction import holds

GROUP = 60
MOST_COMPARES = 60


@dataclass(frozen=True, slots=True)
class Asked:
    compares: tuple[Compare, ...]
    then: tuple[Change, ...]
    orelse: tuple[Change, ...]

    @property
    def writes(self) -> bool:
        return bool(self.then or self.orelse)

    @property
    def markable(self) -> bool:
        """Whether every branch that changes something puts something, so that a mark may be put with it.

        A mark beside a mere deletion would make a revision where nothing was there to be deleted.
        """
        branches = [branch for branch in (self.then, self.orelse) if branch]
        return bool(branches) and all(any(isinstance(c, Put) for c in branch) for branch in branches)

    def leases(self) -> list[Put]:
        return [change for change in (*self.then, *self.orelse) if isinstance(change, Put) and change.lease]


@dataclass(frozen=True, slots=True)
class Mark:
    """Applied only while `key` is at revision `seen` (0 = it is not there); then `key` and `fenced` hold `name`.

    Keys and revisions are the engine's. fenced: the keys of other marks.
    """

    key: str
    seen: int
    name: str
    fenced: tuple[str, ...] = ()

    def compare(self) -> Json:
        return {"key": text64(self.key), "target": "MOD", "mod_revision": str(self.seen)}

    def read(self) -> Json:
        return {"request_range": {"key": text64(self.key)}}

    def puts(self) -> list[Json]:
        value = text64(self.name)
        return [{"request_put": {"key": text64(key), "value": value}} for key in (self.key, *self.fenced)]


@dataclass(frozen=True, slots=True)
class MarkMoved:
    """Nothing was applied: the mark's key holds `name` since the engine's revision `revision` (0 = it is not there)."""

    name: bytes
    revision: int


def request(scope: Scope, asked: Asked, mark: Mark | None = None) -> Json:
    """The body for /v3/kv/txn. Raises StoreError where it is more than the engine takes."""
    if len(asked.compares) > MOST_COMPARES:
        raise StoreError(f"a transaction with {len(asked.compares)} compares is more than etcd takes")
    guard = [mark.compare()] if mark else []
    failure = [mark.read()] if mark else []
    failure += [{"request_range": {"key": scope.key(compare.key)}} for compare in asked.compares]
    if asked.orelse:
        inner: Json = {"compare": guard, "success": _branch(scope, asked.orelse, mark)}
        if len(inner["success"]) > GROUP or len(_all_operations(scope, asked.orelse)) > GROUP:
            raise StoreError("the branch of a transaction for failed compares is more than etcd takes")
        failure = [*_grouped(failure), {"request_txn": inner}]
    return {
        "compare": guard + [_compare(scope, compare) for compare in asked.compares],
        "success": _branch(scope, asked.then, mark),
        "failure": failure,
    }


def result(scope: Scope, asked: Asked, mark: Mark | None, reply: Json) -> TxnResult | MarkMoved:
    """What the engine answered to `request`."""
    revision = scope.from_engine(header_revision(reply))
    answers = _flat(reply.get("responses", ()))
    if reply.get("succeeded"):
        return TxnResult(True, revision, (), _changed(scope, asked.then, mark, answers))
    if mark:
        kv = (next(answers)["response_range"].get("kvs") or [{}])[0]
        if number(kv, "mod_revision") != mark.seen:
            return MarkMoved(_value(kv), number(kv, "mod_revision"))
    seen = {item.key: item for _ in asked.compares for item in scope.items(next(answers)["response_range"])}
    failed = tuple(i for i, compare in enumerate(asked.compares) if not holds(compare, seen.get(compare.key)))
    changed = _changed(scope, asked.orelse, mark, answers) if asked.orelse else ()
    return TxnResult(False, revision, failed, changed)


def reads_before(scope: Scope, asked: Asked, revision: int) -> Json:
    """The body that reads what `asked` looked at, as it was before it was applied at `revision`."""
    at = {"revision": str(scope.to_engine(revision) - 1)}
    spans = [{"key": scope.key(compare.key)} for compare in asked.compares]
    spans += [_span(scope, change) for change in (*asked.then, *asked.orelse)]
    return {"success": _grouped([{"request_range": {**span, **at}} for span in spans])}


def items_read(scope: Scope, reply: Json) -> dict[str, Item]:
    answers = _flat(reply.get("responses", ()))
    return {item.key: item for answer in answers for item in scope.items(answer["response_range"])}


def _value(kv: Json) -> bytes:
    return b64decode(kv.get("value", ""))


def _compare(scope: Scope, compare: Compare) -> Json:
    key = scope.key(compare.key)
    if isinstance(compare, Absent):
        return {"key": key, "target": "CREATE", "create_revision": "0"}
    if isinstance(compare, AtRevision):
        # A key that is not there compares as revision 0, so no number below the first revision may become that.
        at = scope.to_engine(compare.revision) if compare.revision > 0 else -1
        return {"key": key, "target": "MOD", "mod_revision": str(at)}
    assert isinstance(compare, HasValue)
    return {"key": key, "target": "VALUE", "value": bytes64(compare.value)}


def _span(scope: Scope, change: Change) -> Json:
    if isinstance(change, Delete) and change.prefix:
        return scope.span(change.key)
    return {"key": scope.key(change.key)}


def _branch(scope: Scope, branch: tuple[Change, ...], mark: Mark | None) -> list[Json]:
    marks = mark.puts() if mark and branch else []
    return marks + _grouped(_all_operations(scope, branch))


def _all_operations(scope: Scope, branch: tuple[Change, ...]) -> list[Json]:
    return [op for change in branch for op in _operations(scope, change)]


def _operations(scope: Scope, change: Change) -> list[Json]:
    if isinstance(change, Put):
        put = {"key": scope.key(change.key), "value": bytes64(change.value)}
        return [{"request_put": put | ({"lease": str(change.lease)} if change.lease else {})}]
    span = _span(scope, change)
    delete = {"request_delete_range": span}
    return [{"request_range": {**span, "keys_only": True}}, delete] if change.prefix else [delete]


def _grouped(operations: list[Json]) -> list[Json]:
    if len(operations) <= GROUP:
        return operations
    groups = [operations[i : i + GROUP] for i in range(0, len(operations), GROUP)]
    if len(groups) > GROUP:
        raise StoreError(
            f"a transaction of {len(operations)} operations is more than etcd takes",
            hint=f"at most {GROUP * GROUP}: write it in several",
        )
    return [{"request_txn": {"success": group}} for group in groups]


def _flat(responses: Iterable[Json]) -> Iterator[Json]:
    """The answers to the operations, those in groups too, in order."""
    for response in responses:
        if "response_txn" in response:
            yield from _flat(response["response_txn"].get("responses", ()))
        else:
            yield response


def _changed(scope: Scope, branch: tuple[Change, ...], mark: Mark | None, answers: Iterator[Json]) -> tuple[str, ...]:
    for _ in mark.puts() if mark and branch else ():
        next(answers)
    changed: list[str] = []
    for change in branch:
        answer = next(answers)
        if isinstance(change, Put):
            changed.append(change.key)
        elif change.prefix:
            changed += [scope.key_of(kv) for kv in answer["response_range"].get("kvs", ())]
            next(answers)
        elif number(answer["response_delete_range"], "deleted"):
            changed.append(change.key)
    return tuple(sorted(changed))
