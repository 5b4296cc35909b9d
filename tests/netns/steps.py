"""The other side of test_steps.py: lives in the host's namespace and forks one short-lived agent for each order.

An order is a line of JSON (see Order); the answer is the line `{"status": ..., "done": ...}` with the agent's exit
status and how many steps it took. An agent that is to die does so as by kill -9: no handler runs, nothing is closed.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.requests import network
from towpath.attach import Attacher, Setting
from towpath.errors import PhaseFailed, TowpathError
from towpath.kernel.apply import LinuxKernel
from towpath.mode import Node
from towpath.model import Bandwidth, Foreign, InNetns, Key, Network, PortMap, Request, Take, Tuning
from towpath.plan import Plan, steps
from towpath.store.sqlite import SqliteStore

DIED, REFUSED = 9, 3
WIRE, REST = ("wire", "address"), ("ports", "firewall", "bandwidth")


@dataclass(frozen=True)
class Order:
    """verb: add, chain (as two plug-ins), del, or gc. After `step` steps: nothing, "die", or "fail" (once)."""

    state: str
    firewall: str
    verb: str
    container: str
    netns: str
    fault: str = ""
    step: int = 0


class Fragile(LinuxKernel):
    """Dies or refuses before the step that it is told; until then each operation is a plan of its own."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self._order = order
        self.done = 0

    async def apply(self, plan: Plan) -> None:
        if not self._order.step or self.done >= self._order.step:
            self.done += len(steps(plan))
            await super().apply(plan)
            return
        for phase in steps(plan):
            self.done += 1
            if self.done == self._order.step:
                if self._order.fault == "die":
                    os._exit(DIED)
                raise PhaseFailed(phase.where, phase.ops, errno.EBUSY, "injected")
            await super().apply((phase,))


def shop(order: Order) -> Network:
    """Two families; one is enough where each change is a process."""
    subnets = ("10.89.0.0/24", "fd89::/64")[: 1 if order.firewall == "iptables" else 2]
    return network(*subnets, spoof_check=True, isolation="same-network")


def asked(order: Order, parts: tuple[str, ...]) -> Request:
    key = Key("cni", "shop", order.container, "eth0")
    number = 8000 if order.container == "keep" else 9000
    ours = "wire" in parts
    return Request(
        key,
        shop(order),
        parts,
        place=InNetns(order.netns) if ours else Foreign(order.netns, "br-shop", key.veth()),
        address=Take() if ours else None,
        ports=(PortMap(number, 80), PortMap(number, 53, "udp")) if "ports" in parts else (),
        isolation="same-network",
        bandwidth=Bandwidth(10**7, 10**6, 10**7, 10**6) if "bandwidth" in parts else Bandwidth(),
        tuning=Tuning(mtu=1400) if "tuning" in parts else Tuning(),
    )


async def carry_out(order: Order, attacher: Attacher) -> None:
    if order.verb == "add":
        await attacher.network(shop(order))
        await attacher.add(asked(order, (*WIRE, *REST)))
    elif order.verb == "chain":
        await attacher.network(shop(order))
        for parts in (WIRE, ("ports",), ("firewall", "bandwidth"), ("tuning",)):
            await attacher.add(asked(order, parts))
    elif order.verb == "del":
        await attacher.detach(Key("cni", "shop", order.container, "eth0"))
    elif problems := await attacher.gc("cni", "shop", frozenset({("keep", "eth0")}), ""):
        raise TowpathError("; ".join(problems))


async def live(order: Order) -> int:
    """One life of an agent: start, recover, one call, end. Returns the steps of the call."""
    store = SqliteStore(Path(order.state))
    await store.open()
    kernel = Fragile(order)
    attacher = Attacher(store, kernel, Node("test"), Setting(order.firewall, "boot-1"))
    await attacher.load()
    await attacher.recover()
    try:
        await carry_out(order, attacher)
        await attacher.settle()
    finally:
        await kernel.close()
        await store.close()
    return kernel.done


def child(order: Order, out: int) -> None:
    status = 0
    try:
        os.write(out, b"%d" % asyncio.run(live(order)))
    except TowpathError as refused:
        os.write(out, str(refused).encode()[:4000])
        status = REFUSED
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def obey(order: Order) -> dict[str, object]:
    into, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(order, out)
    os.close(out)
    with os.fdopen(into) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return {"status": os.waitstatus_to_exitcode(status), "said": said}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(obey(Order(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
