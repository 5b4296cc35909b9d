"""Watches: each is a place in the history of the store, not a queue, so a slow one costs nothing and blocks nobody.

A watch that lags further behind than the history reaches hears Reset. What it reads after a restart of the store, what
it catches up with and what happens now come the same way: from the event rows, one page of revisions at a time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol
from weakref import WeakSet

from towpath.store.contract import Batch, Event, Progress, Reset

PAGE = 64  # revisions read at once
QUIET = 1000  # revisions without an event for a watch, after which it hears Progress


class History(Protocol):
    """Where watches read. Events of revisions > `forgotten` up to `revision` can be read."""

    @property
    def revision(self) -> int: ...

    @property
    def forgotten(self) -> int: ...

    def events(self, first: int, last: int, prefix: str) -> Sequence[Event]: ...


class Watch:
    """The iterator that Store.watch returns. Cancelling a pending `anext` loses nothing."""

    def __init__(self, history: History, prefix: str, first: int, known: int = 0) -> None:
        """known: a revision that the store has reached, where the history is still behind it."""
        self._history = history
        self._prefix = prefix
        # The first revision that is not read yet. A place in the future is one that a power cut took back: what the
        # reader knows is not what happened, so it begins before all history and hears Reset.
        self._next = first if first <= max(history.revision, known) + 1 else 0
        self._heard = first - 1  # the last revision that the reader knows about
        self._page: deque[Batch] = deque()
        self._wake = asyncio.Event()
        self._ended = False

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Batch | Progress | Reset:
        if not self._page:
            await asyncio.sleep(0)  # a reader with a long way to catch up lets others run
        while not self._ended:
            self._wake.clear()
            if said := self._read():
                self._heard = said.revision
                return said
            await self._wake.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.end()

    def end(self) -> None:
        """Nothing more is said: a reader that waits is let go."""
        self._ended = True
        self._page.clear()
        self._wake.set()

    def wake(self) -> None:
        """Look again: the history was cut."""
        self._wake.set()

    def lose(self, key: str) -> None:
        """Where `key` is watched: what the reader knows is not true any more, and no event says so."""
        if key.startswith(self._prefix):
            self._next = 0
            self._page.clear()
            self._wake.set()

    def notice(self, revision: int, events: tuple[Event, ...], before: int) -> None:
        """Hear that the store went from `before` to `revision`, by `events`."""
        if any(event.item.key.startswith(self._prefix) for event in events):
            self._wake.set()
        elif before < self._next <= revision:  # nothing unread and nothing for us: step over it without reading
            self._next = revision + 1
            if revision - self._heard >= QUIET:
                self._wake.set()

    def _read(self) -> Batch | Progress | Reset | None:
        """The next thing to say; None = nothing yet."""
        if self._page:
            return self._page.popleft()
        history = self._history
        if self._next <= history.forgotten:
            self._next = history.revision + 1
            return Reset(history.revision)
        while self._next <= history.revision:
            last = min(self._next + PAGE - 1, history.revision)
            events = history.events(self._next, last, self._prefix)
            self._next = last + 1
            if events:
                self._page.extend(_batches(events))
                return self._page.popleft()
        if history.revision - self._heard >= QUIET:
            return Progress(history.revision)
        return None


class Watches:
    """The watches of one store. It forgets those that nobody reads any more."""

    def __init__(self) -> None:
        self._all: WeakSet[Watch] = WeakSet()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, watch: Watch) -> Watch:
        self._all.add(watch)
        return watch

    def notice(self, revision: int, events: tuple[Event, ...], before: int) -> None:
        for watch in self._all:
            watch.notice(revision, events, before)

    def wake(self) -> None:
        for watch in self._all:
            watch.wake()

    def lose(self, key: str) -> None:
        for watch in self._all:
            watch.lose(key)

    def end(self) -> None:
        for watch in list(self._all):
            watch.end()
        self._all.clear()


def _batches(events: Sequence[Event]) -> list[Batch]:
    return [Batch(revision, tuple(of_one)) for revision, of_one in groupby(events, lambda e: e.item.revision)]
