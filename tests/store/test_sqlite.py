"""What is true of the store on disk alone: its files, its lock, damage, and power cuts."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from towpath.store.contract import Absent, Put, StoreError, StoreInUse, StoreUnavailable
from towpath.store.lock import hold_lock
from towpath.store.sqlite import SqliteStore

HOLDER = """
import asyncio, sys
from pathlib import Path
from towpath.store.sqlite import SqliteStore

asyncio.run(SqliteStore(Path(sys.argv[1])).open())
print("open", flush=True)
sys.stdin.read()
"""


async def filled(path: Path, keys: int = 2000) -> SqliteStore:
    store = SqliteStore(path)
    await store.open()
    for start in range(0, keys, 100):
        await store.txn((), tuple(Put(f"key/{n:05}", b"x" * 200) for n in range(start, start + 100)))
    return store


# --- files and lock --------------------------------------------------------------------------------------------------


async def test_the_directory_is_made_and_is_for_its_owner_only(tmp_path: Path) -> None:
    store = await filled(tmp_path / "a" / "state", 100)
    assert (tmp_path / "a" / "state").stat().st_mode & 0o777 == 0o700
    ballast = (tmp_path / "a" / "state" / "ballast").stat()
    assert (ballast.st_size, ballast.st_blocks * 512 >= 1 << 20) == (1 << 20, True)
    await store.close()


@contextmanager
def held_elsewhere(path: Path) -> Iterator[int]:
    """Another process has a store open in `path`; its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "open\n"
        yield holder.pid
        holder.kill()


async def test_a_second_process_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    refused = pytest.raises(StoreInUse, match=rf"state_dir {tmp_path} is in use by process \d+")
    with held_elsewhere(tmp_path) as pid, refused as caught:
        await SqliteStore(tmp_path).open()
    assert str(pid) in str(caught.value)
    store = SqliteStore(tmp_path)
    await store.open()
    await store.close()


async def test_a_second_store_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    store = await filled(tmp_path, 100)
    with pytest.raises(StoreInUse, match=f"process {os.getpid()}"):
        await SqliteStore(tmp_path).open()
    assert await store.get("key/00001"), "the first is not disturbed"
    await store.close()


def test_a_lock_is_free_again_when_it_is_released(tmp_path: Path) -> None:
    with hold_lock(tmp_path), pytest.raises(StoreInUse):
        hold_lock(tmp_path)
    hold_lock(tmp_path).release()


async def test_an_open_that_failed_leaves_the_directory_free(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"not a database" * 100)
    for _ in range(2):
        with pytest.raises(StoreError, match="damaged"):
            await SqliteStore(tmp_path).open()
    hold_lock(tmp_path).release()


async def test_a_directory_that_cannot_be_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=str(tmp_path / "file")):
        await SqliteStore(tmp_path / "file" / "state").open()


# --- damage ----------------------------------------------------------------------------------------------------------


def garble(path: Path) -> None:
    """Overwrite a page in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(os.urandom(4096))


DAMAGE = [
    pytest.param(lambda path: path.write_bytes(b""), "it is empty", id="empty"),
    pytest.param(lambda path: path.write_bytes(os.urandom(8192)), "not a database", id="noise"),
    pytest.param(lambda path: os.truncate(path, path.stat().st_size // 2), "malformed", id="half of it"),
    pytest.param(garble, "", id="a page is overwritten"),
]


@pytest.mark.parametrize(("harm", "why"), DAMAGE)
async def test_a_damaged_file_is_named_and_never_replaced(tmp_path: Path, harm: object, why: str) -> None:
    await (await filled(tmp_path)).close()
    file = tmp_path / "store.db"
    assert callable(harm)
    harm(file)
    before = file.read_bytes()
    with pytest.raises(StoreError, match=f"database {file} is damaged: .*{why}") as caught:
        await SqliteStore(tmp_path).open()
    assert not isinstance(caught.value, StoreUnavailable), "trying again does not help"
    assert "move it away" in caught.value.hint
    assert file.read_bytes() == before


async def test_a_log_without_its_database_is_damage(tmp_path: Path) -> None:
    (tmp_path / "store.db-wal").write_bytes(b"x")
    with pytest.raises(StoreError, match="it is missing, while its log"):
        await SqliteStore(tmp_path).open()


async def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "store.db") as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(StoreError, match="is not one of Towpath"):
        await SqliteStore(tmp_path).open()


async def test_a_newer_form_is_refused(tmp_path: Path) -> None:
    await (await filled(tmp_path, 100)).close()
    database = sqlite3.connect(tmp_path / "store.db")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="form 99, made by a newer Towpath"):
        await SqliteStore(tmp_path).open()


async def test_a_database_half_made_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "store.db.new").write_bytes(b"half")
    await (await filled(tmp_path, 100)).close()


# --- durability ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("durable", "syncs"), [(True, 20), (False, 0)], ids=["durable", "not durable"])
def test_a_durable_transaction_reaches_the_disk_before_it_is_answered(
    tmp_path: Path, durable: bool, syncs: int
) -> None:
    """strace counts: SQLite calls fdatasync once per commit at synchronous=FULL, and at NORMAL not at all."""
    program = f"""
import asyncio, os
from pathlib import Path
from towpath.store.contract import Put
from towpath.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path({str(tmp_path)!r}))
    await store.open()
    await store.put("first", b"")  # a log that begins is synced too
    os.write(2, b"begin")
    for n in range(20):
        await store.txn((), (Put("a", b"%d" % n),), durable={durable})
    os.write(2, b"end")

asyncio.run(main())
"""
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-e", "trace=fdatasync,fsync,write", "-o", str(trace), sys.executable, "-c", program]
    try:
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    text = trace.read_text()
    between = text[text.index('"begin"') : text.index('"end"')]
    assert between.count("sync(") == syncs


async def test_opening_with_many_keys_is_quick_because_the_table_is_not_read_into_memory(tmp_path: Path) -> None:
    store = await filled(tmp_path, 5000)
    await store.close()
    await store.open()
    assert not (await store.txn((Absent("key/04999"),))).ok
    await store.close()
