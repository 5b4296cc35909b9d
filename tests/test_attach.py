"""The way in and the way out, on a kernel in memory that can be told to fail or to die at any step."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from ipaddress import ip_address, ip_interface
from typing import Any

import pytest

from tests.fakes import Crash, FakeKernel
from tests.requests import ALL, NETNS, attacher, network, request, take
from towpath.attach import Attacher
from towpath.errors import BadConfig, Conflict, PhaseFailed, PoolEmpty, TowpathError, Unavailable
from towpath.model import Bandwidth, Foreign, Given, Key, Lease, PortMap

OTHER = "/run/netns/b"
BASE_PREFIXES = ("networks/", "cursors/")


async def rows(made: Attacher) -> dict[str, bytes]:
    """Every row but those that belong to the network itself."""
    listing = await made.store.list("")
    return {i.key: i.value for i in listing.items if not i.key.startswith(BASE_PREFIXES)}


async def ready() -> tuple[Attacher, FakeKernel, dict[str, set[str]]]:
    """An attacher whose network's bridge is up, and the state to which everything must come back."""
    kernel = FakeKernel(netns=(NETNS, OTHER))
    made = await attacher(kernel)
    await made.network(network())
    await made.networks.bring_up(network())
    await made.kernel.apply(())
    before = {where: set(lines) for where, lines in kernel.state.items()}
    return made, kernel, before


def without_lo(state: dict[str, set[str]]) -> dict[str, set[str]]:
    """A container's loopback stays up, and sysctls written for a bridge stay: neither is a leak."""
    kept = {w: {x for x in lines if not x.startswith(("link lo", "sysctl"))} for w, lines in state.items()}
    return {where: lines for where, lines in kept.items() if lines}


async def test_an_add_gives_address_wire_and_ports_and_marks_the_record() -> None:
    made, kernel, _ = await ready()
    record = await made.add(request())
    assert record.phase == "attached"
    assert [str(lease.address) for lease in record.leases] == ["10.1.0.2/24"]
    assert record.veth in kernel.host.links
    assert kernel.netns[NETNS].links["eth0"].mac == record.mac
    assert len(kernel.rules) == 3  # masquerade, accept, publish
    assert await made.check(record.key) == ()


async def test_a_del_takes_everything_away_and_a_second_one_is_success() -> None:
    made, kernel, before = await ready()
    await made.add(request())
    for _ in range(2):
        await made.detach(request().key)
        assert without_lo(kernel.state) == without_lo(before)
        assert await rows(made) == {}


async def test_a_del_of_what_was_never_added_is_success() -> None:
    made, _, _ = await ready()
    await made.detach(Key("cni", "shop", "never", "eth0"))


async def steps_of_an_add() -> int:
    made, kernel, _ = await ready()
    start = len(kernel.log)
    await made.add(request())
    return len(kernel.log) - start


async def test_a_kernel_that_refuses_any_step_of_an_add_leaves_nothing() -> None:
    count = await steps_of_an_add()
    assert count >= 8
    for step in range(1, count + 1):
        made, kernel, before = await ready()
        kernel.fail_on = len(kernel.log) + step
        with pytest.raises(PhaseFailed):
            await made.add(request())
        assert without_lo(kernel.state) == without_lo(before), f"step {step}"
        assert await rows(made) == {}, f"step {step}"
        record = await made.add(request())
        assert str(record.leases[0].address.ip) in ("10.1.0.2", "10.1.0.3")


async def test_a_death_between_any_two_steps_of_an_add_is_cleaned_at_the_next_start() -> None:
    count = await steps_of_an_add()
    for step in range(count + 1):
        made, kernel, before = await ready()
        kernel.die_after = len(kernel.log) + step
        with contextlib.suppress(Crash):
            await made.add(request())
        kernel.die_after = None
        again = await attacher(kernel, made.store)
        if step == count:
            assert [r.phase for r in again.attachments()] == ["attached"]
            await again.detach(request().key)
        assert without_lo(kernel.state) == without_lo(before), f"step {step}"
        assert await rows(again) == {}, f"step {step}"


async def test_a_death_between_any_two_steps_of_a_del_is_finished_at_the_next_start() -> None:
    for step in range(12):
        made, kernel, before = await ready()
        await made.add(request())
        kernel.die_after = len(kernel.log) + step
        with contextlib.suppress(Crash):
            await made.detach(request().key)
        kernel.die_after = None
        again = await attacher(kernel, made.store)
        await again.detach(request().key)
        assert without_lo(kernel.state) == without_lo(before), f"step {step}"
        assert await rows(again) == {}, f"step {step}"


async def test_a_start_with_living_attachments_changes_nothing() -> None:
    made, kernel, _ = await ready()
    await made.add(request())
    log, state = len(kernel.log), kernel.state
    again = await attacher(kernel, made.store)
    assert len(kernel.log) == log
    assert kernel.state == state
    assert [r.phase for r in again.attachments()] == ["attached"]


async def test_a_start_reclaims_what_died_and_what_is_of_an_earlier_boot() -> None:
    made, kernel, before = await ready()
    await made.add(request())
    await made.add(request("c2", netns=OTHER, ports=()))
    kernel.drop_netns(NETNS)
    again = await attacher(kernel, made.store)
    assert [r.key.container for r in again.attachments()] == ["c2"]
    later = await attacher(kernel, made.store, boot="boot-2")
    assert later.attachments() == []
    assert {k: v for k, v in without_lo(kernel.state).items() if k != OTHER} == without_lo(before)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        pytest.param({"ports": (PortMap(8080, 81),)}, "8080/tcp", id="the same port"),
        pytest.param(
            {"ports": (PortMap(8080, 81, host_ip=ip_address("127.0.0.1")),)}, "8080/tcp", id="every address is all"
        ),
        pytest.param({"ports": (), "address": take("10.1.0.2")}, "10.1.0.2", id="the same address"),
    ],
)
async def test_a_conflict_names_what_is_taken_and_its_owner_and_changes_nothing(other: Any, words: str) -> None:
    made, kernel, _ = await ready()
    await made.add(request())
    state, held = kernel.state, await rows(made)
    with pytest.raises(TowpathError, match="cni/shop/c1/eth0") as failed:
        await made.add(request("c2", netns=OTHER, **other))
    assert words in str(failed.value)
    assert kernel.state == state
    assert await rows(made) == held


async def test_one_host_port_on_two_addresses_is_no_conflict() -> None:
    made, _, _ = await ready()
    await made.add(request(ports=(PortMap(80, 80, host_ip=ip_address("192.0.2.1")),)))
    await made.add(request("c2", netns=OTHER, ports=(PortMap(80, 80, host_ip=ip_address("192.0.2.2")),)))


async def test_a_second_add_of_a_living_container_is_refused_and_leaves_the_first_alone() -> None:
    made, kernel, _ = await ready()
    await made.add(request())
    state = kernel.state
    with pytest.raises(Conflict, match="attached already"):
        await made.add(request())
    assert kernel.state == state


async def test_an_add_again_after_the_container_died_without_a_del_succeeds() -> None:
    made, kernel, _ = await ready()
    first = await made.add(request())
    kernel.drop_netns(NETNS)
    kernel.add_netns(NETNS)
    again = await made.add(request())
    assert again.netns_id != first.netns_id
    assert await made.check(again.key) == ()


async def test_an_interface_of_that_name_in_the_container_is_an_error_and_stays() -> None:
    made, kernel, before = await ready()
    kernel.add_link("eth0", netns=NETNS)
    with pytest.raises(PhaseFailed, match="eth0"):
        await made.add(request())
    assert "eth0" in kernel.netns[NETNS].links
    assert without_lo(kernel.state)["host"] == without_lo(before)["host"]
    assert await rows(made) == {}


async def test_addresses_go_round_and_are_not_used_again_at_once() -> None:
    made, kernel, _ = await ready()
    given = []
    for number in range(3):
        kernel.add_netns(f"/run/netns/{number}")
        record = await made.add(request(f"c{number}", netns=f"/run/netns/{number}", ports=()))
        given.append(str(record.leases[0].address.ip))
    await made.detach(Key("cni", "shop", "c0", "eth0"))
    again = await attacher(kernel, made.store)  # also over a restart
    record = await again.add(request("c9", ports=()))
    assert given == ["10.1.0.2", "10.1.0.3", "10.1.0.4"]
    assert str(record.leases[0].address.ip) == "10.1.0.5"


async def test_an_empty_pool_is_said_and_nothing_is_kept() -> None:
    kernel = FakeKernel(netns=(NETNS, OTHER))
    made = await attacher(kernel)
    small = await made.network(network("10.9.0.0/30"))
    await made.add(request(network=small, ports=()))
    with pytest.raises(PoolEmpty, match=r"10\.9\.0\."):
        await made.add(request("c2", netns=OTHER, network=small, ports=()))
    with pytest.raises(Unavailable, match="no IP addresses available"):
        await made.ready(small)
    assert len(made.attachments()) == 1


async def test_a_failure_in_the_second_pool_gives_back_the_first() -> None:  # H4
    kernel = FakeKernel(netns=(NETNS, OTHER))
    made = await attacher(kernel)
    both = await made.network(network("10.9.0.0/24", "fd00::/126"))
    taken = [await made.add(request(f"c{i}", network=both, ports=(), parts=("address",), place=None)) for i in range(2)]
    assert [len(record.leases) for record in taken] == [2, 2]
    with pytest.raises(PoolEmpty):
        await made.add(request("c9", network=both, ports=(), parts=("address",), place=None))
    await made.detach(taken[0].key)
    record = await made.add(request("c9", network=both, ports=(), parts=("address",), place=None))
    assert str(record.leases[0].address.ip) == "10.9.0.4"


async def test_a_chain_adds_parts_to_one_record_and_each_takes_its_own_away() -> None:
    made, kernel, _ = await ready()
    kernel.add_link("cni0", kind="bridge")
    lease = Given((Lease(ip_interface("10.88.0.7/16")),))
    place = Foreign(NETNS, home="cni0", veth="veth0")
    await made.add(request(parts=("ports",), address=lease, place=place))
    await made.add(request(parts=("firewall",), address=lease, place=place, ports=(), isolation="same-network"))
    record = await made.find(request().key)
    assert record is not None
    assert record.parts == ("ports", "firewall")
    assert len(kernel.rules) == 3  # publish, accept, fence
    await made.detach(request().key, ("firewall",))
    assert len(kernel.rules) == 1
    await made.detach(request().key, ("ports",))
    assert kernel.rules == set()
    assert await rows(made) == {}


async def test_gc_keeps_what_is_named_and_what_lives_for_another_caller() -> None:
    made, kernel, _ = await ready()
    for number, caller in enumerate(["/usr/bin/podman", "/usr/bin/podman", "/usr/bin/containerd"]):
        kernel.add_netns(f"/run/netns/{number}")
        await made.add(request(f"c{number}", netns=f"/run/netns/{number}", ports=(), caller=caller))
    await made.gc("cni", "shop", frozenset({("c0", "eth0")}), "/usr/bin/podman")
    assert [r.key.container for r in made.attachments()] == ["c0", "c2"]
    await made.gc("run", "shop", frozenset(), "")
    await made.gc("cni", "other", frozenset(), "")
    assert len(made.attachments()) == 2
    kernel.drop_netns("/run/netns/2")
    await made.gc("cni", "shop", frozenset({("c0", "eth0")}), "/usr/bin/podman")
    assert [r.key.container for r in made.attachments()] == ["c0"]


async def test_the_last_gc_of_a_network_that_only_cni_named_takes_its_bridge_too() -> None:
    made, kernel, _ = await ready()
    await made.add(request())
    await made.gc("cni", "shop", frozenset(), "")
    assert set(kernel.host.links) == {"lo"}
    assert (await made.store.list("")).items == ()


async def test_a_configuration_that_differs_from_the_row_names_both_values() -> None:
    made, _, _ = await ready()
    await made.add(request())
    with pytest.raises(BadConfig, match=r"mtu 0.*1400"):
        await made.network(network(mtu=1400))
    assert (await made.network(network(mtu=1400), frozenset({"hairpin"}))).mtu == 0
    await made.detach(request().key)
    assert (await made.network(network(mtu=1400))).mtu == 1400


async def test_a_deferred_delete_answers_first_and_an_add_after_it_still_works() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    made = await attacher(kernel)
    lazy = await made.network(network(deferred_delete=True))
    for _ in range(5):
        record = await made.add(request(network=lazy))
        await made.detach(record.key)
    await made.settle()
    assert await rows(made) == {}
    assert kernel.rules == set()
    assert record.veth not in kernel.host.links


async def test_a_bridge_that_somebody_took_away_is_made_again_by_the_next_add() -> None:
    made, kernel, _ = await ready()
    del kernel.host.links["br-shop"]
    record = await made.add(request())
    assert kernel.host.links[record.veth].master == "br-shop"


async def test_a_network_name_held_by_another_kind_of_link_is_refused() -> None:
    kernel = FakeKernel(netns=(NETNS,))
    kernel.add_link("br-shop", kind="veth")
    made = await attacher(kernel)
    row = await made.network(network())
    with pytest.raises(TowpathError, match="already exists but is not a bridge"):
        await made.add(request(network=row))
    assert made.attachments() == []


async def test_sixteen_adds_at_once_get_sixteen_addresses() -> None:
    made, kernel, _ = await ready()
    paths = [f"/run/netns/p{i}" for i in range(16)]
    for path in paths:
        kernel.add_netns(path)
    records = await asyncio.gather(*(made.add(request(f"p{i}", netns=p, ports=())) for i, p in enumerate(paths)))
    assert len({lease.address for r in records for lease in r.leases}) == 16


async def test_bandwidth_makes_a_shape_that_goes_with_the_container() -> None:
    made, kernel, before = await ready()
    shaped = request(parts=(*ALL, "bandwidth"), bandwidth=Bandwidth(10**6, 10**5, 10**6, 10**5))
    record = await made.add(shaped)
    assert await kernel.shapes(record.veth)
    await made.detach(record.key)
    assert without_lo(kernel.state) == without_lo(before)


async def test_a_network_in_use_cannot_be_removed_and_says_by_whom() -> None:
    made, _, _ = await ready()
    await made.add(request())
    with pytest.raises(Conflict, match="cni/shop/c1/eth0"):
        await made.drop_network("shop")
    await made.detach(request().key)
    await made.drop_network("shop")
    assert made.list_networks() == []


async def test_unknown_fields_of_a_record_survive_its_rewrite() -> None:
    made, _, _ = await ready()
    record = await made.add(request())
    row = f"attachments/{record.key}"
    item = await made.store.get(row)
    assert item is not None
    await made.store.put(row, item.value[:-1] + b',"tomorrow":42}')
    await made._save(replace(record, name="n"))
    item = await made.store.get(row)
    assert item is not None
    assert b'"tomorrow":42' in item.value.replace(b" ", b"")
