"""Marks: how a writer recognises its own write when the answer was lost. No sockets.

etcd's answer to a write may be lost while the write is applied, or still waits to be applied. So each writer has a few
keys of its own, the marks; a marked transaction is applied only while its mark is at the revision that the writer saw
last, and moves it. Sent twice it is applied once; where the mark holds its name, it was. The names never repeat.

A transaction that was given up leaves a *doubtful* mark: the next transaction fences it by moving it too, after which
the lost one can no longer be applied.

Ways not taken: an id in the value (readers would have to know it, and a deletion has none); a read first and compares
on what was read (two round trips for each write, and foreign writes in between look like failures).
"""

from __future__ import annotations

import secrets
from dataclasses import replace

from towpath.store.etcd.transactions import Mark

MOST_FENCED = 4


class Marks:
    """The marks of one writer, under `folder` (the engine's keys).

    writer: a name that nobody else writes by at the same time; "" = a random one.
    """

    def __init__(self, folder: str, writer: str = "") -> None:
        self._folder = f"{folder}{writer or secrets.token_hex(8)}/"
        self._run = secrets.token_hex(8)
        self._used = 0
        self._count = 0
        self._seen: dict[str, int] = {}  # every mark's key → the engine's revision at which it was moved last, as known
        self._free: list[str] = []
        self._doubtful: list[str] = []  # of those in doubt, the ones that no transaction has
        self._in_doubt: set[str] = set()

    def take(self) -> Mark:
        """A mark for one transaction, its own until `give_back` or `doubt`; so are the doubtful ones that it fences."""
        key = self._doubtful.pop(0) if self._doubtful else self._free.pop() if self._free else self._new()
        fenced, self._doubtful = self._doubtful[:MOST_FENCED], self._doubtful[MOST_FENCED:]
        self._used += 1
        return Mark(key, self._seen[key], f"{self._run}/{self._used}", tuple(fenced))

    def again(self, mark: Mark, revision: int) -> Mark:
        """The same mark for the same transaction, after it was seen at the engine's `revision`."""
        self._in_doubt.discard(mark.key)  # whatever waited for the mark to be where it was waits in vain
        return replace(mark, seen=revision)

    def give_back(self, mark: Mark, moved_at: int = 0) -> None:
        """The transaction's fate is certain: it moved its marks at the engine's `moved_at` (0 = not)."""
        keys = (mark.key, *mark.fenced)
        self._seen[mark.key] = mark.seen
        if moved_at:
            self._seen |= dict.fromkeys(keys, moved_at)
            self._in_doubt.difference_update(keys)
        for key in keys:
            (self._doubtful if key in self._in_doubt else self._free).append(key)

    def doubt(self, mark: Mark) -> None:
        """Nobody knows whether the transaction was or will be applied."""
        self._seen[mark.key] = mark.seen
        self._in_doubt.add(mark.key)
        self._doubtful += (mark.key, *mark.fenced)

    def _new(self) -> str:
        self._count += 1
        key = f"{self._folder}{self._count - 1}"
        self._seen[key] = 0
        return key
