"""The store that lives in this process and dies with it: `memory://`, for tests and tools."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable

from towpath.store.clock import Clock
from towpath.store.contract import Event, Item
from towpath.store.local import HISTORY, LocalStore
from towpath.store.rows import Contents, Write
from towpath.store.transaction import after_prefix, first_key


class MemoryRows:
    name = "memory"

    def __init__(self) -> None:
        self._items: dict[str, Item] = {}
        self._keys: list[str] = []  # of _items, sorted
        self._log: deque[tuple[int, tuple[Event, ...]]] = deque()
        self._leases: dict[int, float] = {}
        self._granted = 0
        self._revision = 0
        self._forgotten = 0

    def open(self) -> Contents:
        return Contents(self._revision, self._forgotten, dict(self._leases))

    def close(self) -> None:
        """The rows stay: opening again is a restart that lost nothing."""

    def read(self, keys: Iterable[str]) -> dict[str, Item]:
        items = self._items
        return {key: items[key] for key in keys if key in items}

    def scan(self, prefix: str, after: str = "", limit: int = 0) -> list[Item]:
        start = bisect_left(self._keys, first_key(prefix, after))
        end = after_prefix(prefix)
        stop = bisect_left(self._keys, end) if end else len(self._keys)
        if limit:
            stop = min(stop, start + limit)
        return [self._items[key] for key in self._keys[start:stop]]

    def leased(self, lease: int) -> list[Item]:
        return [item for item in self._items.values() if item.lease == lease]

    def write(self, write: Write) -> None:
        for event in write.events:
            if event.deleted:
                self._remove(event.item.key)
            else:
                self._set(event.item)
        if write.events:
            self._log.append((write.revision, write.events))
            self._revision = write.revision
        self._leases.pop(write.ended, None)
        self._drop_log(write.forget)

    def events(self, first: int, last: int, prefix: str) -> list[Event]:
        start = bisect_left(self._log, first, key=lambda entry: entry[0])
        stop = bisect_right(self._log, last, key=lambda entry: entry[0])
        return [e for i in range(start, stop) for e in self._log[i][1] if e.item.key.startswith(prefix)]

    def compact(self, forgotten: int, revision: int) -> None:
        self._drop_log(forgotten)
        self._forgotten = forgotten

    def grant(self, ttl: float) -> int:
        self._granted += 1
        self._leases[self._granted] = ttl
        return self._granted

    def count(self) -> int:
        return len(self._items)

    def describe(self) -> tuple[tuple[str, str], ...]:
        return ()

    def _set(self, item: Item) -> None:
        if item.key not in self._items:
            insort(self._keys, item.key)
        self._items[item.key] = item

    def _drop_log(self, forgotten: int) -> None:
        while self._log and self._log[0][0] <= forgotten:
            self._log.popleft()

    def _remove(self, key: str) -> None:
        del self._items[key]
        del self._keys[bisect_left(self._keys, key)]


class MemoryStore(LocalStore):
    """A Store in memory. history: how many revisions a watch may lag behind before it hears Reset."""

    def __init__(self, *, clock: Clock | None = None, history: int = HISTORY) -> None:
        super().__init__(MemoryRows(), clock=clock, history=history)
