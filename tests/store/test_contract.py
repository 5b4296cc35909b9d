"""What every backend of the store keeps: each test is a sentence of the contract."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest

from tests.store.backends import BACKENDS, AnyStore, heard, keys, settle, told
from tests.store.hand_clock import HandClock
from towpath.store.contract import (
    Absent,
    AtRevision,
    Batch,
    Change,
    Compare,
    Delete,
    HasValue,
    Item,
    LeaseGone,
    Progress,
    Put,
    Reset,
    StoreUnavailable,
)
from towpath.store.watch import QUIET

# --- keys ------------------------------------------------------------------------------------------------------------


async def test_a_key_that_was_put_is_there_with_its_revisions(store: AnyStore) -> None:
    first = await store.put("a", b"1")
    second = await store.put("a", b"2")
    assert (first, second) == (1, 2)
    assert await store.get("a") == Item("a", b"2", revision=2, created=1)


async def test_a_key_that_was_deleted_and_put_again_is_a_new_one(store: AnyStore) -> None:
    await store.put("a", b"1")
    await store.delete("a")
    await store.put("a", b"3")
    assert await store.get("a") == Item("a", b"3", revision=3, created=3)


async def test_what_is_not_there_is_none(store: AnyStore) -> None:
    assert await store.get("a") is None


async def test_deleting_nothing_changes_nothing(store: AnyStore) -> None:
    await store.put("a", b"")
    assert await store.delete("b") == 1
    assert await store.delete("c/", prefix=True) == 1
    assert (await store.status()).revision == 1


async def test_a_prefix_is_deleted_in_one_revision(store: AnyStore) -> None:
    for key in ("a/1", "a/2", "a0", "b"):
        await store.put(key, b"")
    assert await store.delete("a/", prefix=True) == 5
    assert await keys(store) == ["a0", "b"]


async def test_the_empty_prefix_is_everything(store: AnyStore) -> None:
    await store.put("a", b"")
    await store.put("\U0010ffff", b"")
    await store.delete("", prefix=True)
    assert await keys(store) == []


async def test_keys_are_listed_in_the_order_of_their_characters(store: AnyStore) -> None:
    names = ["a", "a\0", "a/", "a/b", "aa", "b", "z", "ä", "퟿", "\ue000", "😀", "\U0010ffff", "\U0010ffff\U0010ffff"]
    for name in reversed(names):
        await store.put(name, name.encode())
    assert await keys(store) == sorted(names) == names


@pytest.mark.parametrize(
    ("prefix", "want"),
    [
        pytest.param("a", ["a", "a/1", "aa"], id="a prefix need not end with a slash"),
        pytest.param("a/", ["a/1"], id="a folder"),
        pytest.param("퟿", ["퟿x"], id="the last character before the surrogates"),
        pytest.param("\U0010ffff", ["\U0010ffff", "\U0010ffff1"], id="the last character there is"),
        pytest.param("c", [], id="nothing has it"),
    ],
)
async def test_a_list_holds_the_keys_with_the_prefix(store: AnyStore, prefix: str, want: list[str]) -> None:
    for key in ("a", "a/1", "aa", "b", "퟿x", "\ue000", "\U0010ffff", "\U0010ffff1"):
        await store.put(key, b"")
    assert await keys(store, prefix) == want


async def test_a_list_comes_in_pages(store: AnyStore) -> None:
    for key in ("p/a", "p/b", "p/c", "q"):
        await store.put(key, b"")
    first = await store.list("p/", limit=2)
    assert ([i.key for i in first.items], first.more, first.revision) == (["p/a", "p/b"], True, 4)
    rest = await store.list("p/", limit=2, after=first.items[-1].key)
    assert ([i.key for i in rest.items], rest.more) == (["p/c"], False)
    exact = await store.list("p/", limit=3)
    assert (len(exact.items), exact.more) == (3, False)


async def test_a_page_is_full_although_keys_in_it_were_deleted(store: AnyStore) -> None:
    await store.txn((), tuple(Put(f"k{n:03}", b"") for n in range(300)))
    await store.txn((), tuple(Delete(f"k{n:03}") for n in range(0, 100, 2)))
    page = await store.list("k", limit=60, after="k009")
    want = [n for n in range(10, 300) if n >= 100 or n % 2][:60]
    assert [i.key for i in page.items] == [f"k{n:03}" for n in want]
    assert page.more


# --- transactions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        pytest.param(Absent("none"), True, id="absent, and it is"),
        pytest.param(Absent("a"), False, id="absent, but it is there"),
        pytest.param(AtRevision("a", 2), True, id="at this revision"),
        pytest.param(AtRevision("a", 1), False, id="at another revision"),
        pytest.param(AtRevision("none", 0), False, id="no key has revision 0"),
        pytest.param(HasValue("a", b"2"), True, id="this value"),
        pytest.param(HasValue("a", b"1"), False, id="another value"),
        pytest.param(HasValue("none", b""), False, id="no key has no value"),
    ],
)
async def test_a_compare_picks_the_branch(store: AnyStore, compare: Compare, holds: bool) -> None:
    await store.put("a", b"1")
    await store.put("a", b"2")
    result = await store.txn((compare,), (Put("yes", b""),), (Put("no", b""),))
    assert (result.ok, result.revision) == (holds, 3)
    assert result.changed == ("yes" if holds else "no",)
    assert result.failed == (() if holds else (0,))
    assert await keys(store) == sorted(["a", *result.changed])


async def test_all_compares_that_fail_are_named(store: AnyStore) -> None:
    await store.put("a", b"")
    result = await store.txn((Absent("a"), Absent("b"), HasValue("c", b"")), (Put("x", b""),))
    assert (result.ok, result.failed, result.revision, result.changed) == (False, (0, 2), 1, ())
    assert await keys(store) == ["a"]


async def test_all_changes_of_a_transaction_carry_one_revision(store: AnyStore) -> None:
    await store.put("old", b"")
    result = await store.txn((), (Put("b", b""), Delete("old"), Put("a", b"")), durable=True)
    assert (result.revision, result.changed) == (2, ("a", "b", "old"))
    assert {item.revision for item in (await store.list("")).items} == {2}


async def test_a_transaction_without_changes_has_no_revision_of_its_own(store: AnyStore) -> None:
    await store.put("a", b"")
    assert (await store.txn((Absent("b"),))).revision == 1
    assert (await store.put("a", b"")) == 2, "the same value again is a change"


@pytest.mark.parametrize(
    ("then", "why"),
    [
        pytest.param((Put("a", b""), Put("a", b"")), "changed twice", id="put twice"),
        pytest.param((Put("a", b""), Delete("a")), "changed twice", id="put and deleted"),
        pytest.param((Put("a/b", b""), Delete("a", prefix=True)), "changed twice", id="put under a deleted prefix"),
        pytest.param((Delete("a", prefix=True), Delete("a", prefix=True)), "changed twice", id="a prefix twice"),
        pytest.param((Delete("a/b", prefix=True), Delete("a", prefix=True)), "changed twice", id="a prefix in another"),
        pytest.param((Put("", b""),), "empty", id="an empty key"),
        pytest.param((Put("\ud800", b""),), "surrogates not allowed", id="a key that is no text"),
        pytest.param((Put("a", "text"),), "must be bytes", id="a value that is no bytes"),  # type: ignore[arg-type]
    ],
)
async def test_a_transaction_that_makes_no_sense_is_refused(
    store: AnyStore, then: tuple[Change, ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        await store.txn((), then)
    with pytest.raises(ValueError, match=why):
        await store.txn((Absent("x"),), (), then)
    assert (await store.status()).revision == 0


# --- watches ---------------------------------------------------------------------------------------------------------


async def test_a_watch_tells_what_happens_under_its_prefix_from_now_on(store: AnyStore) -> None:
    await store.put("a/0", b"before")
    watch = store.watch("a/")
    await store.put("a/1", b"x")
    await store.put("b", b"")
    await store.txn((), (Put("a/2", b"y"), Put("c", b""), Delete("a/0")))
    assert [(s.revision, told(s)) for s in await heard(watch)] == [(2, ["+a/1=x"]), (4, ["-a/0", "+a/2=y"])]


async def test_a_deletion_tells_its_own_revision_and_when_the_key_was_created(store: AnyStore) -> None:
    watch = store.watch("")
    await store.put("a", b"x")
    await store.put("a", b"y")
    await store.delete("a")
    last = (await heard(watch))[-1]
    assert isinstance(last, Batch)
    assert last.events[0].deleted
    assert last.events[0].item == Item("a", b"", revision=3, created=1)


async def test_a_watch_begins_where_it_is_told_to(store: AnyStore) -> None:
    for n in range(1, 201):
        await store.put(f"k{n % 3}", str(n).encode())
    watch = store.watch("k1", 50)
    await store.put("k1", b"new")
    want = [n for n in range(50, 201) if n % 3 == 1]
    assert [s.revision for s in await heard(watch)] == [*want, 201]


async def test_a_watch_that_waits_is_woken(store: AnyStore) -> None:
    watch = store.watch("a")
    waiting = asyncio.ensure_future(anext(watch))
    await settle()
    assert not waiting.done()
    await store.put("a", b"1")
    assert told(await waiting) == ["+a=1"]


async def test_a_reader_that_gives_up_waiting_misses_nothing(store: AnyStore) -> None:
    watch = store.watch("a")
    for n in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(watch), 0.001)
        await store.put("a", str(n).encode())
        assert [told(s) for s in await heard(watch)] == [[f"+a={n}"]]


async def test_a_watch_from_before_the_history_hears_reset_and_goes_on(store: AnyStore) -> None:
    for n in range(10):
        await store.put("a", str(n).encode())
    await heard(store.watch("a"))  # a store that follows another knows what happened
    await store.compact(3)
    watch = store.watch("a", 7)
    assert await heard(watch) == [Reset(10)]
    await store.put("a", b"x")
    assert [told(s) for s in await heard(watch)] == [["+a=x"]]
    assert [s.revision for s in await heard(store.watch("a", 8))] == [8, 9, 10, 11]


async def test_compacting_to_nothing_keeps_items_and_revision(store: AnyStore) -> None:
    await store.put("a", b"")
    await store.compact(0)
    await store.compact(5)
    assert await heard(store.watch("a", 1)) == [Reset(1)]
    await store.close()
    await store.open()
    assert await heard(store.watch("a", 1)) == [Reset(1)]
    assert await store.put("b", b"") == 2
    assert await keys(store) == ["a", "b"]


@pytest.mark.parametrize("backend", sorted(BACKENDS))
async def test_a_slow_watch_hears_reset_and_blocks_nobody(backend: str, tmp_path: Path, clock: HandClock) -> None:
    store = BACKENDS[backend](tmp_path, clock, 20)
    await store.open()
    slow, quick, quiet = store.watch("a"), store.watch("a"), store.watch("b")
    for n in range(900):
        await store.put("a", str(n).encode())
        assert told(await anext(quick)) == [f"+a={n}"]
    assert await heard(slow) == [Reset(900)]
    assert await heard(quiet) == []
    await store.put("b", b"x")
    assert [told(s) for s in await heard(quiet)] == [["+b=x"]]
    assert len(store.events(1, 901, "")) < 700, "the history is trimmed"
    await store.close()


async def test_a_watch_from_the_future_hears_reset(store: AnyStore) -> None:
    """A power cut took the last revisions back: what the watcher saw then is not what happens now."""
    await store.put("a", b"")
    assert await heard(store.watch("a", 9)) == [Reset(1)]
    assert await heard(store.watch("a", 2)) == []


async def test_a_watch_under_whose_prefix_nothing_happens_hears_progress(store: AnyStore) -> None:
    waiting, lagging = store.watch("quiet/"), store.watch("quiet/", 1)
    for _ in range(QUIET + 5):
        await store.put("loud", b"")
    assert await heard(waiting) == [Progress(QUIET + 5)]
    assert await heard(lagging) == [Progress(QUIET + 5)]


async def test_a_watch_ends_with_the_store(store: AnyStore) -> None:
    waiting = asyncio.ensure_future(anext(store.watch("a"), None))
    await settle()
    await store.close()
    assert await waiting is None


async def test_a_watch_that_is_dropped_is_forgotten(store: AnyStore) -> None:
    watch = store.watch("a")
    assert ("watches", "1") in (await store.status()).detail
    del watch
    gc.collect()
    assert ("watches", "0") in (await store.status()).detail


# --- leases ----------------------------------------------------------------------------------------------------------


async def test_keys_go_with_their_lease_in_one_transaction(store: AnyStore, clock: HandClock) -> None:
    lease = await store.grant(6)
    await store.put("a", b"1", lease=lease)
    await store.put("b", b"2", lease=lease)
    await store.put("c", b"3")
    watch = store.watch("")
    clock.turn(5.9)
    assert await heard(watch) == []
    clock.turn(0.2)
    assert [told(s) for s in await heard(watch)] == [["-a", "-b"]]
    assert await keys(store) == ["c"]


async def test_a_lease_that_is_kept_alive_lives_on(store: AnyStore, clock: HandClock) -> None:
    lease = await store.grant(6)
    await store.put("a", b"", lease=lease)
    for _ in range(5):
        clock.turn(4)
        assert await store.keep_alive(lease) == 6
    assert await keys(store) == ["a"]
    clock.turn(6)
    assert await keys(store) == []


async def test_a_lease_without_keys_ends_without_a_revision(store: AnyStore, clock: HandClock) -> None:
    lease = await store.grant(1)
    clock.turn(1)
    assert (await store.status()).revision == 0
    with pytest.raises(LeaseGone):
        await store.keep_alive(lease)


async def test_a_revoked_lease_is_gone_at_once(store: AnyStore) -> None:
    lease = await store.grant(60)
    await store.put("a", b"", lease=lease)
    await store.revoke(lease)
    await store.revoke(lease)
    assert await keys(store) == []
    with pytest.raises(LeaseGone):
        await store.keep_alive(lease)


async def test_a_key_lives_as_long_as_the_lease_of_its_last_put(store: AnyStore, clock: HandClock) -> None:
    short, long = await store.grant(1), await store.grant(60)
    for key, after in (("freed", 0), ("moved", long), ("kept", short)):
        await store.put(key, b"", lease=short)
        await store.put(key, b"", lease=after)
    clock.turn(2)
    assert await keys(store) == ["freed", "moved"]


async def test_nothing_is_written_under_a_lease_that_is_gone(store: AnyStore) -> None:
    with pytest.raises(LeaseGone, match="'b' cannot be written: lease 7 does not exist"):
        await store.txn((), (Put("a", b""), Put("b", b"", lease=7)))
    assert (await store.txn((Absent("a"),), (), (Put("b", b"", lease=7),))).ok, "the branch that is not taken is free"
    assert await keys(store) == []


async def test_a_lease_outlives_a_restart_and_its_time_counts_afresh(store: AnyStore, clock: HandClock) -> None:
    lease = await store.grant(6)
    await store.put("a", b"", lease=lease)
    clock.turn(5)
    await store.close()
    clock.turn(100)
    await store.open()
    clock.turn(5)
    assert await keys(store) == ["a"]
    clock.turn(1)
    assert await keys(store) == []
    assert await store.grant(6) > lease, "no number is used twice"


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf")])
async def test_a_lease_needs_a_time_to_live(store: AnyStore, ttl: float) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        await store.grant(ttl)


# --- elections and allocations ---------------------------------------------------------------------------------------


async def test_the_first_leads_and_the_next_waits_until_it_resigns(store: AnyStore) -> None:
    first = await store.elect("dns", b"one")
    waiting = asyncio.ensure_future(store.elect("dns", b"two"))
    await settle()
    assert not waiting.done()
    assert not first.lost
    await first.resign()
    second = await waiting
    assert first.lost
    assert not second.lost
    item = await store.get("election/dns")
    assert item
    assert item.value == b"two"
    await second.resign()
    assert await keys(store) == []


async def test_a_leader_stays_as_long_as_it_is_there(store: AnyStore, clock: HandClock) -> None:
    leader = await store.elect("dns", b"one", ttl=6)
    for _ in range(20):
        clock.turn(2)
        await settle()
    assert not leader.lost
    leader.abandon()  # as if its process had died
    waiting = asyncio.ensure_future(store.elect("dns", b"two", ttl=6))
    clock.turn(4)
    await settle()
    assert not waiting.done()
    clock.turn(2)
    await settle()
    assert (await waiting).name == "dns"


async def test_a_leader_whose_key_is_taken_away_knows_it(store: AnyStore, clock: HandClock) -> None:
    leader = await store.elect("dns", b"one", ttl=6)
    await settle()
    await store.delete("election/dns")
    clock.turn(2)
    await settle()
    assert leader.lost


async def test_a_leader_is_lost_when_the_store_was_away_for_its_time(store: AnyStore, clock: HandClock) -> None:
    leader = await store.elect("dns", b"one", ttl=6)
    await store.close()
    clock.turn(6)
    assert leader.lost
    await store.open()


async def test_who_gives_up_waiting_to_lead_leaves_nothing_behind(store: AnyStore, clock: HandClock) -> None:
    await store.elect("dns", b"one")
    waiting = asyncio.ensure_future(store.elect("dns", b"two"))
    await settle()
    waiting.cancel()
    await settle()
    assert dict((await store.status()).detail)["leases"] == "1"


async def test_each_owner_gets_one_candidate_and_keeps_it(store: AnyStore) -> None:
    candidates = ("1", "2")
    assert await store.allocate("vtep/", candidates, b"x") == "1"
    assert await store.allocate("vtep/", candidates, b"y") == "2"
    assert await store.allocate("vtep/", candidates, b"x") == "1"
    assert await store.allocate("vtep/", candidates, b"z") is None
    await store.delete("vtep/1")
    assert await store.allocate("vtep/", candidates, b"z") == "1"
    assert await store.allocate("vtep/", candidates, b"y") == "2", "what is held comes before what is free"


async def test_allocations_at_once_never_meet(store: AnyStore) -> None:
    candidates = tuple(map(str, range(8)))
    got = await asyncio.gather(*(store.allocate("p/", candidates, bytes([n])) for n in range(10)))
    assert sorted(filter(None, got)) == sorted(candidates)
    assert got.count(None) == 2


# --- open and closed -------------------------------------------------------------------------------------------------


async def test_everything_is_there_after_a_restart(store: AnyStore) -> None:
    await store.txn((), tuple(Put(f"k/{n:04}", str(n).encode()) for n in range(600)))
    for n in range(0, 600, 7):
        await store.delete(f"k/{n:04}")
    before = (await store.list("")).items, (await store.status()).keys, (await store.status()).revision
    await store.close()
    await store.open()
    assert ((await store.list("")).items, (await store.status()).keys, (await store.status()).revision) == before
    assert len(before[0]) == before[1]
    assert [s.revision for s in await heard(store.watch("k/", before[2]))] == [before[2]]


async def test_a_closed_store_is_unavailable(store: AnyStore) -> None:
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.get("a")
    with pytest.raises(StoreUnavailable):
        await store.put("a", b"")
    with pytest.raises(StoreUnavailable):
        store.watch("a")
    await store.open()
    with pytest.raises(ValueError, match="open already"):
        await store.open()


async def test_status_counts(store: AnyStore) -> None:
    await store.put("a", b"")
    await store.put("b", b"")
    await store.delete("a")
    status = await store.status()
    assert (status.revision, status.keys) == (3, 1)
    assert status.backend in BACKENDS
