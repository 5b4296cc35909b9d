"""The last transactions of a store that somebody else keeps: what its watches here read."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from towpath.store.contract import Event

SLACK = 64  # entries: dropping them one by one from a list would cost its length each time


class EventLog:
    """Events of revisions > `forgotten` up to `revision`, at most `depth` revisions deep. A History (watch.py).

    Revisions may leave gaps: the store's engine may serve others too.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._entries: list[tuple[int, tuple[Event, ...]]] = []
        self._revision = 0
        self._forgotten = 0
        self._gone = 0

    @property
    def revision(self) -> int:
        return self._revision

    @property
    def forgotten(self) -> int:
        return max(self._forgotten, self._revision - self._depth)

    @property
    def depth(self) -> int:
        return self._depth

    @property
    def gone(self) -> int:
        """Events up to here can be had from nobody any more."""
        return self._gone

    def begin(self, revision: int) -> None:
        """Know nothing but that the store was at `revision`."""
        self._entries.clear()
        self._revision = self._forgotten = revision

    def add(self, revision: int, events: tuple[Event, ...]) -> None:
        """The next transaction; without events: nothing happened up to `revision`."""
        if events:
            self._entries.append((revision, events))
        self._revision = revision
        if len(self._entries) > SLACK and self._entries[SLACK - 1][0] <= self.forgotten:
            del self._entries[:SLACK]

    def forget(self, revision: int) -> None:
        """Events up to `revision` are gone for good."""
        self._gone = max(self._gone, revision)
        self._forgotten = max(self._forgotten, revision)
        self._revision = max(self._revision, revision)
        del self._entries[: bisect_right(self._entries, revision, key=lambda entry: entry[0])]

    def events(self, first: int, last: int, prefix: str) -> Sequence[Event]:
        start = bisect_left(self._entries, first, key=lambda entry: entry[0])
        stop = bisect_right(self._entries, last, key=lambda entry: entry[0])
        return [e for i in range(start, stop) for e in self._entries[i][1] if e.item.key.startswith(prefix)]
