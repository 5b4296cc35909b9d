"""Nodes join and leave: rows and claims by compare-and-set, on each backend that is embedded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from itertools import combinations
from pathlib import Path

import pytest

from tests.store.backends import BACKENDS
from tests.store.hand_clock import HandClock
from towpath.errors import Conflict, NotFound, PoolEmpty
from towpath.overlay.cluster import declare, join, leave, read_config, read_members
from towpath.overlay.config import DCOS, Overlay
from towpath.overlay.records import CONFIG, NODES, Member, claims
from towpath.store.contract import Store
from towpath.store.memory import MemoryStore


@pytest.fixture(params=BACKENDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made = BACKENDS[request.param](tmp_path, HandClock(), 4096)
    await made.open()
    await declare(made, DCOS)
    yield made
    await made.close()


def who(number: int) -> Member:
    return Member(f"n{number}", IPv4Address("10.0.0.1") + number)


async def members(store: Store) -> dict[str, Member]:
    return read_members((await store.list(NODES)).items)


async def state(store: Store) -> dict[str, bytes]:
    return {item.key: item.value for item in (await store.list("")).items}


async def test_a_node_that_joined_finds_the_same_again_and_writes_nothing(store: Store) -> None:
    member = await join(store, who(0))
    before = await store.status()
    assert await join(store, who(0)) == member
    assert (await store.status()).revision == before.revision
    assert await members(store) == {"n0": member}


async def test_a_node_that_left_leaves_no_row_and_its_block_is_the_next_ones(store: Store) -> None:
    first, _ = await join(store, who(0)), await join(store, who(1))
    assert await leave(store, "n0")
    assert not any(b"n0" in value for value in (await state(store)).values())
    assert (await join(store, who(2))).slices == first.slices
    assert not await leave(store, "n0"), "it is gone already"


async def test_a_new_overlay_reaches_old_nodes_and_a_removed_one_leaves_them(store: Store) -> None:
    old = await join(store, who(0))
    await declare(store, replace(DCOS, overlays=(*DCOS.overlays, Overlay("web", IPv4Network("10.64.0.0/10"), 24))))
    assert [one.overlay for one in (await join(store, who(0))).slices] == ["dcos", "dcos6", "web"]
    await declare(store, DCOS)
    assert await join(store, who(0)) == old
    assert not [key for key in await state(store) if "web" in key]


async def test_what_nodes_hold_is_not_contradicted(store: Store) -> None:
    await join(store, who(0))
    with pytest.raises(Conflict, match="vtep_subnet"):
        await declare(store, replace(DCOS, vtep_subnet=IPv4Network("44.0.0.0/20")))
    assert await read_config(store) == DCOS


async def test_a_full_pool_gives_nothing_at_all(store: Store) -> None:
    await declare(
        store, replace(DCOS, overlays=(*DCOS.overlays, Overlay("tiny", IPv4Network("10.0.0.0/28"), 28, split="none")))
    )
    await join(store, who(0))
    before = await state(store)
    with pytest.raises(PoolEmpty, match="'tiny'"):
        await join(store, who(1))
    assert await state(store) == before


async def test_two_nodes_with_one_address_are_refused(store: Store) -> None:
    await join(store, who(0))
    with pytest.raises(Conflict, match=r"10\.0\.0\.1 of node 'twin' is that of node 'n0'"):
        await join(store, replace(who(0), name="twin"))
    assert set(await members(store)) == {"n0"}


async def test_fields_of_a_newer_version_are_kept(store: Store) -> None:
    await join(store, who(0))
    item = await store.get(f"{NODES}n0")
    assert item is not None
    await store.put(item.key, json.dumps({**json.loads(item.value), "weather": "fine"}).encode())
    await join(store, replace(who(0), ip=IPv4Address("10.0.9.9")))
    after = await store.get(item.key)
    assert after is not None
    assert json.loads(after.value)["weather"] == "fine"


async def test_a_broken_row_of_one_node_hides_only_that_node(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    await join(store, who(0))
    await store.put(f"{NODES}bad", b"{")
    await store.put(f"{NODES}liar", b'{"name":"n7"}')
    assert set(await members(store)) == {"n0"}
    assert caplog.text.count("a node's row is left out") == 2


async def test_claims_without_a_row_are_found_and_used_again(store: Store) -> None:
    member = await join(store, who(0))
    await store.delete(f"{NODES}n0")
    assert await join(store, who(0)) == member
    assert set(claims(member)) | {CONFIG, f"{NODES}n0"} == set(await state(store))


async def test_a_cluster_without_overlays_says_so() -> None:
    store = MemoryStore()
    await store.open()
    assert await read_config(store) is None
    with pytest.raises(NotFound, match="no overlays"):
        await join(store, who(0))


# --- at once ---------------------------------------------------------------------------------------------------------


def check_disjoint(found: list[Member]) -> None:
    """No two share a subnet, a tunnel address or a MAC, and all is as if they had come one by one."""
    macs = [m.vtep.mac for m in found if m.vtep]
    ips = [m.vtep.ip for m in found if m.vtep]
    blocks = sorted(one.subnet for m in found for one in m.slices if one.subnet)
    assert len(set(macs)) == len(set(ips)) == len(found)
    assert [str(block) for block in blocks] == [f"9.0.{number}.0/24" for number in range(len(found))]
    keys = [key for m in found for key in claims(m)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("count", range(2, 9))
async def test_nodes_that_join_at_once_share_nothing(store: Store, count: int) -> None:
    found = await asyncio.gather(*(join(store, who(number)) for number in range(count)))
    check_disjoint(list(found))
    assert await members(store) == {m.name: m for m in found}


async def test_254_nodes_join_eight_at_a_time() -> None:
    store = MemoryStore()
    await store.open()
    await declare(store, DCOS)
    numbers = iter(range(254))
    found: list[Member] = []

    async def allocator() -> None:
        for number in numbers:
            found.append(await join(store, who(number)))

    await asyncio.gather(*(allocator() for _ in range(8)))
    check_disjoint(found)


async def test_nodes_join_and_leave_at_once() -> None:
    store = MemoryStore()
    await store.open()
    await declare(store, DCOS)

    async def come_and_go(number: int) -> None:
        for _ in range(4):
            await join(store, who(number))
            held = await members(store)
            for one, two in combinations(held.values(), 2):
                assert not set(claims(one)) & set(claims(two))
            await leave(store, f"n{number}")

    await asyncio.gather(*map(come_and_go, range(6)))
    assert list(await state(store)) == [CONFIG]
