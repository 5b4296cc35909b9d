"""Links that go: alone, many at the price of one, never a foreign one; and the change is heard."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import pytest

from tests.kernel.box import Box, box
from towpath.errors import PhaseFailed
from towpath.kernel import links, reap
from towpath.kernel.netlink import Netlink, u32
from towpath.plan import AddVeth, DropLink, EnsureBridge, Phase

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture
def host() -> Iterator[Box]:
    with box(1) as made:
        yield made


def veths(host: Box, count: int) -> tuple[str, ...]:
    names = tuple(f"tp{n}" for n in range(count))
    host.do(*(AddVeth(name, f"e{n}", host.paths[0], f"02:00:00:00:00:{n:02x}") for n, name in enumerate(names)))
    return names


def left(host: Box) -> set[str]:
    return {link.name for link in host.wait(lambda: host.kernel.look()).links}


def drop_at_once(host: Box, names: tuple[str, ...]) -> list[BaseException | None]:
    async def drop() -> list[BaseException | None]:
        plans = [host.kernel.apply((Phase("host", (DropLink(name),)),)) for name in names]
        return await asyncio.gather(*plans, return_exceptions=True)

    return host.wait(drop)


def test_links_that_go_at_the_same_time_all_go(host: Box) -> None:
    names = veths(host, 16)
    host.run("ip", "link", "add", "mine", "type", "bridge")
    begin = time.monotonic()
    assert drop_at_once(host, names) == [None] * 16
    assert time.monotonic() - begin < 16 * 0.016  # one by one it is at least that; in groups about a tenth
    assert left(host) == {"lo", "mine"}
    assert host.wait(lambda: host.kernel.look(host.paths[0])).links[1:] == ()


def test_one_that_cannot_go_fails_alone(host: Box) -> None:
    names = veths(host, 3)
    outcomes = drop_at_once(host, (*names[:2], "lo", "tp-missing", names[2], names[0]))
    assert [type(outcome) for outcome in outcomes] == [type(None)] * 2 + [PhaseFailed] + [type(None)] * 3
    assert left(host) == {"lo"}


def test_only_links_with_our_alias_share_a_group(host: Box) -> None:
    names = veths(host, 2)
    host.run("ip", "link", "add", "foreign", "type", "bridge")

    def sorted_links() -> tuple[set[str], list[str]]:
        with Netlink() as netlink:
            together, alone = reap.sort(netlink, (*names, "foreign", "missing"))
            return set(together), alone

    assert host.inside(sorted_links) == (set(names), ["foreign"])


def test_a_group_that_somebody_uses_is_not_taken(host: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    host.run("ip", "link", "add", "foreign", "type", "bridge")
    host.run("ip", "link", "set", "foreign", "group", "42")
    offered = iter([41, 41, 6])
    monkeypatch.setattr("secrets.randbelow", lambda _: next(offered))

    def pick() -> int:
        with Netlink() as netlink:
            assert u32(links.IFLA_GROUP, 42) in netlink.dump_raw(links.list_links())
            return reap.free_group(netlink)

    assert host.inside(pick) == 7


def test_a_namespace_that_died_took_its_links_along(host: Box) -> None:
    names = veths(host, 2)
    host.run("ip", "netns", "del", host.containers[0])
    deadline = time.monotonic() + 5  # the kernel takes a dead namespace apart in its own time
    while left(host) != {"lo"} and time.monotonic() < deadline:
        time.sleep(0.02)
    assert drop_at_once(host, names) == [None, None]


def test_changes_are_heard_and_a_burst_is_one(host: Box) -> None:
    async def listen() -> list[str]:
        heard: list[str] = []

        async def follow() -> None:
            async for word in host.kernel.changes():
                heard.append(word)

        task = asyncio.create_task(follow())
        await asyncio.sleep(0.05)
        assert heard == []
        for n in range(20):
            await host.kernel.apply((Phase("host", (EnsureBridge(f"br{n}", f"02:00:00:00:00:{n:02x}"),)),))
        await asyncio.to_thread(host.run, "nft", "add", "table", "inet", "tpt")
        await asyncio.sleep(0.35)
        task.cancel()
        return heard

    heard = host.wait(listen)
    assert set(heard) == {"links", "firewall"}
    assert len(heard) <= 8
