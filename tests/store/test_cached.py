"""A store whose engine goes away and comes back: what is served meanwhile, and what is made good afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.store import engine
from tests.store.backends import Said, keys
from towpath.store import cached
from towpath.store.cached import CachedStore
from towpath.store.contract import (
    Absent,
    Batch,
    Delete,
    Item,
    OutcomeUnknown,
    Put,
    Reset,
    StoreError,
    StoreUnavailable,
    TxnResult,
)
from towpath.store.etcd.gateway import Limits
from towpath.store.etcd.store import EtcdStore
from towpath.store.memory import MemoryStore
from towpath.store.snapshot import WrongCluster


class Refused(StoreError):
    pass


class Engine(MemoryStore):
    """Away when a test says so; `anyway` is what others do meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.lose_answers = False
        self.refused: set[str] = set()

    def _check_open(self) -> None:
        if self.away:
            raise StoreUnavailable("away")
        super()._check_open()

    async def open(self) -> None:
        if self.away:
            raise StoreUnavailable("away")
        await super().open()

    async def txn(self, compares=(), then=(), orelse=(), *, durable=False, releasing=False) -> TxnResult:  # type: ignore[no-untyped-def]
        if any(change.key in self.refused for change in then):
            raise Refused("not yours")
        result = await super().txn(compares, then, orelse, durable=durable, releasing=releasing)
        if self.lose_answers:
            self.away = True
            raise OutcomeUnknown("lost")
        return result

    @contextmanager
    def anyway(self) -> Iterator[None]:
        was, self.away = self.away, False
        yield
        self.away = was


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "PROBE", 0.02)
    monkeypatch.setattr(cached, "SAVE", 0.01)


@pytest.fixture
def memory() -> Engine:
    return Engine()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.snap"


@pytest.fixture
async def store(memory: Engine, path: Path) -> AsyncIterator[CachedStore]:
    """Open, with a=1 and b=1 in the engine."""
    store = CachedStore(memory, path, cluster="c1")
    await store.open()
    await store.put("a", b"1")
    await store.put("b", b"1")
    await settled(store)
    yield store
    await store.close()


async def settled(store: CachedStore) -> None:
    """Until the engine is there and its last revision is known here."""
    async with asyncio.timeout(10):
        while store.away or store.revision < (await store.list("-")).revision:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def gone(store: CachedStore) -> None:
    """Until it is known that the engine is away."""
    async with asyncio.timeout(10):
        while not store.away:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def heard(watch: object, count: int) -> list[Said]:
    async with asyncio.timeout(5):
        return [await anext(watch) for _ in range(count)]  # type: ignore[call-overload]


async def test_while_the_engine_is_there_it_answers_itself(store: CachedStore, memory: Engine) -> None:
    assert await store.get("a") == await memory.get("a")
    assert await store.list("") == await memory.list("")
    assert not (await store.txn((Absent("a"),), (Put("a", b""),))).ok
    lease = await store.grant(60)
    await store.put("l", b"", lease=lease)
    await store.revoke(lease)
    assert await keys(store) == ["a", "b"]
    status = await store.status()
    assert (status.backend, dict(status.detail)["engine"]) == ("memory", "here")


async def test_what_was_known_is_served_while_the_engine_is_away(store: CachedStore, memory: Engine) -> None:
    memory.away = True
    assert await store.get("a") == Item("a", b"1", 1, 1)
    assert store.away
    assert await keys(store) == ["a", "b"]
    page = await store.list("", limit=1)
    assert ([i.key for i in page.items], page.more) == (["a"], True)
    assert await store.get("none") is None
    status = await store.status()
    assert (status.revision, status.keys, dict(status.detail)["engine"]) == (2, 2, "away")


async def test_own_writes_lie_over_what_was_known_and_are_made_good(store: CachedStore, memory: Engine) -> None:
    memory.away = True
    assert (await store.txn((), (Put("c", b"2"), Delete("b"), Delete("none")))).changed == ("b", "c")
    await store.put("c", b"3")
    assert await keys(store) == ["a", "c"]
    item = await store.get("c")
    assert item
    assert item.value == b"3"
    assert dict((await store.status()).detail)["waiting"] == "2"
    memory.away = False
    await settled(store)
    assert [(i.key, i.value) for i in (await memory.list("")).items] == [("a", b"1"), ("c", b"3")]
    assert dict((await store.status()).detail)["waiting"] == "0"


async def test_a_deleted_prefix_waits_as_the_keys_that_it_named(store: CachedStore, memory: Engine) -> None:
    memory.away = True
    await store.put("p/1", b"")
    await store.delete("", prefix=True)
    assert await keys(store) == []
    with memory.anyway():
        await memory.put("z", b"theirs")
    memory.away = False
    await settled(store)
    assert await keys(memory) == ["z"]


async def test_what_needs_agreement_is_refused_at_once(store: CachedStore, memory: Engine) -> None:
    lease = await store.grant(60)
    memory.away = True
    await gone(store)
    with pytest.raises(StoreUnavailable, match="needs its agreement"):
        await store.txn((Absent("x"),), (Put("x", b""),))
    with pytest.raises(StoreUnavailable, match="needs its agreement"):
        await store.put("x", b"", lease=lease)
    for asking in (store.grant(1), store.keep_alive(lease), store.revoke(lease), store.allocate("a", ("", "1"), b"o")):
        with pytest.raises(StoreUnavailable):
            await asking
    with pytest.raises(StoreUnavailable):
        await store.elect("x", b"")
    assert await store.get("x") is None


async def test_what_an_owner_holds_is_known_without_the_engine(store: CachedStore, memory: Engine) -> None:
    assert await store.allocate("subnets/", ("1", "2"), b"n1") == "1"
    await settled(store)
    memory.away = True
    await gone(store)
    assert await store.allocate("subnets/", ("1", "2"), b"n1") == "1"
    with pytest.raises(StoreUnavailable, match="needs its agreement"):
        await store.allocate("subnets/", ("1", "2"), b"n2")


async def test_a_write_whose_answer_was_lost_is_written_again(store: CachedStore, memory: Engine) -> None:
    memory.lose_answers = True
    await store.put("c", b"2")
    assert store.away
    item = await store.get("c")
    assert item
    assert item.value == b"2"
    memory.lose_answers = memory.away = False
    await settled(store)
    assert await keys(memory) == ["a", "b", "c"]


async def test_a_claim_whose_answer_was_lost_is_the_callers_to_find_out(store: CachedStore, memory: Engine) -> None:
    memory.lose_answers = True
    with pytest.raises(OutcomeUnknown):
        await store.txn((Absent("d"),), (Put("d", b""),))
    assert dict((await store.status()).detail)["waiting"] == "0"


async def test_watches_hear_reset_for_own_writes_and_then_what_became_of_them(
    store: CachedStore, memory: Engine
) -> None:
    mine, other = store.watch("c"), store.watch("x")
    memory.away = True
    await store.put("c", b"2")
    assert await heard(mine, 1) == [Reset(2)]
    assert await keys(store, "c") == ["c"]
    with memory.anyway():
        await memory.put("x", b"theirs")
    memory.away = False
    await settled(store)
    (said,) = await heard(other, 1)
    assert isinstance(said, Batch)
    assert (said.revision, said.events[0].item.value) == (3, b"theirs")
    (said,) = await heard(mine, 1)
    assert isinstance(said, Batch)
    assert (said.revision, said.events[0].item.value) == (4, b"2")


async def test_after_a_restart_without_the_engine_the_snapshot_is_served(
    store: CachedStore, memory: Engine, path: Path
) -> None:
    await store.close()
    memory.away = True
    again = CachedStore(memory, path, cluster="c1")
    await again.open()
    assert again.away
    assert [(i.key, i.value, i.revision) for i in (await again.list("")).items] == [("a", b"1", 1), ("b", b"1", 2)]
    behind, current = again.watch("", 1), again.watch("a")
    await again.put("own", b"")
    with memory.anyway():
        await MemoryStore.open(memory)
        await memory.delete("b")
        await memory.close()
    assert await keys(again) == ["a", "b", "own"]
    memory.away = False
    await settled(again)
    assert await keys(again) == ["a", "own"]
    assert isinstance((await heard(behind, 1))[0], Reset)
    assert isinstance((await heard(current, 1))[0], Reset), "what happened in between cannot be told"
    await again.close()


async def test_the_snapshot_is_written_while_it_runs(store: CachedStore, memory: Engine, path: Path) -> None:
    async with asyncio.timeout(5):
        while not path.exists() or b'"b"' not in path.read_bytes():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    memory.away = True
    await store.put("own", b"")
    await asyncio.sleep(0.05)
    assert b'"own"' not in path.read_bytes(), "it holds what the engine holds"


async def test_a_node_carried_to_another_cluster_says_so(store: CachedStore, memory: Engine, path: Path) -> None:
    await store.close()
    with pytest.raises(WrongCluster):
        await CachedStore(memory, path, cluster="c2").open()


async def test_a_broken_snapshot_is_as_good_as_none(memory: Engine, path: Path) -> None:
    path.write_bytes(b"rubbish")
    memory.away = True
    store = CachedStore(memory, path, cluster="c1")
    await store.open()
    assert await keys(store) == []
    memory.away = False
    await settled(store)
    await store.close()


async def test_a_write_that_the_engine_will_never_take_does_not_hold_up_others(
    store: CachedStore, memory: Engine
) -> None:
    memory.away = True
    await gone(store)
    memory.refused = {"bad"}
    await store.txn((), (Put("c", b""), Put("bad", b""), Put("d", b"")))
    memory.away = False
    await settled(store)
    assert await keys(store) == ["a", "b", "c", "d"]


async def test_a_closed_store_is_unavailable(store: CachedStore) -> None:
    watch = store.watch("")
    await store.close()
    await store.close()
    assert await anext(watch, None) is None
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.get("a")
    with pytest.raises(StoreUnavailable, match="not open"):
        store.watch("a")
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.grant(1)
    await store.open()
    with pytest.raises(ValueError, match="open already"):
        await store.open()
    assert await keys(store) == ["a", "b"]


@pytest.mark.skipif(not engine.installed(), reason=engine.MISSING)
async def test_a_true_engine_dies_and_comes_back(path: Path) -> None:
    cluster = engine.Engine(1)
    cluster.start()
    cluster.wait()
    member = cluster.members[0]
    limits = Limits(connect=0.2, attempt=0.5, total=1.0, pause=0.05, ping=0.5)
    try:
        store = CachedStore(EtcdStore(cluster.endpoints, limits=limits), path, cluster="c1")
        await store.open()
        await store.put("a", b"1")
        await settled(store)
        watch = store.watch("")
        member.kill()
        await store.put("b", b"1")
        assert await keys(store) == ["a", "b"]
        await store.close()

        store = CachedStore(EtcdStore(cluster.endpoints, limits=limits), path, cluster="c1")
        await store.open()
        assert await keys(store) == ["a"]
        await store.put("b", b"2")
        watch = store.watch("")
        member.start(cluster.cluster)
        await settled(store)
        item = await store.get("b")
        assert item
        assert (item.value, item.revision) == (b"2", 2)
        assert (await heard(watch, 1))[0].revision == 2
        await store.close()
    finally:
        cluster.stop()
