"""The store on disk: one SQLite file in WAL mode, one connection, held by one process at a time.

Durability: a write outlives the death of the process always (WAL, synchronous=NORMAL), and a power cut when it was
durable (synchronous=FULL for that transaction). A power cut never tears a transaction, it only takes the last ones.

The events of the last revisions are the journal: a transaction is there when its events are. The table of items
follows it (fresh.py), so the file by itself may show items that are a little old.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from itertools import starmap
from pathlib import Path

from towpath.store.ballast import Ballast
from towpath.store.clock import Clock
from towpath.store.contract import Event, Item, StoreError, StoreFull
from towpath.store.database import FILE, Translated, full, open_database
from towpath.store.fresh import Fresh, lay_over
from towpath.store.local import HISTORY, LocalStore
from towpath.store.lock import DirLock, hold_lock
from towpath.store.rows import Contents, Write
from towpath.store.transaction import after_prefix, first_key

# An event's row id is its revision and its place in the transaction: new rows go to the end of the table, and the
# events of some revisions are one range of it.
PLACE_BITS = 20

ITEM = "SELECT key, value, revision, created, lease FROM item"
SCAN = f"{ITEM} WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"
LEASED = f"{ITEM} WHERE lease = ? AND lease != 0"  # the second half lets the partial index serve
PUT = (
    "INSERT INTO item VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE"
    " SET value = excluded.value, revision = excluded.revision, created = excluded.created, lease = excluded.lease"
)
DELETE = "DELETE FROM item WHERE key = ?"
LOG = "INSERT INTO event VALUES (?, ?, ?, ?, ?, ?)"
READ_LOG = (
    "SELECT key, value, id >> ?, created, lease, deleted FROM event"
    " WHERE id >= ? AND id < ? AND key >= ? AND key < ? ORDER BY id"
)
FORGET = "DELETE FROM event WHERE id < min(?, (SELECT settled + 1 FROM progress) << ?)"
SETTLED = "UPDATE progress SET settled = ?"

AT_ONCE = 32  # keys per SELECT

# The table of items is brought up to the journal after so many events, or so many bytes of values; after the bytes the
# log is moved into the database too. So what is still to be written at any time is less than the ballast.
SETTLE_AT = 256
SETTLE_AT_BYTES = 128 << 10
PORTION = 16  # revisions

log = logging.getLogger(__name__)


class SqliteRows:
    """Rows in <directory>/store.db, with the directory's lock and (if `ballast`) its ballast."""

    name = "sqlite"

    def __init__(self, directory: Path, *, ballast: bool) -> None:
        self._directory = directory
        self._path = directory / FILE
        self._translated = Translated(self._path)
        self._ballast = Ballast(directory) if ballast else None
        self._lock: DirLock | None = None
        self._connection: sqlite3.Connection | None = None
        self._fresh = Fresh()
        self._revision = 0
        self._count = 0

    def open(self) -> Contents:
        with self._translated:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = hold_lock(self._directory)
            try:
                self._connection = open_database(self._path)
                if self._ballast:
                    self._ballast.open()
                return self._contents()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None
        if self._lock:
            self._lock.release()
        self._lock = None

    def read(self, keys: Iterable[str]) -> dict[str, Item]:
        changes = self._fresh.changes
        found: dict[str, Item] = {}
        asked = []
        for key in keys:
            if key not in changes:
                asked.append(key)
            elif item := changes[key]:
                found[key] = item
        with self._translated:
            for start in range(0, len(asked), AT_ONCE):
                some = asked[start : start + AT_ONCE]
                for row in self._database.execute(_get(len(some)), some):
                    found[row[0]] = Item(*row)
        return found

    def scan(self, prefix: str, after: str = "", limit: int = 0) -> list[Item]:
        first = first_key(prefix, after)
        changes = self._fresh.within(prefix, first)
        with self._translated:
            rows = self._database.execute(SCAN, (first, _end(prefix), limit + len(changes) if limit else -1))
            return lay_over(list(starmap(Item, rows)), changes, limit)

    def leased(self, lease: int) -> list[Item]:
        with self._translated:
            return self._fresh.leased(lease, starmap(Item, self._database.execute(LEASED, (lease,))))

    def events(self, first: int, last: int, prefix: str) -> list[Event]:
        window = (PLACE_BITS, first << PLACE_BITS, (last + 1) << PLACE_BITS)
        with self._translated:
            rows = self._database.execute(READ_LOG, (*window, prefix, _end(prefix)))
            return [Event(Item(*row[:5]), bool(row[5])) for row in rows]

    def write(self, write: Write) -> None:
        if not write.releasing:
            self._refuse_without_ballast()
            self._keep(write)
        else:
            self._with_ballast(lambda: self._keep(write))
        self._revision = write.revision
        self._fresh.note(write.events)
        self._count += _growth(write.events)
        if self._fresh.events >= SETTLE_AT or self._fresh.bytes >= SETTLE_AT_BYTES:
            self._settle_now()

    def compact(self, forgotten: int, revision: int) -> None:
        with self._transaction():
            self._bring_up_items(self._fresh.changes, revision)
            self._forget(forgotten)
            self._database.execute("UPDATE progress SET revision = ?, forgotten = ?", (revision, forgotten))
        self._fresh.clear()

    def grant(self, ttl: float) -> int:
        self._refuse_without_ballast()
        with self._translated as translated:
            translated.committing = True  # one statement: it commits by itself
            lease = self._database.execute("INSERT INTO lease (ttl) VALUES (?)", (ttl,)).lastrowid
        assert lease is not None
        return lease

    def count(self) -> int:
        return self._count

    def describe(self) -> tuple[tuple[str, str], ...]:
        ballast = "none" if not self._ballast else "held" if self._ballast.held else "used up"
        return (("file", str(self._path)), ("ballast", ballast))

    # --- inside ---

    @property
    def _database(self) -> sqlite3.Connection:
        assert self._connection, "LocalStore lets nobody in while it is closed"
        return self._connection

    def _contents(self) -> Contents:
        execute = self._database.execute
        (newest,) = execute("SELECT max(id) FROM event").fetchone()
        revision, forgotten, settled = execute("SELECT revision, forgotten, settled FROM progress").fetchone()
        self._revision = max(revision, settled, (newest or 0) >> PLACE_BITS)
        self._count = execute("SELECT count(*) FROM item").fetchone()[0]
        self._fresh.clear()
        unsettled = self.events(settled + 1, self._revision, "")
        self._fresh.note(unsettled)
        self._count += _growth(unsettled)
        return Contents(self._revision, forgotten, dict(execute("SELECT id, ttl FROM lease").fetchall()))

    def _keep(self, write: Write) -> None:
        if write.durable:
            self._synchronous("FULL")
        try:
            with self._transaction():
                self._change(write)
        finally:
            if write.durable:
                self._synchronous("NORMAL")

    def _change(self, write: Write) -> None:
        if len(write.events) >> PLACE_BITS:
            raise ValueError(f"{len(write.events)} keys cannot be changed in one transaction")
        place = write.revision << PLACE_BITS
        rows = []
        for event in write.events:
            item = event.item
            rows.append((place, item.key, item.value, item.created, item.lease, event.deleted))
            place += 1
        self._database.executemany(LOG, rows)
        if write.ended:
            self._database.execute("DELETE FROM lease WHERE id = ?", (write.ended,))
        if write.forget:
            self._forget(write.forget)

    def _forget(self, forgotten: int) -> None:
        # Never what the table of items does not show yet.
        self._database.execute(FORGET, ((forgotten + 1) << PLACE_BITS, PLACE_BITS))

    def _settle(self) -> None:
        with self._transaction():
            self._bring_up_items(self._fresh.changes, self._revision)

    def _settle_by_portions(self) -> None:
        """The same, some revisions at a time, so that the log is moved into the database in between."""
        (settled,) = self._database.execute("SELECT settled FROM progress").fetchone()
        for first in range(settled + 1, self._revision + 1, PORTION):
            last = min(first + PORTION - 1, self._revision)
            portion = Fresh()
            portion.note(self.events(first, last, ""))
            with self._transaction():
                self._bring_up_items(portion.changes, last)
            self._move_log()

    def _bring_up_items(self, changes: Mapping[str, Item | None], revision: int) -> None:
        """Make the table of items show the store at `revision`; in a transaction."""
        in_order = sorted(changes.items())  # neighbours share pages
        put = [(key, i.value, i.revision, i.created, i.lease) for key, i in in_order if i]
        self._database.executemany(PUT, put)
        self._database.executemany(DELETE, [(key,) for key, item in in_order if item is None])
        self._database.execute(SETTLED, (revision,))

    def _settle_now(self) -> None:
        try:
            if self._settled_at_once():
                if self._fresh.bytes >= SETTLE_AT_BYTES:
                    self._move_log()
            else:
                # With the ballast, and so that it is gone: taking more and more into a journal that cannot be settled
                # would use up what the deletes will need.
                self._with_ballast(self._settle_by_portions)
        except StoreError as exc:
            # Nothing is lost, the journal has it all; what was written just now is kept and must not look refused.
            log.warning("items not brought up to the journal", extra={"reason": str(exc)})
            self._fresh.postpone()
        else:
            self._fresh.clear()

    def _settled_at_once(self) -> bool:
        if self._ballast and not self._ballast.held:
            return False  # in one piece it could need all the room there is
        try:
            self._settle()
        except StoreFull:
            return False
        return True

    def _move_log(self) -> None:
        """Move the log into the database; after that it is written from its beginning again and need not grow."""
        # What a full disk stops is tried again by SQLite after each commit.
        with suppress(StoreFull), self._translated:
            self._database.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated as translated:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                translated.committing = True
                self._database.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        # SQLite has rolled back by itself after some errors, a full disk among them.
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")

    def _synchronous(self, level: str) -> None:
        # This pragma acts while it is compiled, so one from the cache of statements would do nothing;
        # executescript compiles always.
        self._database.executescript(f"PRAGMA synchronous = {level}")

    def _refuse_without_ballast(self) -> None:
        if not self._ballast or self._ballast.held:
            return
        with self._translated:
            if not self._ballast.take():
                raise full(self._path)
        log.info("ballast is back", extra={"directory": str(self._directory)})

    def _with_ballast(self, work: Callable[[], None]) -> None:
        """Do `work`, on a full disk with the room of the ballast."""
        try:
            return work()
        except StoreFull:
            log.debug("disk is full", extra={"directory": str(self._directory)})
        if self._ballast and self._ballast.drop():
            log.warning("disk is full: ballast given up for deletes", extra={"directory": str(self._directory)})
        self._move_log()
        return work()


@cache
def _get(count: int) -> str:
    return f"{ITEM} WHERE key IN ({','.join('?' * count)})"


def _growth(events: Iterable[Event]) -> int:
    """How many more keys there are after `events`."""
    return sum(-1 if event.deleted else event.item.created == event.item.revision for event in events)


def _end(prefix: str) -> str | bytes:
    # SQLite sorts every blob after every text: the empty one stands for "no end".
    return after_prefix(prefix) or b""


class SqliteStore(LocalStore):
    """A Store in the directory `path`, made if missing. ballast: keep room for deletes on a full disk."""

    def __init__(self, path: Path, ballast: bool = True, *, clock: Clock | None = None, history: int = HISTORY) -> None:
        super().__init__(SqliteRows(path, ballast=ballast), clock=clock, history=history)
