"""From the words of the configuration to a store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from towpath.errors import BadConfig
from towpath.store.clock import Clock
from towpath.store.contract import Store
from towpath.store.memory import MemoryStore
from towpath.store.sqlite import SqliteStore

if TYPE_CHECKING:
    import ssl

ENDPOINT = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(?P<port>\d{1,5}))?")
ETCD_PORT = 2379
KNOWN = "memory://, sqlite:///path/of/directory, a path, or etcd://host:port,host:port"


def open_store(where: str | Path, *, clock: Clock | None = None, tls: ssl.SSLContext | None = None) -> Store:
    """The store at `where`, not opened yet: "memory://", "sqlite:///path/of/directory", the path of a directory, or
    "etcd://host:port,host:port" (a path after it is the prefix of its keys; the port may be left out).

    tls: how to speak to the members of etcd; None = plain HTTP. Raises BadConfig for anything else.
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
    if scheme == "etcd" and rest:
        hosts, slash, prefix = rest.partition("/")
        from towpath.store.etcd.store import EtcdStore  # not paid for by nodes that have no engine
        from towpath.store.etcd.wire import PREFIX

        keys = f"{slash}{prefix}".rstrip("/")
        return EtcdStore(etcd_endpoints(hosts), f"{keys}/" if keys else PREFIX, tls, clock=clock)
    raise BadConfig(f"store {where!r} is not known", hint=KNOWN)


def etcd_endpoints(text: str) -> tuple[str, ...]:
    """ "a,b:2380,[fd00::1]" → host:port of each. Raises BadConfig."""
    found = []
    for part in text.split(","):
        match = ENDPOINT.fullmatch(part.strip())
        if not match or not 0 < int(match["port"] or ETCD_PORT) < 65536:
            raise BadConfig(f"etcd member {part!r} is not HOST or HOST:PORT", hint="an IPv6 address stands in brackets")
        found.append(f"{match['host']}:{match['port'] or ETCD_PORT}")
    return tuple(found)
