"""Random steps against every backend and against a model made of plain dicts: they never differ."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.store import engine
from tests.store.backends import BACKENDS, AnyStore, Said, heard
from tests.store.hand_clock import HandClock
from towpath.store.contract import (
    Absent,
    AtRevision,
    Batch,
    Change,
    Compare,
    Delete,
    Event,
    HasValue,
    Item,
    LeaseGone,
    Put,
    Reset,
)
from towpath.store.watch import Watch

T = TypeVar("T")

HISTORY = 12
PREFIXES = ["", "a", "a/", "a/b", "b"]
names = st.sampled_from(["a", "a/", "a/b", "a/c", "ab", "b", "b/\U0010ffff", "c"])
values = st.sampled_from([b"", b"x", b"y\0z"])


@dataclass
class Reader:
    """A watch, and what the model knows of it. first: the revision it has to tell next; 0 = it has lost its place."""

    watch: Watch
    prefix: str
    first: int

    def steps_over(self, revision: int, events: tuple[Event, ...]) -> None:
        """One that knows all so far need not stop at what is not under its prefix."""
        if self.first == revision and not any(e.item.key.startswith(self.prefix) for e in events):
            self.first += 1


class Model:
    """The store as its contract tells it."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        self.history: dict[int, tuple[Event, ...]] = {}
        self.leases: dict[int, tuple[float, float]] = {}  # lease → TTL, deadline
        self.revision = 0
        self.compacted = 0
        self.readers: list[Reader] = []

    @property
    def forgotten(self) -> int:
        return max(self.compacted, self.revision - HISTORY)

    def holds(self, compare: Compare) -> bool:
        item = self.items.get(compare.key)
        match compare:
            case Absent():
                return item is None
            case AtRevision(_, revision):
                return item is not None and item.revision == revision
            case HasValue(_, value):
                return item is not None and item.value == value

    def apply(self, branch: tuple[Change, ...]) -> tuple[str, ...]:
        events: dict[str, Event] = {}
        revision = self.revision + 1
        for change in branch:
            for key in self._named(change):
                old = self.items.get(key)
                if isinstance(change, Put):
                    created = old.created if old else revision
                    events[key] = Event(Item(key, change.value, revision, created, change.lease))
                elif old:
                    events[key] = Event(Item(key, b"", revision, old.created, old.lease), deleted=True)
        if not events:
            return ()
        self.revision = revision
        self.history[revision] = tuple(events[key] for key in sorted(events))
        for reader in self.readers:
            reader.steps_over(revision, self.history[revision])
        for key, event in events.items():
            if event.deleted:
                del self.items[key]
            else:
                self.items[key] = event.item
        return tuple(sorted(events))

    def _named(self, change: Change) -> list[str]:
        if isinstance(change, Delete) and change.prefix:
            return [key for key in self.items if key.startswith(change.key)]
        return [change.key]

    def end(self, lease: int) -> None:
        if self.leases.pop(lease, None):
            self.apply(tuple(Delete(key) for key, item in self.items.items() if item.lease == lease))

    def said(self, reader: Reader) -> list[Said]:
        """All that `reader` has to hear; then it knows everything."""
        first, reader.first = reader.first, self.revision + 1
        if first <= self.forgotten:
            return [Reset(self.revision)]
        said: list[Said] = []
        for revision in range(first, self.revision + 1):
            if events := tuple(e for e in self.history[revision] if e.item.key.startswith(reader.prefix)):
                said.append(Batch(revision, events))
        return said


class StoreMachine(RuleBasedStateMachine):
    backend = "memory"
    turns_clock = True
    examples = 40
    longer = 0  # seconds that leases live beyond what is drawn

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = HandClock()
        self.model = Model()
        self.granted: list[int] = []
        self.store: AnyStore = BACKENDS[self.backend](Path(self.folder.name), self.clock, HISTORY)
        self.run(self.store.open())

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.close()
        self.folder.cleanup()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @rule(key=names, value=values)
    def put(self, key: str, value: bytes) -> None:
        self.model.apply((Put(key, value),))
        assert self.run(self.store.put(key, value)) == self.model.revision

    @rule(key=names, prefix=st.booleans())
    def delete(self, key: str, prefix: bool) -> None:
        self.model.apply((Delete(key, prefix),))
        assert self.run(self.store.delete(key, prefix=prefix)) == self.model.revision

    @rule(data=st.data())
    def txn(self, data: st.DataObject) -> None:
        compares = data.draw(st.lists(self._compare(), max_size=3).map(tuple))
        then, orelse = data.draw(self._branch()), data.draw(self._branch())
        failed = tuple(i for i, compare in enumerate(compares) if not self.model.holds(compare))
        changed = self.model.apply(orelse if failed else then)
        result = self.run(self.store.txn(compares, then, orelse, durable=data.draw(st.booleans())))
        assert (result.ok, result.failed, result.changed) == (not failed, failed, changed)
        assert result.revision == self.model.revision

    def _compare(self) -> st.SearchStrategy[Compare]:
        revisions = st.integers(0, self.model.revision)
        return st.one_of(
            st.builds(Absent, names), st.builds(AtRevision, names, revisions), st.builds(HasValue, names, values)
        )

    def _branch(self) -> st.SearchStrategy[tuple[Change, ...]]:
        leases = st.sampled_from([0, *self.model.leases])
        change = st.one_of(st.builds(Put, names, values, leases), st.builds(Delete, names))
        return st.lists(change, max_size=4, unique_by=lambda c: c.key).map(tuple)

    @rule(ttl=st.integers(1, 9))
    def grant(self, ttl: int) -> None:
        ttl += self.longer
        lease = self.run(self.store.grant(ttl))
        assert lease not in self.model.leases
        self.granted.append(lease)
        self.model.leases[lease] = (ttl, self.clock.now() + ttl)

    def _lease(self, number: int) -> int:
        """The number-th lease that was granted, or one that never was."""
        return self.granted[number - 1] if number <= len(self.granted) else number

    @rule(number=st.integers(1, 6))
    def keep_alive(self, number: int) -> None:
        lease = self._lease(number)
        if lease in self.model.leases:
            ttl = self.model.leases[lease][0]
            assert self.run(self.store.keep_alive(lease)) == ttl
            self.model.leases[lease] = (ttl, self.clock.now() + ttl)
        else:
            with pytest.raises(LeaseGone):
                self.run(self.store.keep_alive(lease))

    @rule(number=st.integers(1, 6))
    def revoke(self, number: int) -> None:
        lease = self._lease(number)
        self.model.end(lease)
        self.run(self.store.revoke(lease))

    @precondition(lambda self: self.turns_clock)
    @rule(seconds=st.integers(1, 6))
    def time_passes(self, seconds: int) -> None:
        self.clock.turn(seconds)
        due = sorted((end, lease) for lease, (_, end) in self.model.leases.items() if end <= self.clock.now())
        for _, lease in due:
            self.model.end(lease)

    @rule(prefix=st.sampled_from(PREFIXES), back=st.integers(0, 20), now=st.booleans())
    def watch(self, prefix: str, back: int, now: bool) -> None:
        here = self.model.revision + 1
        first = 0 if now else max(1, here + 1 - back)
        watch = self.run(self._watch(prefix, first))
        self.model.readers.append(Reader(watch, prefix, 0 if first > here else first or here))

    async def _watch(self, prefix: str, first: int) -> Watch:
        return self.store.watch(prefix, first)

    @precondition(lambda self: self.model.readers)
    @rule(data=st.data())
    def read_a_watch(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.model.readers))
        assert self.run(heard(reader.watch)) == self.model.said(reader)

    @rule(keep=st.integers(0, 6))
    def compact(self, keep: int) -> None:
        self.model.compacted = max(self.model.forgotten, self.model.revision - keep)
        self.run(self.store.compact(keep))

    @rule()
    def restart(self) -> None:
        self.run(self.store.close())
        assert all(self.run(anext_or_none(reader.watch)) is None for reader in self.model.readers)
        self.model.readers = []
        self.run(self.store.open())
        now = self.clock.now()
        self.model.leases = {lease: (ttl, now + ttl) for lease, (ttl, _) in self.model.leases.items()}

    @rule(prefix=st.sampled_from(PREFIXES), limit=st.integers(0, 3), after=st.one_of(st.just(""), names))
    def page(self, prefix: str, limit: int, after: str) -> None:
        want = [self.model.items[k] for k in sorted(self.model.items) if k.startswith(prefix) and k > after]
        listing = self.run(self.store.list(prefix, limit=limit, after=after))
        assert listing.more == (0 < limit < len(want))
        assert list(listing.items) == (want[:limit] if limit else want)

    @invariant()
    def same(self) -> None:
        assert list(self.run(self.store.list("")).items) == [self.model.items[k] for k in sorted(self.model.items)]
        status = self.run(self.store.status())
        assert (status.revision, status.keys) == (self.model.revision, len(self.model.items))


async def anext_or_none(watch: Watch) -> Said | None:
    return await anext(watch, None)


class SqliteMachine(StoreMachine):
    backend = "sqlite"


class EtcdMachine(StoreMachine):
    backend = "etcd"
    turns_clock = False
    longer = 600
    examples = 12


@pytest.mark.parametrize("machine", [StoreMachine, SqliteMachine, EtcdMachine], ids=["memory", "sqlite", "etcd"])
def test_a_backend_never_differs_from_the_model(machine: type[StoreMachine], monkeypatch: pytest.MonkeyPatch) -> None:
    if machine is EtcdMachine and not engine.installed():
        pytest.skip(engine.MISSING)
    monkeypatch.setattr("towpath.store.sqlite.SETTLE_AT", 5)  # so that items are met in the journal and in the table
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=machine.examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
