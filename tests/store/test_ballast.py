"""A disk that is really full (a small tmpfs): deletes go through, other writes are refused in words."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.backends import heard, keys
from tests.store.hand_clock import HandClock
from towpath.store.ballast import SIZE, Ballast
from towpath.store.contract import Delete, Put, StoreFull
from towpath.store.sqlite import SqliteStore

VALUE = b"x" * 500


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MB."""
    if os.geteuid():
        pytest.skip("needs root to mount a tmpfs")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tpt-disk", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Somebody else takes all room but `leave` bytes."""
    with (disk / "foreign").open("ab") as file:
        file.truncate(0)
        room = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - leave)


def free(disk: Path) -> None:
    (disk / "foreign").unlink()


async def write_until_full(store: SqliteStore, value: bytes = VALUE) -> int:
    for n in range(100_000):
        try:
            await store.put(f"more/{n}", value)
        except StoreFull:
            return n
    raise AssertionError("the disk never got full")


async def store_without_ballast(disk: Path) -> SqliteStore:
    """A store of 100 keys that had to give its ballast up."""
    store = SqliteStore(disk / "state")
    await store.open()
    for n in range(100):
        await store.put(f"key/{n}", VALUE)
    fill(disk)
    while await ballast_of(store) == "held":
        await store.txn((), tuple(Put(f"key/{n}", VALUE) for n in range(100)), releasing=True)
    fill(disk)
    return store


async def ballast_of(store: SqliteStore) -> str:
    return dict((await store.status()).detail)["ballast"]


async def test_on_a_full_disk_everything_can_be_deleted_and_nothing_be_added(disk: Path) -> None:
    store = SqliteStore(disk / "state")
    await store.open()
    for n in range(500):
        await store.put(f"key/{n}", VALUE)
    fill(disk, leave=300_000)
    added = await write_until_full(store)
    before = await keys(store)
    for n in range(added):
        await store.delete(f"more/{n}")
    for n in range(500):
        await store.txn((), (Delete(f"key/{n}"),), durable=True)
    assert len(before) == added + 500
    assert await keys(store) == []
    assert await ballast_of(store) == "used up"
    with pytest.raises(StoreFull, match=f"no room to write {disk}/state/store.db") as caught:
        await store.put("new", b"")
    assert caught.value.code == 11
    assert caught.value.hint
    with pytest.raises(StoreFull):
        await store.grant(5)
    await store.close()


@pytest.mark.parametrize("size", [200, 2100, 5000], ids=lambda size: f"{size} bytes")
async def test_a_store_that_filled_the_disk_by_itself_can_be_emptied_key_by_key(disk: Path, size: int) -> None:
    """Of the values that SQLite packs well, badly (one per page) and into overflow pages."""
    store = SqliteStore(disk / "state")
    await store.open()
    added = await write_until_full(store, b"x" * size)
    for n in range(added):
        await store.delete(f"more/{n * 7919 % added}")
    await store.delete("", prefix=True)
    assert await keys(store) == []
    await store.close()


async def test_only_a_write_that_frees_things_may_use_the_ballast(disk: Path) -> None:
    store = SqliteStore(disk / "state")
    await store.open()
    fill(disk)
    much = tuple(Put(f"attachment/{n}", VALUE) for n in range(700))
    with pytest.raises(StoreFull):
        await store.txn((), much)
    assert await ballast_of(store) == "held"
    assert (await store.txn((), much, releasing=True)).ok
    assert await ballast_of(store) == "used up"
    assert len(await keys(store)) == 700
    with pytest.raises(StoreFull):
        await store.put("a", b"")
    await store.close()


async def test_the_ballast_comes_back_with_the_room_and_so_do_writes(disk: Path) -> None:
    store = await store_without_ballast(disk)
    with pytest.raises(StoreFull):
        await store.put("a", b"")
    free(disk)
    assert await store.put("a", b"")
    assert await ballast_of(store) == "held"
    assert (disk / "state" / "ballast").stat().st_blocks * 512 >= SIZE
    await store.close()


async def test_an_agent_starts_on_a_full_disk_and_can_delete(disk: Path) -> None:
    store = await store_without_ballast(disk)
    before = await keys(store)
    await store.close()
    fill(disk)
    store = SqliteStore(disk / "state")
    await store.open()
    assert await keys(store) == before
    assert await ballast_of(store) == "used up"
    with pytest.raises(StoreFull):
        await store.put("a", b"")
    fill(disk, leave=100_000)
    for key in before:
        await store.delete(key)
    await store.close()


async def test_a_first_start_on_a_full_disk_is_refused_and_leaves_no_half_database(disk: Path) -> None:
    fill(disk)
    with pytest.raises(StoreFull):
        await SqliteStore(disk / "state").open()
    free(disk)
    store = SqliteStore(disk / "state")
    await store.open()
    await store.close()


async def test_a_lease_ends_on_a_full_disk(disk: Path) -> None:
    clock = HandClock()
    store = SqliteStore(disk / "state", clock=clock)
    await store.open()
    lease = await store.grant(5)
    await store.put("a", b"", lease=lease)
    fill(disk)
    await write_until_full(store)
    clock.turn(6)
    assert await store.get("a") is None
    await store.close()


async def test_what_a_full_disk_refused_left_no_trace(disk: Path) -> None:
    store = SqliteStore(disk / "state", ballast=False)
    await store.open()
    await store.put("a", VALUE)
    watch = store.watch("")
    revision = (await store.status()).revision
    fill(disk)
    with pytest.raises(StoreFull):
        await store.txn((), tuple(Put(f"b/{n}", VALUE) for n in range(2000)))
    assert (await store.status()).revision == revision
    assert await keys(store) == ["a"]
    assert await heard(watch) == []
    await store.close()


def test_the_ballast_is_not_taken_where_it_would_leave_nothing(disk: Path) -> None:
    fill(disk, leave=SIZE + SIZE // 2)
    ballast = Ballast(disk)
    ballast.open()
    assert not ballast.held
    free(disk)
    assert ballast.take()
    assert ballast.drop()
    assert not ballast.drop()
    assert not (disk / "ballast").exists()
