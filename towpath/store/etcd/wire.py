"""The store's words in those of etcd's JSON gateway, and back: keys, revisions, items, events. No sockets.

The gateway's JSON is protobuf's: bytes are base64, 64-bit numbers are text, and what is zero is left out
(etcd api/etcdserverpb/rpc.proto, api/mvccpb/kv.proto).
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from towpath.store.contract import Event, Item
from towpath.store.transaction import after_prefix, first_key

Json = dict[str, Any]

PREFIX = "/towpath/"
EMPTY = 1  # the revision of an engine that nobody ever wrote to; a store that nobody ever wrote to is at 0


def text64(text: str) -> str:
    return b64encode(text.encode()).decode()


def bytes64(value: bytes) -> str:
    return b64encode(value).decode()


def number(said: Json, name: str) -> int:
    """A number that is text, or left out where it is zero."""
    return int(said.get(name, 0))


def header_revision(reply: Json) -> int:
    return number(reply.get("header", {}), "revision")


@dataclass(frozen=True, slots=True)
class Scope:
    """Which keys and revisions of the engine are the store's: `prefix` + key, and `origin` + revision."""

    prefix: str = PREFIX
    origin: int = EMPTY

    def __post_init__(self) -> None:
        if not self.prefix.endswith("/"):
            raise ValueError(f"prefix {self.prefix!r} of an etcd store does not end with a slash")

    @property
    def marks(self) -> str:
        """Where writers keep their marks (marks.py): beside what is watched, not in it."""
        return f"{self.prefix[:-1]}.marks/"

    def key(self, key: str) -> str:
        return text64(self.prefix + key)

    def span(self, prefix: str = "", after: str = "") -> Json:
        """The engine's range of all keys with `prefix` that sort after `after`.

        The engine sorts by bytes: for UTF-8 that is the order of the characters.
        """
        return {
            "key": text64(self.prefix + first_key(prefix, after)),
            "range_end": text64(after_prefix(self.prefix + prefix)),
        }

    def to_engine(self, revision: int) -> int:
        return self.origin + revision

    def from_engine(self, revision: int) -> int:
        return revision - self.origin

    def key_of(self, kv: Json) -> str:
        return b64decode(kv["key"]).decode().removeprefix(self.prefix)

    def item(self, kv: Json) -> Item:
        return Item(
            self.key_of(kv),
            b64decode(kv.get("value", "")),
            self.from_engine(number(kv, "mod_revision")),
            self.from_engine(number(kv, "create_revision")),
            number(kv, "lease"),
        )

    def items(self, reply: Json) -> list[Item]:
        return [self.item(kv) for kv in reply.get("kvs", ())]

    def event(self, said: Json) -> Event:
        item = self.item(said["kv"])
        if said.get("type") != "DELETE":
            return Event(item)
        # A deletion has no create_revision of its own; what was there before does, unless it is compacted away.
        before = said.get("prev_kv", {})
        created = self.from_engine(number(before, "create_revision")) if before else item.revision
        return Event(Item(item.key, b"", item.revision, created, number(before, "lease")), deleted=True)

    def batches(self, said: list[Json]) -> list[tuple[int, tuple[Event, ...]]]:
        """Events as the engine told them, by revision, and in key order inside one."""
        events = [self.event(one) for one in said]
        by_revision = groupby(events, lambda event: event.item.revision)
        return [(revision, tuple(sorted(of_one, key=lambda e: e.item.key))) for revision, of_one in by_revision]
