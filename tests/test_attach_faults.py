"""Calls that are cancelled, that meet each other, or that find what an earlier fault left: nothing is ever too many."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import Crash, FakeKernel
from tests.requests import NETNS, attacher, network, request
from tests.test_attach import OTHER, ready, rows, without_lo
from towpath import reconcile
from towpath.attach import Attacher
from towpath.errors import NotFound, PhaseFailed
from towpath.model import Foreign, Key, PortMap, Tuning
from towpath.plan import DropLink, DropRule, Plan, Publish, SetLink, Sysctl


class Threaded(FakeKernel):
    """As the true one: what was handed to its threads is done, whether or not anybody waits for it still.

    late: loop turns by which the first plan starts later than it was asked for; those after it overtake it.
    """

    late = 0

    async def apply(self, plan: Plan) -> None:
        late, self.late = self.late, 0
        await asyncio.shield(asyncio.ensure_future(self._apply_late(plan, late)))

    async def _apply_late(self, plan: Plan, late: int) -> None:
        for _ in range(late):
            await asyncio.sleep(0)
        await super().apply(plan)


async def threaded(**changes: Any) -> tuple[Attacher, Threaded, dict[str, set[str]]]:
    kernel = Threaded(netns=(NETNS, OTHER))
    made = await attacher(kernel)
    await made.networks.bring_up(await made.network(network(**changes)))
    return made, kernel, kernel.state


async def cancelled_after(turns: int, task: asyncio.Task[Any]) -> None:
    """Let the loop turn so many times, cancel, and hear the end."""
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_an_add_that_is_cancelled_anywhere_leaves_nothing(turns: int) -> None:
    made, kernel, before = await threaded()
    kernel.late = 20
    await cancelled_after(turns, task := asyncio.create_task(made.add(request())))
    if task.cancelled():
        assert await rows(made) == {}
        await asyncio.sleep(0.001)
        assert without_lo(kernel.state) == without_lo(before)
    record = made.records.get(request().key) or await made.add(request())
    assert await made.check(record.key) == ()


@pytest.mark.parametrize("turns", range(0, 40, 3))
@pytest.mark.parametrize("deferred", [False, True])
async def test_a_del_that_is_cancelled_anywhere_harms_no_add_after_it(turns: int, deferred: bool) -> None:
    made, kernel, before = await threaded(deferred_delete=deferred)
    row = made.networks.rows["shop"]
    record = await made.add(request(network=row))
    kernel.late = 20
    await cancelled_after(turns, asyncio.create_task(made.detach(record.key)))
    await made.detach(record.key)
    again = await made.add(request(network=row))
    await asyncio.sleep(0.001)
    assert await made.check(again.key) == ()
    await made.detach(record.key)
    await made.settle()
    assert without_lo(kernel.state) == without_lo(before)
    assert await rows(made) == {}


async def test_one_record_that_cannot_be_taken_down_does_not_keep_the_agent_from_starting() -> None:
    made, kernel, _ = await ready()
    await made.add(request())
    await made.add(request("c2", netns=OTHER, ports=()))
    kernel.drop_netns(NETNS)
    kernel.drop_netns(OTHER)
    kernel.fail_on = DropRule
    again = await attacher(kernel, made.store)
    assert len(again.attachments()) == 1
    assert (await attacher(kernel, made.store)).attachments() == []


def chained(parts: tuple[str, ...] = ("ports",)) -> Any:
    place = Foreign(NETNS, "br-shop", request().key.veth())
    return request(parts=parts, address=None, place=place, ports=(PortMap(8080, 80, "udp"),))


async def chain() -> tuple[Attacher, FakeKernel]:
    """A container with the wire that the first plug-in of a chain made."""
    made, kernel, _ = await ready()
    await made.add(request(parts=("wire", "address"), ports=()))
    return made, kernel


async def test_a_plugin_of_a_chain_that_fails_leaves_the_ones_before_it_as_they_were() -> None:
    made, kernel = await chain()
    state, held = kernel.state, await rows(made)
    kernel.fail_on = len(kernel.log) + 1
    with pytest.raises(PhaseFailed):
        await made.add(chained())
    assert kernel.state == state
    assert await rows(made) == held
    record = await made.add(chained())
    assert record.parts == ("wire", "address", "ports")
    assert await made.check(record.key) == ()


async def test_a_death_in_the_second_plugin_of_a_chain_takes_only_its_own_parts_back() -> None:
    for step in range(3):
        made, kernel = await chain()
        held = await rows(made)
        kernel.die_after = len(kernel.log) + step
        with contextlib.suppress(Crash):
            await made.add(chained(("ports", "firewall")))
        again = await attacher(kernel, made.store)
        record = await again.find(request().key)
        assert record is not None
        if record.parts == ("wire", "address"):
            assert await rows(again) == held
            record = await again.add(chained(("ports", "firewall")))
        assert await again.check(record.key) == ()


async def test_unknown_fields_survive_when_a_chain_grows_and_shrinks() -> None:
    made, _ = await chain()
    row = f"attachments/{request().key}"
    for change in (made.add(chained()), made.detach(request().key, ("ports",))):
        item = await made.store.get(row)
        assert item is not None
        await made.store.put(
            row, item.value[:-1].rstrip(b"}") + b',"tomorrow":42}' if b"tomorrow" not in item.value else item.value
        )
        await change
        item = await made.store.get(row)
        assert item is not None
        assert b"tomorrow" in item.value


async def test_what_a_partial_del_has_dropped_is_not_healed_back_while_it_is_under_way() -> None:
    made, kernel = await chain()
    record = await made.add(chained())
    task = asyncio.create_task(made.detach(record.key, ("ports",)))
    while any(isinstance(rule, Publish) for rule in kernel.rules):  # noqa: ASYNC110 (turn by turn)
        await asyncio.sleep(0)
    assert await reconcile.heal(made, "nftables") == 0
    await task
    assert not any(isinstance(rule, Publish) for rule in kernel.rules)


async def test_a_flush_while_a_chain_grows_is_healed_for_the_parts_that_stand() -> None:
    made, kernel = await chain()
    await made.add(request(parts=("firewall",), address=None, place=Foreign(NETNS, "br-shop"), ports=()))
    held = set(kernel.rules)
    task = asyncio.create_task(made.add(chained()))
    await asyncio.sleep(0)
    while made.records[request().key].phase != "claimed":  # noqa: ASYNC110 (turn by turn)
        await asyncio.sleep(0)
    kernel.rules.clear()
    await reconcile.heal(made, "nftables")
    assert held <= kernel.rules
    await task


async def test_what_a_failed_run_was_to_look_at_is_looked_at_by_the_next() -> None:
    runs: list[frozenset[str]] = []

    async def run(words: frozenset[str]) -> int:
        runs.append(words)
        if "addresses" in words and len(runs) == 2:
            raise OSError("netlink: no buffer space")
        return 0

    dirty = reconcile.Dirty()
    task = asyncio.create_task(reconcile.reconcile(dirty, run))
    for word in ("addresses", "links", "links"):
        await asyncio.sleep(0.01)
        dirty.mark(word)
        await asyncio.sleep(reconcile.SETTLE + 0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert runs[1:] == [{"addresses"}, {"addresses", "links"}, {"links"}]


async def test_tuning_is_never_put_back_into_a_namespace_that_took_the_path_over() -> None:
    made, kernel, _ = await ready()
    kernel.add_link("eth0", netns=NETNS)
    tuning = Tuning(sysctl=(("net/core/somaxconn", "500"),), mtu=1400)
    await made.add(request(parts=("tuning",), address=None, place=Foreign(NETNS), ports=(), tuning=tuning))
    kernel.drop_netns(NETNS)
    kernel.add_netns(NETNS)
    kernel.add_link("eth0", netns=NETNS)
    done = len(kernel.log)
    await made.detach(request().key, ("tuning",))
    assert [op for op in kernel.log[done:] if isinstance(op, SetLink | Sysctl)] == []
    assert await rows(made) == {}


async def test_a_gc_that_meets_adds_drops_no_network_under_them() -> None:
    for turns in range(30):
        made, kernel, _ = await ready()
        kernel.add_netns("/run/netns/0")
        await made.add(request("old", netns="/run/netns/0", ports=()))
        gc = asyncio.create_task(made.gc("cni", "shop", frozenset(), ""))
        for _ in range(turns):
            await asyncio.sleep(0)
        tuning = Tuning(sysctl=(("net/core/somaxconn", "500"),))
        wired = made.add(request("c1", parts=("wire", "address", "tuning"), ports=(), tuning=tuning))
        leased = made.add(request("c2", netns=OTHER, parts=("address",), ports=(), place=None))
        await asyncio.gather(gc, wired, leased)
        assert "shop" in made.networks.rows, turns
        held = await rows(made)
        for record in made.attachments():
            assert f"leases/shop/{record.leases[0].address.ip}" in held, turns
            assert await made.store.get("networks/shop") is not None
        addresses = [str(record.leases[0].address) for record in made.attachments()]
        assert len(set(addresses)) == len(addresses) == 2, turns
        assert await made.check(Key("cni", "shop", "c1", "eth0")) == (), turns


async def test_a_network_that_an_administrator_removed_is_not_made_anew_by_an_add_on_its_way() -> None:
    made, _, _ = await ready()
    row = await made.create_network(network("10.2.0.0/24", name="mine", source="cli"))
    await made.drop_network("mine")
    with pytest.raises(NotFound, match="mine"):
        await made.add(request(network=row, ports=()))
    assert await rows(made) == {}


async def test_a_bridge_that_two_networks_name_goes_with_the_second_of_them() -> None:
    made, kernel, _ = await ready()
    other = await made.network(network("fd01::/64", name="other", bridge="br-shop"))
    await made.networks.bring_up(other)
    await made.gc("cni", "shop", frozenset(), "")
    assert "br-shop" in kernel.host.links
    await made.gc("cni", "other", frozenset(), "")
    assert "br-shop" not in kernel.host.links


async def test_a_network_whose_bridge_cannot_go_is_still_there_to_be_dropped_again() -> None:
    made, kernel, _ = await ready()
    kernel.fail_on = DropLink
    with pytest.raises(PhaseFailed):
        await made.drop_network("shop")
    await made.drop_network("shop")
    assert (await made.store.list("")).items == ()


async def test_a_bridge_whose_maker_died_before_he_marked_it_goes_with_its_network() -> None:
    made, kernel, _ = await ready()
    kernel.host.links["br-shop"] = replace(kernel.host.links["br-shop"], alias="")
    await made.drop_network("shop")
    assert "br-shop" not in kernel.host.links


async def test_the_first_adds_of_a_network_all_wait_for_the_reservations_it_takes_over(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    for host in range(2, 60):
        (folder / f"10.1.0.{host}").write_text(f"old{host}\r\neth0")
    kernel = FakeKernel(netns=(NETNS, OTHER))
    made = await attacher(kernel)
    wanted = network(data_dir=str(tmp_path))

    async def add(container: str, netns: str) -> str:
        record = await made.add(request(container, netns=netns, network=await made.network(wanted), ports=()))
        return str(record.leases[0].address.ip)

    assert set(await asyncio.gather(add("c1", NETNS), add("c2", OTHER))) == {"10.1.0.60", "10.1.0.61"}


async def test_sixty_four_adds_dels_and_gcs_at_once_end_with_rows_that_fit_the_kernel() -> None:
    made, kernel, before = await ready()
    paths = [f"/run/netns/m{number}" for number in range(8)]
    for path in paths:
        kernel.add_netns(path)
    calls: list[Any] = []
    for turn in range(4):
        for number, path in enumerate(paths):
            calls.append(made.add(request(f"m{number}", netns=path, ports=())))
            calls.append(made.detach(Key("cni", "shop", f"m{number}", "eth0")))
        if turn % 2:
            calls.append(made.gc("cni", "shop", frozenset({("m1", "eth0")}), ""))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome).__name__ for outcome in outcomes} <= {"Attachment", "NoneType", "tuple", "Conflict"}
    for record in made.attachments():
        assert await made.check(record.key) == ()
    for number in range(8):
        await made.detach(Key("cni", "shop", f"m{number}", "eth0"))
    assert await rows(made) == {}
    left = {w: lines for w, lines in without_lo(kernel.state).items() if lines - without_lo(before).get(w, set())}
    assert left == {}


async def test_a_run_that_fails_in_a_way_nobody_foresaw_is_tried_again() -> None:
    runs = 0

    async def run(words: frozenset[str]) -> int:
        nonlocal runs
        runs += 1
        raise OSError("netlink: no buffer space")

    dirty = reconcile.Dirty()
    task = asyncio.create_task(reconcile.reconcile(dirty, run))
    await asyncio.sleep(0.01)
    dirty.mark("links")
    await asyncio.sleep(reconcile.SETTLE + 0.1)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert runs == 2
