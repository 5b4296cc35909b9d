"""The etcd store while members die, stop, forget and come back: three true members on loopback."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest

from tests.store.backends import Said
from tests.store.engine import MISSING, Engine, installed
from towpath.store.contract import Batch, OutcomeUnknown, Put, Reset, StoreError, StoreUnavailable
from towpath.store.etcd.gateway import Limits
from towpath.store.etcd.store import EtcdStore
from towpath.store.watch import Watch

pytestmark = pytest.mark.skipif(not installed(), reason=MISSING)

LIMITS = Limits(connect=0.3, attempt=1.0, total=3.0, pause=0.05, ping=0.5)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(3)
    engine.start()
    try:
        engine.wait()
        yield engine
    finally:
        engine.stop()


@pytest.fixture
async def store(engine: Engine) -> AsyncIterator[EtcdStore]:
    """A store of its own prefix, on a whole cluster."""
    engine.wait()
    store = EtcdStore(engine.endpoints, f"/faults-{next(_numbers)}/", limits=LIMITS)
    await store.open()
    yield store
    await store.close()


async def until_heard(watch: Watch, revision: int) -> list[Said]:
    """What the watch says up to `revision`."""
    said: list[Said] = []
    async with asyncio.timeout(10):
        while not said or said[-1].revision < revision:
            said.append(await anext(watch))
    return said


def put_keys(said: list[Said]) -> list[str]:
    return [event.item.key for batch in said if isinstance(batch, Batch) for event in batch.events]


async def test_no_write_is_lost_or_doubled_when_the_leader_is_killed(engine: Engine, store: EtcdStore) -> None:
    watch = store.watch("w/")
    acked: list[str] = []
    unknown: list[str] = []
    stop = asyncio.Event()

    async def write(writer: int) -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            key = f"w/{writer}/{n}"
            try:
                await store.put(key, b"x")
                acked.append(key)
            except OutcomeUnknown:
                unknown.append(key)
            except StoreUnavailable:
                await asyncio.sleep(0.05)

    writers = [asyncio.create_task(write(n)) for n in range(4)]
    await asyncio.sleep(0.5)
    leader = engine.leader()
    before = len(acked)
    leader.kill()
    await asyncio.sleep(2.5)
    stop.set()
    await asyncio.gather(*writers)
    try:
        assert len(acked) > before + 100, "writes went on"
        said = await until_heard(watch, (await store.put("w/end", b"")))
        there = put_keys(said)[:-1]
        assert not any(isinstance(s, Reset) for s in said)
        assert len(there) == len(set(there)), "none twice"
        assert set(acked) <= set(there) <= {*acked, *unknown}
        assert {item.key for item in (await store.list("w/")).items} == {*there, "w/end"}
        assert not unknown, "every lost answer was found out"
    finally:
        leader.start(engine.cluster)


async def test_without_a_quorum_the_past_is_read_and_writes_say_so_in_time(engine: Engine, store: EtcdStore) -> None:
    await store.put("a", b"1")
    watch = store.watch("")
    lonely, *others = engine.members
    alone = EtcdStore((lonely.endpoint,), store._scope.prefix, limits=replace(LIMITS, total=2.0))
    await alone.open()
    for member in others:
        member.pause()
    try:
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises((StoreUnavailable, OutcomeUnknown)):
                await store.put("b", b"")
            assert time.monotonic() - began < LIMITS.total + 1
            with pytest.raises((StoreUnavailable, OutcomeUnknown)):
                await alone.put("b", b"")
        with pytest.raises(StoreUnavailable):
            await alone.get("a")
        item = await alone.get("a", stale=True)
        assert item
        assert item.value == b"1"
        assert [i.key for i in (await alone.list("", stale=True)).items] == ["a"]
        assert not alone.following, "a member without a leader ends the watch"
    finally:
        for member in others:
            member.resume()
    engine.wait()
    while True:
        try:
            last = await alone.put("c", b"")
            break
        except StoreError:
            await asyncio.sleep(0.1)
    keys = put_keys(await until_heard(watch, last))
    assert keys[-1] == "c"
    assert keys.count("b") <= 4
    await alone.close()


async def test_a_stopped_member_is_left_and_its_watch_goes_on_elsewhere(engine: Engine, store: EtcdStore) -> None:
    first = engine.members[0]
    if first is engine.leader():
        first = engine.members[1]
    others = [member.endpoint for member in engine.members if member is not first]
    reader = EtcdStore((first.endpoint, *others), store._scope.prefix, limits=LIMITS)
    await reader.open()
    watch = reader.watch("")
    await until_heard(watch, await store.put("a", b""))
    first.pause()
    try:
        last = await store.put("b", b"")
        began = time.monotonic()
        assert put_keys(await until_heard(watch, last)) == ["b"]
        assert time.monotonic() - began < 5
    finally:
        first.resume()
        await reader.close()


@pytest.mark.parametrize("compacted", [False, True], ids=["the engine remembers", "the engine compacted"])
async def test_a_watch_that_was_cut_off_misses_nothing_unsaid(
    engine: Engine, store: EtcdStore, compacted: bool
) -> None:
    member = engine.members[2]
    reader = EtcdStore((member.endpoint,), store._scope.prefix, limits=LIMITS)
    await reader.open()
    try:
        watch = reader.watch("k")
        await until_heard(watch, await store.put("k0", b""))
        member.kill()
        for n in range(1, 5):
            await store.put(f"k{n}", b"")
        await store.delete("k1")
        if compacted:
            await store.compact(1)
        last = await store.put("k5", b"")
        member.start(engine.cluster)
        said = await until_heard(watch, last)
        if compacted:
            assert isinstance(said[0], Reset)
            assert {item.key for item in (await store.list("k")).items} == {"k0", "k2", "k3", "k4", "k5"}
            assert put_keys(said)[-1] == "k5"
        else:
            assert put_keys(said) == ["k1", "k2", "k3", "k4", "k1", "k5"]
        assert put_keys(await until_heard(watch, await store.put("k6", b""))) == ["k6"], "and goes on"
    finally:
        await reader.close()


async def test_a_large_transaction_is_one_revision_and_one_batch(engine: Engine, store: EtcdStore) -> None:
    watch = store.watch("")
    value = b"v" * 400
    result = await store.txn((), tuple(Put(f"k/{n:04}", value) for n in range(2000)))
    said = await until_heard(watch, result.revision)
    assert len(said) == 1
    assert put_keys(said) == list(result.changed)
    listing = await store.list("k/")
    assert {item.revision for item in listing.items} == {result.revision}
    with pytest.raises(StoreError, match="more than etcd takes"):
        await store.txn((), tuple(Put(f"k/{n}", b"") for n in range(3601)))
    with pytest.raises(StoreError, match="too large"):
        await store.put("large", b"x" * 2_000_000)


async def test_leases_outlive_their_leader(engine: Engine, store: EtcdStore) -> None:
    lease = await store.grant(2)
    await store.put("node", b"", lease=lease)
    leader = engine.leader()
    leader.kill()
    try:
        for _ in range(5):
            assert await store.keep_alive(lease) == 2
            await asyncio.sleep(0.3)
        assert await store.get("node")
        watch = store.watch("node")
        began = time.monotonic()
        said = await anext(watch)
        assert isinstance(said, Batch)
        assert said.events[0].deleted
        assert 1 < time.monotonic() - began < 6, "it ends soon after it was kept alive last"
    finally:
        leader.start(engine.cluster)
