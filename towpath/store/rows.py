"""What a local backend keeps: items, the events of the last revisions, and leases; the rest is shared (local.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from towpath.store.contract import Event, Item
from towpath.store.transaction import View


@dataclass(frozen=True, slots=True)
class Contents:
    """What was found when the rows were opened. forgotten: no event up to this revision can be read any more."""

    revision: int
    forgotten: int
    leases: dict[int, float]  # lease → its TTL in seconds


@dataclass(frozen=True, slots=True)
class Write:
    """One transaction to be kept, whole or not at all.

    ended: a lease that goes with it; forget: events up to this revision may be dropped with it (0 = none).
    """

    revision: int
    events: tuple[Event, ...]
    ended: int = 0
    forget: int = 0
    durable: bool = False
    releasing: bool = False


class Rows(View, Protocol):
    """All methods are done when they return. They raise what Store's methods raise."""

    name: str

    def open(self) -> Contents: ...

    def close(self) -> None: ...

    def leased(self, lease: int) -> list[Item]:
        """Items that live as long as `lease`."""
        ...

    def write(self, write: Write) -> None: ...

    def events(self, first: int, last: int, prefix: str) -> list[Event]:
        """Events of revisions first..last under `prefix`, by revision, then by key."""
        ...

    def compact(self, forgotten: int, revision: int) -> None:
        """Drop the events up to revision `forgotten` for good; the store is at `revision`."""
        ...

    def grant(self, ttl: float) -> int:
        """A new lease, whose number was never used before."""
        ...

    def count(self) -> int: ...

    def describe(self) -> tuple[tuple[str, str], ...]: ...
