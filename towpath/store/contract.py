"""What a store is: keys in order, one revision counter, transactions, owners with leases, and watches that resume.

Every backend keeps this contract; tests/store/test_contract.py is run against each. Keys are non-empty str, values
bytes. A revision is an int > 0 that grows by exactly one per changing transaction; all changes of one transaction carry
the same revision.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from towpath.errors import TowpathError


class StoreError(TowpathError):
    """The store could not do it."""


class StoreUnavailable(StoreError):
    """Certain: nothing was applied. Try again later."""

    cni_code = 11
    http_status = 503


class OutcomeUnknown(StoreError):
    """The request may or may not have been applied: read, then decide."""

    cni_code = 11
    http_status = 503


class StoreFull(StoreUnavailable):
    """The disk is full (the ballast is used up): nothing was applied."""


class StoreInUse(StoreError):
    """Another agent holds this state_dir."""


class LeaseGone(StoreError):
    """The lease does not exist (any more)."""

    http_status = 404


@dataclass(frozen=True, slots=True)
class Item:
    key: str
    value: bytes
    revision: int  # of its last change
    created: int  # revision at which this key was last created
    lease: int = 0  # 0 = lives until deleted


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete one key, or with prefix=True every key that starts with it. Nothing there is no error."""

    key: str
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Absent:
    """Compare: the key does not exist."""

    key: str


@dataclass(frozen=True, slots=True)
class AtRevision:
    """Compare: the key exists and its last change was at `revision`."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class HasValue:
    """Compare: the key exists with this value."""

    key: str
    value: bytes


Compare = Absent | AtRevision | HasValue
Change = Put | Delete


@dataclass(frozen=True, slots=True)
class TxnResult:
    """ok: the compares held and `then` was applied (else `orelse` was).

    failed: indices of the compares that did not hold.
    revision: of the store after the transaction. changed: keys that were changed, in key order.
    """

    ok: bool
    revision: int
    failed: tuple[int, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    items: tuple[Item, ...]
    revision: int  # the store's when the list was read
    more: bool  # True: ask again with after=items[-1].key


@dataclass(frozen=True, slots=True)
class Event:
    """item.value is b"" and deleted is True for a deletion; item.revision is then the deletion's."""

    item: Item
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """All events of one transaction under the watched prefix."""

    revision: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Nothing new for you up to `revision`: resume from revision + 1."""

    revision: int


@dataclass(frozen=True, slots=True)
class Reset:
    """Events up to `revision` are gone for you (compacted, or you were too slow): list again.

    The same watch goes on after it from revision + 1; batches up to the listing's revision are in the listing already.
    """

    revision: int


@dataclass(frozen=True, slots=True)
class Status:
    backend: str
    revision: int
    keys: int
    detail: tuple[tuple[str, str], ...] = ()


class Leadership(Protocol):
    """Held by the winner of `elect`."""

    name: str

    @property
    def lost(self) -> bool: ...

    async def resign(self) -> None: ...


class Store(Protocol):
    """Methods raise StoreUnavailable, OutcomeUnknown, StoreFull as said there, LeaseGone where a lease is named that is
    not there, StoreError for damage that an operator must see to (a corrupt file), and ValueError for misuse.
    """

    async def open(self) -> None:
        """Take the store into use. Raises StoreInUse where another process has it, StoreError where it is damaged."""
        ...

    async def close(self) -> None: ...

    async def get(self, key: str) -> Item | None: ...

    async def list(self, prefix: str, *, limit: int = 0, after: str = "") -> Listing:
        """Items whose key starts with `prefix` and sorts after `after`, in key order; limit 0 = all."""
        ...

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Write one key; returns the new revision."""
        ...

    async def delete(self, key: str, *, prefix: bool = False) -> int:
        """Delete; returns the store's revision (unchanged where nothing was there)."""
        ...

    async def txn(
        self,
        compares: tuple[Compare, ...] = (),
        then: tuple[Change, ...] = (),
        orelse: tuple[Change, ...] = (),
        *,
        durable: bool = False,
        releasing: bool = False,
    ) -> TxnResult:
        """All or nothing. A key may be named by at most one change of a branch (ValueError).

        durable: survives a power cut, not only the death of the process (SQLite: synchronous=FULL for this one).
        releasing: this write frees things, so on a full disk it may use the reserve; one that only deletes always may.
        """
        ...

    def watch(self, prefix: str, from_revision: int = 0) -> AsyncIterator[Batch | Progress | Reset]:
        """Changes under `prefix` from `from_revision` (included) on, in order, none twice, none left out; 0 = from now.

        "Now" is the moment of this call. The watch ends with the store; dropping the iterator ends it too.
        """
        ...

    async def grant(self, ttl: float) -> int:
        """A lease of `ttl` seconds: when it ends, the keys written with it are deleted in one transaction.

        It survives a restart of the store, which counts its time afresh.
        """
        ...

    async def keep_alive(self, lease: int) -> float:
        """Prolong by its TTL, which is returned. Raises LeaseGone."""
        ...

    async def revoke(self, lease: int) -> None:
        """End it now, keys included; one that is gone is no error."""
        ...

    async def elect(self, name: str, value: bytes, *, ttl: float = 6.0) -> Leadership:
        """Wait until this caller leads `name`. The key election/<name> holds `value` under the leader's lease."""
        ...

    async def allocate(self, prefix: str, candidates: tuple[str, ...], owner: bytes) -> str | None:
        """Claim the first free key prefix+candidate for `owner` by compare-and-set; None = all taken.

        One that `owner` holds already is returned again.
        """
        ...

    async def compact(self, keep: int) -> None:
        """Forget history but the last `keep` revisions."""
        ...

    async def status(self) -> Status: ...
