"""The SQLite file itself: made whole or not at all, opened with our settings, its errors put in our words."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path
from types import TracebackType

from towpath.store.contract import OutcomeUnknown, StoreError, StoreFull, StoreUnavailable

FILE = "store.db"
APPLICATION = 0x746F7770  # "towp", shown by file(1)
VERSION = 1

# progress: the store is at least at `revision` and knows no event up to `forgotten` (both set by compaction); the table
# of items shows the store at revision `settled`.
SCHEMA = """
CREATE TABLE item (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL, created INTEGER NOT NULL,
    lease INTEGER NOT NULL
);
CREATE INDEX item_lease ON item (lease) WHERE lease != 0;
CREATE TABLE event (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, value BLOB NOT NULL, created INTEGER NOT NULL, lease INTEGER NOT NULL,
    deleted INTEGER NOT NULL
);
CREATE TABLE lease (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl REAL NOT NULL);
CREATE TABLE progress (revision INTEGER NOT NULL, forgotten INTEGER NOT NULL, settled INTEGER NOT NULL);
INSERT INTO progress VALUES (0, 0, 0);
"""

# The lock is kept from the first access to the last, so no shared-memory file is needed (which a full disk could not
# grow) and no transaction pays for locking. Others come through the agent.
# When the log holds 200 pages (800 kB) it is moved into the database: what that may add to the file is less than the
# ballast (ballast.py), so on a full disk it can still be done, after which the log is written from its beginning again.
SETTINGS = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA wal_autocheckpoint = 200;
PRAGMA temp_store = MEMORY;
"""

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Translated:
    """`with` this, an error of SQLite or of the file system comes out as a StoreError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.committing = False

    def __enter__(self) -> Translated:
        self.committing = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(exc, sqlite3.Error) and hasattr(exc, "sqlite_errorcode"):
            raise self._of_sqlite(exc) from exc
        if isinstance(exc, OSError):
            raise self._of_system(exc) from exc

    def _of_sqlite(self, exc: sqlite3.Error) -> StoreError:
        primary = exc.sqlite_errorcode & 0xFF  # extended result codes hold the plain one in their low byte
        if primary == sqlite3.SQLITE_FULL:
            return full(self._path)
        if primary in DAMAGED:
            return damaged(self._path, str(exc))
        if self.committing:
            # The frames may be in the log already: after a crash SQLite would count them.
            return OutcomeUnknown(f"database {self._path}: {exc}; the write may or may not be kept")
        return StoreUnavailable(f"database {self._path}: {exc}")

    def _of_system(self, exc: OSError) -> StoreError:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return full(self._path)
        hint = "only root may: run it with sudo" if exc.errno in (errno.EACCES, errno.EPERM) else ""
        return StoreUnavailable(f"{exc.filename or self._path}: {exc.strerror}", hint=hint)


def full(path: Path) -> StoreFull:
    return StoreFull(f"no room to write {path}: the disk is full", hint=f"free some space in {path.parent}")


def damaged(path: Path, why: str) -> StoreError:
    return StoreError(
        f"database {path} is damaged: {why}",
        hint="restore it, or move it away with its -wal file: an empty one is made at the next start",
    )


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database at `path`, which is made if it is not there. Raises StoreError where it cannot be used.

    A file that is there is never replaced, not even an empty one: SQLite would take that for a new database.
    """
    log = path.with_name(f"{path.name}-wal")
    if not path.exists():
        if log.exists() and log.stat().st_size:
            raise damaged(path, f"it is missing, while its log {log} is there")
        _make(path)
    elif not path.stat().st_size:
        raise damaged(path, "it is empty")
    connection = _connect(path)
    try:
        connection.executescript(SETTINGS)
        _check(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=1.0, isolation_level=None)


def _make(path: Path) -> None:
    """Write an empty database beside its place, then move it there: half of one is never seen."""
    draft = path.with_name(f"{path.name}.new")
    for rest in (draft, draft.with_name(f"{draft.name}-journal")):
        rest.unlink(missing_ok=True)
    connection = _connect(draft)
    try:
        connection.executescript(
            f"BEGIN; {SCHEMA} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT;"
        )
    finally:
        connection.close()
    draft.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise StoreError(f"database {path} is not one of Towpath", hint="choose another state_dir")
    if version > VERSION:
        raise StoreError(
            f"database {path} has form {version}, made by a newer Towpath; this one reads up to {VERSION}",
            hint="install that version again",
        )
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise damaged(path, " ".join(found.split()))
