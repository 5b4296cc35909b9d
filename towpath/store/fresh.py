"""Changes that are in the journal but not yet in the table of items, laid over what the table says.

A transaction that wrote six items in place would write six pages of the database; in the journal they lie side by side
in one. So transactions go to the journal only, and now and then the table is brought up to it, many at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

from towpath.store.contract import Event, Item


class Fresh:
    """The newest state of each key that changed since the table was brought up; None = deleted."""

    def __init__(self) -> None:
        self.changes: dict[str, Item | None] = {}
        self.events = 0  # noted since the table was brought up
        self.bytes = 0  # in their values

    def note(self, events: Iterable[Event]) -> None:
        for event in events:
            self.changes[event.item.key] = None if event.deleted else event.item
            self.events += 1
            self.bytes += len(event.item.value)

    def clear(self) -> None:
        self.changes.clear()
        self.postpone()

    def postpone(self) -> None:
        """Count from nothing again, keeping all changes."""
        self.events = self.bytes = 0

    def within(self, prefix: str, first: str) -> dict[str, Item | None]:
        """Changes of the keys with `prefix` from `first` on."""
        return {key: item for key, item in self.changes.items() if key >= first and key.startswith(prefix)}

    def leased(self, lease: int, in_table: Iterable[Item]) -> list[Item]:
        """Items under `lease`, given those the table has."""
        old = [item for item in in_table if item.key not in self.changes]
        return old + [item for item in self.changes.values() if item and item.lease == lease]


def lay_over(in_table: list[Item], changes: dict[str, Item | None], limit: int) -> list[Item]:
    """The first `limit` items (0 = all) in key order. With a limit, `in_table` reaches len(changes) items beyond it."""
    if changes:
        merged = {item.key: item for item in in_table} | changes
        in_table = [item for key in sorted(merged) if (item := merged[key])]
    return in_table[:limit] if limit else in_table
