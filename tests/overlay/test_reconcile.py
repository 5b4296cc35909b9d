"""The tunnel follows the nodes table, on a kernel in memory."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface

import pytest

from tests.fakes import FakeKernel
from tests.overlay.cluster import grown, who
from tests.store.backends import settle
from towpath import schema
from towpath.errors import BadConfig, PhaseFailed, PoolEmpty
from towpath.model import Route
from towpath.overlay.cluster import declare, join, leave
from towpath.overlay.config import DCOS, Overlay
from towpath.overlay.reconcile import State, Tunnel
from towpath.overlay.records import CONFIG, NODES, Member, node_row
from towpath.plan import AddFdb, AddRoute, Bar, DropFdb, DropLink, Guard, KeepSource, Peer, Phase
from towpath.store.contract import Batch, Event, StoreUnavailable
from towpath.store.memory import MemoryStore

FAR = "70:b3:d5:80:00:02"
ALONE = {
    "link vtep1024 vxlan 70:b3:d5:80:00:01 up mtu 1450",
    "address 44.128.0.1/20 on vtep1024",
    "address fd01:a::1/64 on vtep1024",
    "rule 10042 from 9.0.0.0/8 table 42",
    "rule 10042 from fd01:b::/64 table 42",
}
TO_SECOND = {
    "neighbour 44.128.0.2 at 70:b3:d5:80:00:02 on vtep1024",
    "neighbour fd01:a::2 at 70:b3:d5:80:00:02 on vtep1024",
    "fdb 70:b3:d5:80:00:02 to 10.0.0.2 on vtep1024",
    "route 9.0.1.0/24 via 44.128.0.2 on vtep1024",
    "route fd01:b:0:0:1::/80 via fd01:a::2 on vtep1024",
    "route 10.0.0.2/32 via 44.128.0.2 table 42 on vtep1024",
    "route 2001:db8::2/128 via fd01:a::2 table 42 on vtep1024",
}


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    made = MemoryStore()
    await made.open()
    await declare(made, DCOS)
    yield made
    await made.close()


@pytest.fixture
def kernel() -> FakeKernel:
    made = FakeKernel()
    made.add_link("eth0", "")
    made.host.addresses = {("eth0", IPv4Interface("10.0.0.1/24")), ("eth0", IPv6Interface("2001:db8::1/64"))}
    return made


def tunnel_of(kernel: FakeKernel) -> set[str]:
    """What the kernel holds about the tunnel, as lines."""
    return {
        line for line in kernel.state["host"] if "eth0" not in line and "sysctl" not in line and "link lo" not in line
    }


async def heard(store: MemoryStore, tunnel: Tunnel, from_revision: int) -> None:
    """Give the tunnel what happened in the store since a revision."""
    for item in (await store.list(NODES)).items:
        if item.revision > from_revision:
            await tunnel.hear(Batch(item.revision, (Event(item),)))


async def test_the_first_node_has_a_tunnel_that_leads_nowhere(store: MemoryStore, kernel: FakeKernel) -> None:
    tunnel = Tunnel(store, kernel, who(0))
    assert await tunnel.heal() == 2
    assert tunnel_of(kernel) == ALONE
    assert await tunnel.heal() == 0


async def test_nodes_that_were_there_are_reached_at_once(store: MemoryStore, kernel: FakeKernel) -> None:
    first = Tunnel(store, kernel, who(0))
    await first.heal()
    await join(store, who(1))
    again = Tunnel(store, kernel, who(0))
    assert await again.heal() == len(TO_SECOND)
    assert tunnel_of(kernel) == ALONE | TO_SECOND
    assert {rule for rule in kernel.rules if isinstance(rule, Peer)} == {
        Peer(address, 64000, "overlay") for number in (0, 1) for address in who(number).addresses
    }


async def test_a_node_comes_changes_and_goes_without_a_look_at_the_kernel(
    store: MemoryStore, kernel: FakeKernel
) -> None:
    tunnel = Tunnel(store, kernel, who(0))
    await tunnel.heal()
    done = len(kernel.log)
    revision = (await store.status()).revision
    await join(store, who(1))
    await heard(store, tunnel, revision)
    assert tunnel_of(kernel) == ALONE | TO_SECOND
    assert len(kernel.log) - done == len(TO_SECOND) + 2, "its entries and its two addresses as peers"

    revision = (await store.status()).revision
    await join(store, replace(who(1), ip=IPv4Address("10.0.0.99")))
    await heard(store, tunnel, revision)
    assert AddFdb("vtep1024", FAR, IPv4Address("10.0.0.99")) in kernel.host.tunnel.entries.values()
    assert Peer(IPv4Address("10.0.0.2"), 64000, "overlay") not in kernel.rules

    row = await store.get(node_row("n0001"))
    assert row is not None
    await leave(store, "n0001")
    gone = replace(row, value=b"", revision=(await store.status()).revision)
    await tunnel.hear(Batch(gone.revision, (Event(gone, deleted=True),)))
    assert tunnel_of(kernel) == ALONE
    assert not [rule for rule in kernel.rules if isinstance(rule, Peer) and rule.address not in who(0).addresses]


async def test_the_rules_of_a_node(store: MemoryStore, kernel: FakeKernel) -> None:
    await Tunnel(store, kernel, who(0), bridges=lambda: ("br-shop",)).heal()
    bridges = {"m-dcos", "d-dcos", "m-dcos6", "d-dcos6"}
    assert {rule for rule in kernel.rules if not isinstance(rule, Peer)} == {
        Guard(64000, "overlay"),
        *(Bar(bridge, 64000, "overlay") for bridge in bridges | {"br-shop"}),
        *(KeepSource(link, "overlay") for link in bridges | {"vtep1024"}),
    }


async def test_what_is_foreign_goes_and_what_was_removed_comes_back(store: MemoryStore, kernel: FakeKernel) -> None:
    await join(store, who(0))
    await join(store, who(1))
    tunnel = Tunnel(store, kernel, who(0))
    await tunnel.heal()
    foreign = AddRoute("eth0", Route(IPv4Network("9.0.1.0/24"), IPv4Address("10.0.0.77")))
    await kernel.apply(
        (
            Phase(
                "host",
                (
                    DropFdb("vtep1024", FAR, IPv4Address("10.0.0.2")),
                    AddFdb("vtep1024", "02:00:00:00:00:99", IPv4Address("10.0.0.66")),
                    foreign,
                ),
            ),
        )
    )
    assert await tunnel.heal() == 3
    assert tunnel_of(kernel) == ALONE | TO_SECOND


async def test_a_device_that_was_deleted_comes_back_with_everything(store: MemoryStore, kernel: FakeKernel) -> None:
    await join(store, who(0))
    await join(store, who(1))
    tunnel = Tunnel(store, kernel, who(0))
    await tunnel.heal()
    await kernel.apply((Phase("host", (DropLink("vtep1024"),)),))
    await tunnel.heal()
    assert tunnel_of(kernel) == ALONE | TO_SECOND


async def test_a_restart_writes_nothing(store: MemoryStore, kernel: FakeKernel) -> None:
    await join(store, who(0))
    await join(store, who(1))
    await Tunnel(store, kernel, who(0)).heal()
    revision = (await store.status()).revision
    assert await Tunnel(store, kernel, who(0)).heal() == 0
    assert (await store.status()).revision == revision


async def test_what_this_node_is_is_told_when_it_changes(store: MemoryStore, kernel: FakeKernel) -> None:
    told: list[tuple[str, ...]] = []

    async def follow(state: State | None) -> None:
        told.append(tuple(one.overlay for one in state.own.slices) if state else ())

    tunnel = Tunnel(store, kernel, who(0), follow=follow)
    await tunnel.heal()
    await tunnel.heal()
    await declare(store, replace(DCOS, overlays=(*DCOS.overlays, Overlay("web", IPv4Network("10.64.0.0/10"), 24))))
    tunnel.touch()
    await tunnel.heal()
    assert told == [("dcos", "dcos6"), ("dcos", "dcos6", "web")]
    assert "rule 10042 from 10.64.0.0/10 table 42" in tunnel_of(kernel)


async def test_another_mtu_of_the_underlay_is_followed(store: MemoryStore, kernel: FakeKernel) -> None:
    tunnel = Tunnel(store, kernel, who(0))
    await tunnel.heal()
    kernel.host.links["eth0"] = replace(kernel.host.links["eth0"], mtu=9000)
    await tunnel.heal()
    assert kernel.host.links["vtep1024"].mtu == 8950


async def test_a_node_that_was_removed_takes_its_tunnel_down_and_does_not_come_back(
    store: MemoryStore, kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    await join(store, who(1))
    tunnel = Tunnel(store, kernel, who(0))
    await tunnel.heal()
    row = await store.get(node_row("n0000"))
    assert row is not None
    await leave(store, "n0000")
    gone = replace(row, value=b"", revision=(await store.status()).revision)
    await tunnel.hear(Batch(gone.revision, (Event(gone, deleted=True),)))
    assert tunnel_of(kernel) == set()
    assert kernel.rules == set()
    assert "was removed from the cluster" in caplog.text
    tunnel.touch()
    assert await tunnel.heal() == 0
    assert await store.get(node_row("n0000")) is None


async def test_overlays_that_are_given_up_take_the_tunnel_along(store: MemoryStore, kernel: FakeKernel) -> None:
    tunnel = Tunnel(store, kernel, who(0))
    await tunnel.heal()
    await store.delete(CONFIG)
    tunnel.touch()
    await tunnel.heal()
    assert tunnel_of(kernel) == set()


# --- what goes wrong -------------------------------------------------------------------------------------------------


async def test_a_pool_that_the_host_routes_is_refused_before_anything_is_written(
    store: MemoryStore, kernel: FakeKernel
) -> None:
    kernel.host.routes.add(("eth0", Route(IPv4Network("9.7.0.0/16"), IPv4Address("10.0.0.254"))))
    tunnel = Tunnel(store, kernel, who(0))
    with pytest.raises(BadConfig, match=r"pool of overlay 'dcos' 9\.0\.0\.0/8 overlaps 9\.7\.0\.0/16"):
        await tunnel.heal()
    assert tunnel_of(kernel) == {"route 9.7.0.0/16 via 10.0.0.254 on eth0"} - {
        "route 9.7.0.0/16 via 10.0.0.254 on eth0"
    }
    assert await store.get(node_row("n0000")) is None


async def test_an_underlay_that_is_too_small_is_refused_before_anything_is_written(
    store: MemoryStore, kernel: FakeKernel
) -> None:
    kernel.host.links["eth0"] = replace(kernel.host.links["eth0"], mtu=1300)
    with pytest.raises(BadConfig, match="they need 1280"):
        await Tunnel(store, kernel, who(0)).heal()
    assert await store.get(node_row("n0000")) is None


async def test_a_full_pool_leaves_the_kernel_alone(store: MemoryStore, kernel: FakeKernel) -> None:
    await declare(store, replace(DCOS, overlays=(Overlay("one", IPv4Network("9.0.0.0/24"), 24),)))
    await join(store, who(1))
    with pytest.raises(PoolEmpty, match="'one' is used up"):
        await Tunnel(store, kernel, who(0)).heal()
    assert tunnel_of(kernel) == set()


class Away(MemoryStore):
    """A store whose engine can be away."""

    away = False

    async def get(self, key: str):  # type: ignore[no-untyped-def]
        if self.away:
            raise StoreUnavailable("the engine is away")
        return await super().get(key)


async def test_while_the_store_is_away_what_was_known_last_is_kept_true(kernel: FakeKernel) -> None:
    store = Away()
    await store.open()
    await declare(store, DCOS)
    await join(store, who(0))
    await join(store, who(1))
    tunnel = Tunnel(store, kernel, who(0))
    await tunnel.heal()
    store.away = True
    tunnel.touch()
    await kernel.apply((Phase("host", (DropFdb("vtep1024", FAR, IPv4Address("10.0.0.2")),)),))
    with pytest.raises(StoreUnavailable):
        await tunnel.heal()
    assert tunnel_of(kernel) == ALONE | TO_SECOND


async def test_a_change_that_the_kernel_refused_is_done_by_the_next_full_run(
    store: MemoryStore, kernel: FakeKernel
) -> None:
    tunnel = Tunnel(store, kernel, who(0))
    await tunnel.heal()
    revision = (await store.status()).revision
    await join(store, who(1))
    kernel.fail_on, kernel.fail_errno = AddRoute, errno.ENOBUFS
    with pytest.raises(PhaseFailed):
        await heard(store, tunnel, revision)
    await tunnel.heal()
    assert tunnel_of(kernel) == ALONE | TO_SECOND


async def test_a_broken_row_takes_nobody_elses_entries(store: MemoryStore, kernel: FakeKernel) -> None:
    await join(store, who(0))
    await join(store, who(1))
    tunnel = Tunnel(store, kernel, who(0))
    await tunnel.heal()
    revision = (await store.status()).revision
    await store.put(f"{NODES}n0002", b"[]")
    await heard(store, tunnel, revision)
    assert tunnel_of(kernel) == ALONE | TO_SECOND


# --- running ---------------------------------------------------------------------------------------------------------


async def until(true: object, seconds: float = 2.0) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


async def test_a_running_tunnel_follows_store_and_kernel(store: MemoryStore, kernel: FakeKernel) -> None:
    running = asyncio.create_task(Tunnel(store, kernel, who(0)).run())
    try:
        await until(lambda: tunnel_of(kernel) == ALONE)
        await join(store, who(1))
        await until(lambda: tunnel_of(kernel) == ALONE | TO_SECOND)
        await settle()
        await kernel.apply((Phase("host", (DropFdb("vtep1024", FAR, IPv4Address("10.0.0.2")),)),))
        kernel.change("routes")
        await until(lambda: tunnel_of(kernel) == ALONE | TO_SECOND)
        await leave(store, "n0001")
        await until(lambda: tunnel_of(kernel) == ALONE)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_one_change_among_1000_nodes_is_decided_in_5_ms(store: MemoryStore, kernel: FakeKernel) -> None:
    members = grown(1000)
    for member in members:
        await store.put(node_row(member.name), schema.rewrite(None, member))
    own: Member = members[0]
    tunnel = Tunnel(store, kernel, own)
    await tunnel.heal()
    item = await store.get(node_row("n0500"))
    assert item is not None
    best = 1.0
    for turn in range(4):
        event = Event(replace(item, revision=item.revision + 1000 + turn), deleted=turn % 2 == 0)
        start = time.perf_counter()
        await tunnel.hear(Batch(event.item.revision, (event,)))
        best = min(best, time.perf_counter() - start)
    assert best <= 0.005
