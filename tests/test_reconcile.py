"""The kernel follows the tables: what somebody else took away comes back; where nothing differs nothing is written."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from tests.fakes import FakeKernel
from tests.requests import NETNS, attacher, network, request
from towpath import reconcile
from towpath.plan import Guard


async def test_a_flushed_firewall_comes_back_as_it_was() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    made = await attacher(kernel)
    await made.add(request(network=await made.network(network())))
    before = set(kernel.rules)
    kernel.rules.clear()
    assert await reconcile.heal(made, "auto") == len(before)
    assert kernel.rules == before


async def test_rules_of_the_node_itself_are_kept_too() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    made = await attacher(kernel)
    guard = Guard(64000, "overlay")
    made.standing = lambda: (guard,)
    assert await reconcile.heal(made, "auto") == 1
    assert kernel.rules == {guard}
    assert await reconcile.heal(made, "auto") == 0


async def test_a_run_that_finds_nothing_changes_nothing() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    made = await attacher(kernel)
    await made.add(request(network=await made.network(network())))
    log = len(kernel.log)
    assert await reconcile.heal(made, "auto") == 0
    assert len(kernel.log) == log


async def test_a_bridge_that_lost_its_address_gets_it_back() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    made = await attacher(kernel)
    await made.add(request(network=await made.network(network())))
    kernel.host.addresses.clear()
    assert await reconcile.heal(made, "auto") == 1
    assert len(kernel.host.addresses) == 1


async def test_after_a_restart_the_devices_in_use_are_watched_over_again() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    first = await attacher(kernel)
    await first.add(request(network=await first.network(network())))
    made = await attacher(kernel, first.store)
    await reconcile.adopt_devices(made)
    kernel.host.addresses.clear()
    assert await reconcile.heal(made, "auto") == 1


async def test_a_burst_of_changes_becomes_one_run() -> None:
    dirty, runs = reconcile.Dirty(), []

    async def run(words: frozenset[str]) -> int:
        runs.append(words)
        return 0

    task = asyncio.create_task(reconcile.reconcile(dirty, run))
    await asyncio.sleep(0.01)
    for _ in range(50):
        dirty.mark("links")
        await asyncio.sleep(0.001)
    await asyncio.sleep(reconcile.SETTLE + 0.1)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert runs[:2] == [reconcile.ALL, {"links"}]
    assert len(runs) <= 3


async def test_what_is_under_way_is_neither_hurried_nor_undone() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    made = await attacher(kernel)
    record = await made.add(request(network=await made.network(network())))
    made.records[record.key] = replace(record, phase="claimed")
    before = set(kernel.rules)
    assert await reconcile.heal(made, "auto") == 0
    assert kernel.rules == before
    kernel.rules.clear()
    assert await reconcile.heal(made, "auto") == 0
    assert kernel.rules == set()


async def test_a_change_of_links_brings_back_a_bridge_that_went() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    made = await attacher(kernel)
    await made.add(request(network=await made.network(network())))
    assert await reconcile.heal(made, "auto", frozenset({"links"})) == 0
    del kernel.host.links["br-shop"]
    assert await reconcile.heal(made, "auto", frozenset({"links"})) == 1
    assert "br-shop" in kernel.host.links


async def test_with_auto_the_rules_move_to_the_back_end_of_the_hosts_new_manager() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    made = await attacher(kernel)
    await made.add(request(network=await made.network(network())))
    held = set(kernel.firewalls["nftables"].rules)
    kernel.managed = True
    await reconcile.heal(made, "nftables")
    assert kernel.firewalls["nftables"].rules == held
    await reconcile.heal(made, "auto")
    assert kernel.firewalls["iptables"].rules == held
    assert kernel.firewalls["nftables"].rules == set()
    await made.detach(request().key)
    assert kernel.firewalls["iptables"].rules == set()


async def test_the_containers_of_a_bridge_that_was_made_anew_hang_on_it_again() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    made = await attacher(kernel)
    record = await made.add(request(network=await made.network(network())))
    kernel.host.links[record.veth] = replace(kernel.host.links[record.veth], master="")
    del kernel.host.links["br-shop"]
    assert await made.check(record.key) != ()
    await reconcile.heal(made, "auto", frozenset({"links"}))
    assert await made.check(record.key) == ()
    assert kernel.host.ports[record.veth] == "hairpin"
