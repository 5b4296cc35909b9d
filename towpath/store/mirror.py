"""A copy of a store's items and last transactions in memory, and what this node wrote that the copy does not know yet.

Pure: no waiting, no disk, no engine.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from towpath.store.contract import Change, Event, Item, Put
from towpath.store.history import EventLog
from towpath.store.pace import Backlog
from towpath.store.transaction import after_prefix, first_key


class Mirror:
    """`log`: the transactions that came after the copy began, for watches. A View of items and own writes together.

    backlog: own writes that the engine has not taken.
    """

    def __init__(self, depth: int) -> None:
        self.log = EventLog(depth)
        self.backlog = Backlog()
        self._items: dict[str, Item] = {}
        self._keys: list[str] = []  # of _items, sorted
        self._taken: dict[str, tuple[Change, int]] = {}  # own writes that the engine took at this revision

    @property
    def revision(self) -> int:
        return self.log.revision

    def replace(self, items: Iterable[Item], revision: int) -> None:
        """Begin anew with all the items of the engine at `revision`."""
        self._items = {item.key: item for item in items}
        self._keys = sorted(self._items)
        self.log.begin(revision)
        self._drop_taken()

    def add(self, revision: int, events: tuple[Event, ...]) -> None:
        """The engine's next transaction; without events: nothing happened up to `revision`."""
        for event in events:
            if event.deleted:
                self._remove(event.item.key)
            else:
                self._set(event.item)
        self.log.add(revision, events)
        self._drop_taken()

    def wrote(self, changes: Iterable[Change], revision: int) -> None:
        """This node's writes that the engine took at `revision`: the copy may hear of them later."""
        if revision > self.revision:
            self._taken |= {change.key: (change, revision) for change in changes}

    def engine_items(self) -> tuple[Item, ...]:
        """Without the own writes that wait."""
        return tuple(self._items[key] for key in self._keys)

    def read(self, keys: Iterable[str]) -> dict[str, Item]:
        found = ((key, self._with_own(key)) for key in keys)
        return {key: item for key, item in found if item}

    def scan(self, prefix: str, after: str = "", limit: int = 0) -> list[Item]:
        start = bisect_left(self._keys, first_key(prefix, after))
        end = after_prefix(prefix)
        stop = bisect_left(self._keys, end) if end else len(self._keys)
        own = {change.key for change in self.backlog.under(prefix)} | {k for k in self._taken if k.startswith(prefix)}
        keys = self._keys[start:stop]
        if own := {key for key in own if key > after}:
            keys = sorted({*keys, *own})
        found = [item for key in keys if (item := self._with_own(key))]
        return found[:limit] if limit else found

    def count(self) -> int:
        return len(self.scan(""))

    def _with_own(self, key: str) -> Item | None:
        """The item as the engine will have it."""
        item = self._items.get(key)
        change = self.backlog.get(key) or (self._taken[key][0] if key in self._taken else None)
        if change is None:
            return item
        if not isinstance(change, Put):
            return None
        return Item(key, change.value, self.revision, item.created if item else self.revision, change.lease)

    def _drop_taken(self) -> None:
        if self._taken:
            self._taken = {key: own for key, own in self._taken.items() if own[1] > self.revision}

    def _set(self, item: Item) -> None:
        if item.key not in self._items:
            insort(self._keys, item.key)
        self._items[item.key] = item

    def _remove(self, key: str) -> None:
        if self._items.pop(key, None):
            del self._keys[bisect_left(self._keys, key)]
