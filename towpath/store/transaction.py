"""Decide what a transaction changes: compares and changes in, events out. No disk, no clock, no waiting.

Both local backends go through here, so that they cannot differ in what a transaction means.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from towpath.store.contract import Absent, AtRevision, Change, Compare, Delete, Event, HasValue, Item, Put

LAST = "\U0010ffff"


class View(Protocol):
    """What a decision may look at."""

    def read(self, keys: Iterable[str]) -> dict[str, Item]:
        """Those of `keys` that exist."""
        ...

    def scan(self, prefix: str, after: str = "", limit: int = 0) -> list[Item]: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """ok, failed: see TxnResult. events: what changes, in key order; () = nothing does."""

    ok: bool
    failed: tuple[int, ...]
    events: tuple[Event, ...]


def after_prefix(prefix: str) -> str:
    """The smallest key that sorts after every key with this prefix; "" where there is none."""
    stem = prefix.rstrip(LAST)
    if not stem:
        return ""
    code = ord(stem[-1]) + 1
    # U+D800..U+DFFF are no characters: UTF-8 cannot hold them.
    return stem[:-1] + chr(0xE000 if code == 0xD800 else code)


def first_key(prefix: str, after: str) -> str:
    """The smallest key with `prefix` that sorts after `after`."""
    return f"{after}\0" if after >= prefix and after else prefix


def check_key(key: str) -> None:
    """Raise ValueError unless `key` can be one."""
    if not key:
        raise ValueError("a key may not be empty")
    if not key.isascii():
        key.encode()  # a lone surrogate raises UnicodeEncodeError, which is a ValueError


def check(compares: tuple[Compare, ...], *branches: tuple[Change, ...]) -> None:
    """Raise ValueError where a transaction makes no sense, whatever the store holds."""
    for compare in compares:
        check_key(compare.key)
    for branch in branches:
        _check_branch(branch)


def _check_branch(branch: tuple[Change, ...]) -> None:
    named: set[str] = set()
    prefixes: list[str] = []
    for change in branch:
        if isinstance(change, Delete) and change.prefix:
            prefixes.append(change.key)
            continue
        check_key(change.key)
        if change.key in named:
            raise ValueError(f"key {change.key!r} is changed twice in one transaction")
        if isinstance(change, Put) and not isinstance(change.value, bytes):
            raise ValueError(f"value of {change.key!r} must be bytes, not {type(change.value).__name__}")
        named.add(change.key)
    for index, prefix in enumerate(prefixes):
        others = prefixes[:index] + prefixes[index + 1 :]
        if clash := next((k for k in (*named, *others) if k.startswith(prefix)), None):
            raise ValueError(f"key {clash!r} is changed twice in one transaction: prefix {prefix!r} is deleted too")


def decide(
    view: View,
    compares: tuple[Compare, ...],
    then: tuple[Change, ...],
    orelse: tuple[Change, ...],
    revision: int,
) -> Decision:
    """What the transaction does to `view`; its changes will carry `revision`. The input has passed `check`."""
    seen = view.read(dict.fromkeys([*(c.key for c in compares), *_single_keys(then)]))
    failed = tuple(index for index, compare in enumerate(compares) if not holds(compare, seen.get(compare.key)))
    branch = then
    if failed:
        branch = orelse
        seen |= view.read(_single_keys(orelse))
    events: list[Event] = []
    for change in branch:
        events += _events(view, seen, change, revision)
    events.sort(key=_key_of)
    return Decision(not failed, failed, tuple(events))


def deletions(items: Iterable[Item], revision: int) -> tuple[Event, ...]:
    """The events that take `items` away, in key order."""
    return tuple(sorted((_gone(item, revision) for item in items), key=_key_of))


def _single_keys(branch: tuple[Change, ...]) -> list[str]:
    return [change.key for change in branch if not (isinstance(change, Delete) and change.prefix)]


def holds(compare: Compare, item: Item | None) -> bool:
    if isinstance(compare, Absent):
        return item is None
    if isinstance(compare, AtRevision):
        return item is not None and item.revision == compare.revision
    assert isinstance(compare, HasValue)
    return item is not None and item.value == compare.value


def _events(view: View, seen: dict[str, Item], change: Change, revision: int) -> list[Event]:
    old = seen.get(change.key)
    if isinstance(change, Put):
        created = old.created if old else revision
        return [Event(Item(change.key, change.value, revision, created, change.lease))]
    if change.prefix:
        return [_gone(item, revision) for item in view.scan(change.key)]
    return [_gone(old, revision)] if old else []


def _gone(item: Item, revision: int) -> Event:
    return Event(Item(item.key, b"", revision, item.created, item.lease), deleted=True)


def _key_of(event: Event) -> str:
    return event.item.key
