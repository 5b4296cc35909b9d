"""From the words of the configuration to a store."""

from __future__ import annotations

from pathlib import Path

from towpath.errors import BadConfig
from towpath.store.clock import Clock
from towpath.store.contract import Store
from towpath.store.memory import MemoryStore
from towpath.store.sqlite import SqliteStore


def open_store(where: str | Path, *, clock: Clock | None = None) -> Store:
    """The store at `where`: "memory://", "sqlite:///path/of/directory", or the path of a directory. Not opened yet.

    Raises BadConfig for anything else.
    """
    if isinstance(where, Path):
        return SqliteStore(where, clock=clock)
    scheme, separator, rest = where.partition("://")
    if not separator and where:
        return SqliteStore(Path(where), clock=clock)
    if scheme == "memory" and not rest:
        return MemoryStore(clock=clock)
    if scheme == "sqlite" and rest.startswith("/"):
        return SqliteStore(Path(rest), clock=clock)
    raise BadConfig(f"store {where!r} is not known", hint="memory://, sqlite:///path/of/directory, or a path")
