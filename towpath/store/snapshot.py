"""The cluster tables as one reader saw them, in a file: what a node serves from when it starts without the engine.

One line of JSON says what follows, then one line per item; a checksum covers both. The file is replaced whole (written
beside, synced, renamed), so a crash leaves the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from towpath.store.contract import Item, StoreError

VERSION = 1


class SnapshotBroken(StoreError):
    """The file is damaged or of another version: it is as good as none."""


class WrongCluster(StoreError):
    """The rows of another cluster: this node was carried from one to another."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    cluster: str
    revision: int
    items: tuple[Item, ...]


def save(path: Path, snapshot: Snapshot) -> None:
    """Write it to `path`. Raises OSError."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(_encode(snapshot))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path, cluster: str) -> Snapshot | None:
    """What `save` wrote; None = there is no file. Raises SnapshotBroken, WrongCluster, OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    snapshot = _decode(path, data)
    if snapshot.cluster != cluster:
        raise WrongCluster(
            f"{path} holds rows of cluster {snapshot.cluster!r}, this node is in {cluster!r}",
            hint="towpath cluster leave forgets them",
        )
    return snapshot


def _encode(snapshot: Snapshot) -> bytes:
    body = b"".join(_line(item) for item in snapshot.items)
    head = {"v": VERSION, "cluster": snapshot.cluster, "revision": snapshot.revision, "items": len(snapshot.items)}
    return _head(head, body) + body


def _head(head: dict[str, object], body: bytes) -> bytes:
    said = json.dumps(head)
    checksum = hashlib.sha256(said.encode() + b"\n" + body).hexdigest()
    return f"{checksum} {said}\n".encode()


def _line(item: Item) -> bytes:
    fields = [item.key, b64encode(item.value).decode(), item.revision, item.created, item.lease]
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _decode(path: Path, data: bytes) -> Snapshot:
    head, _, body = data.partition(b"\n")
    try:
        said = json.loads(head.split(b" ", 1)[1])
        if _head(said, body) != head + b"\n":
            raise SnapshotBroken(f"{path} is damaged: its checksum is another")
        if said["v"] != VERSION:
            raise SnapshotBroken(f"{path} is of version {said['v']}, not {VERSION}")
        return Snapshot(said["cluster"], said["revision"], tuple(_items(body.splitlines())))
    except (IndexError, ValueError, KeyError, TypeError):
        raise SnapshotBroken(f"{path} is damaged: it cannot be read") from None


def _items(lines: Iterable[bytes]) -> Iterable[Item]:
    for line in lines:
        key, value, revision, created, lease = json.loads(line)
        yield Item(key, b64decode(value), revision, created, lease)
