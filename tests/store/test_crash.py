"""Killed at any moment, the store holds each transaction whole or not at all, and every one that was answered."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from tests.store.backends import heard
from towpath.store.contract import Batch
from towpath.store.sqlite import SqliteStore

ROUNDS = 15
WIDTH = 6  # keys per transaction

WRITER = f"""
import asyncio, sys
from pathlib import Path
from towpath.store.contract import Delete, Put
from towpath.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    n = (await store.status()).revision
    while True:
        n += 1
        value = b"%d" % n
        puts = tuple(Put(f"{{table}}/{{n % 50}}", value) for table in range({WIDTH}))
        result = await store.txn((), (*puts, Delete(f"gone/{{n - 1}}"), Put(f"gone/{{n}}", value)), durable=n % 10 == 0)
        assert result.revision == n
        sys.stdout.write(f"{{n}}\\n")
        sys.stdout.flush()

asyncio.run(main())
"""


async def test_a_killed_process_leaves_whole_transactions(tmp_path: Path) -> None:
    rand = random.Random(20)
    answered = 0
    for _ in range(ROUNDS):
        answered = max(answered, write_until_killed(tmp_path, rand.uniform(0.0, 0.03)))
        store = SqliteStore(tmp_path)
        await store.open()
        await check(store, answered)
        await store.close()
    assert answered > ROUNDS


def write_until_killed(path: Path, after: float) -> int:
    """Let a process write, kill it `after` seconds from its first answer; the last revision it answered."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        first = writer.stdout.readline()
        time.sleep(after)
        writer.kill()
        lines = (first + writer.stdout.read()).split(b"\n")
    return int(lines[-2])


async def check(store: SqliteStore, answered: int) -> None:
    revision = (await store.status()).revision
    assert revision in (answered, answered + 1), "what was answered is there; at most one more was on its way"
    items = (await store.list("")).items
    assert [i.key for i in items if i.key.startswith("gone/")] == [f"gone/{revision}"]
    for n in range(max(1, revision - 49), revision + 1):
        values = {i.value for i in items if i.key.endswith(f"/{n % 50}") and not i.key.startswith("gone/")}
        assert values == {b"%d" % n}, "all keys of one transaction have its value"
    assert (await store.status()).keys == len(items)
    history = await heard(store.watch("", max(1, revision - 100)))
    assert [said.revision for said in history] == list(range(max(1, revision - 100), revision + 1))
    assert all(isinstance(said, Batch) and len(said.events) >= WIDTH + 1 for said in history)
