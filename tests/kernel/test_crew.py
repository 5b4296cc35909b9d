"""Threads answer, carry errors back, are replaced when they are lost; what queues up is done as a group."""

from __future__ import annotations

import asyncio
import errno
import threading
from ipaddress import ip_address

import pytest

from tests.fakes import FakeFirewall
from towpath.errors import PhaseFailed
from towpath.kernel.apply import LinuxKernel
from towpath.kernel.crew import Closed, Crew, Grouped
from towpath.kernel.netlink import Netlink
from towpath.kernel.netns import Lost
from towpath.model import PortMap
from towpath.plan import AddRule, Phase, Publish


async def test_a_crew_returns_results_and_errors() -> None:
    crew = Crew(2)
    assert await crew.run(lambda netlink: type(netlink)) is Netlink
    with pytest.raises(ZeroDivisionError):
        await crew.run(lambda _: 1 // 0)
    crew.close()
    with pytest.raises(Closed):
        await crew.run(lambda _: 1)


async def test_a_thread_that_is_lost_is_replaced() -> None:
    def lose(_: Netlink) -> int:
        raise Lost("gone astray")

    crew = Crew(1)
    first = await crew.run(lambda _: threading.current_thread())
    with pytest.raises(RuntimeError, match="astray"):
        await crew.run(lose)
    await asyncio.to_thread(first.join)
    assert await crew.run(lambda _: threading.current_thread()) is not first
    crew.close()


async def test_what_queues_up_is_done_together_and_fails_apart() -> None:
    gate, groups = threading.Event(), []

    def work(requests: list[int]) -> list[BaseException | None]:
        gate.wait(5)
        groups.append(requests)
        return [ValueError(r) if r == 3 else None for r in requests]

    line = Grouped("test", work)
    waiting = [asyncio.create_task(line.submit(n)) for n in range(6)]
    await asyncio.sleep(0.05)
    gate.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None)] * 3 + [ValueError] + [type(None)] * 2
    assert [request for group in groups for request in group] == list(range(6))
    assert len(groups) <= 2
    line.close()


class SlowFirewall(FakeFirewall):
    quick = False

    def __init__(self) -> None:
        super().__init__("nftables")
        self.gate = threading.Event()

    def commit(self, changes: tuple[object, ...]) -> int:
        self.gate.wait(5)
        return super().commit(changes)


def publish(port: int, container: str) -> Phase:
    rule = Publish(PortMap(port, 80), ip_address(container), "br0", container)
    return Phase("firewall", (AddRule(rule),), firewall="nftables")


async def test_rules_of_many_plans_are_one_transaction() -> None:
    wall = SlowFirewall()
    kernel = LinuxKernel(firewalls={"nftables": wall})
    tasks = [asyncio.create_task(kernel.apply((publish(8000 + n, f"10.0.0.{n + 2}"),))) for n in range(10)]
    await asyncio.sleep(0.05)
    wall.gate.set()
    await asyncio.gather(*tasks)
    assert len(wall.rules) == 10
    assert wall.commits <= 2
    await kernel.close()


async def test_a_bad_request_fails_alone() -> None:
    wall = SlowFirewall()
    kernel = LinuxKernel(firewalls={"nftables": wall})
    plans = [publish(8000, "10.0.0.2"), publish(8001, "10.0.0.3"), publish(8000, "10.0.0.4"), publish(8002, "10.0.0.5")]
    tasks = [asyncio.create_task(kernel.apply((phase,))) for phase in plans]
    await asyncio.sleep(0.05)
    wall.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert outcomes[:2] == [None, None]
    assert outcomes[3] is None
    assert isinstance(outcomes[2], PhaseFailed)
    assert outcomes[2].errno == errno.EEXIST
    assert len(wall.rules) == 3
    await kernel.close()
