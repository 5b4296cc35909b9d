"""The kernel of this host: applies plans, looks and listens, in the network namespace where the process was started.

A plan is cut into stretches. Operations in the host's and a container's namespace run as one piece of work on a
thread of the crew; deletions of links go to the reaper and rules to the writer, each of which does in one go what
several plans ask for at the same time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeVar

from towpath.errors import BadNetns, PhaseFailed
from towpath.kernel import netns as namespaces
from towpath.kernel import read, sysctl, watch
from towpath.kernel.batch import Batch
from towpath.kernel.contract import Firewall, LinkSeen, NetnsSeen, ShapeSeen, Wanted
from towpath.kernel.crew import Crew, Grouped
from towpath.kernel.herald import Herald
from towpath.kernel.netlink import Netlink
from towpath.kernel.reap import Reaper
from towpath.kernel.writer import Rules, Writer
from towpath.model import Address
from towpath.plan import AddRule, DropLink, Op, Phase, Plan, TunnelEntry
from towpath.timings import Timings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Work:
    """Phases of the host and of containers, done in order by one thread."""

    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True)
class Reap:
    """Links of the host that go, together."""

    names: tuple[str, ...]


Stretch = Work | Reap | Rules


def stretches(plan: Plan) -> list[Stretch]:
    """The plan in the pieces that are handed on, in order; neighbours of one kind become one."""
    found: list[Stretch] = []
    for phase in plan:
        if phase.where == "firewall":
            found += [Rules(phase.ops, phase.firewall)] if phase.ops else []
            continue
        for names, ops in runs(phase):
            last = found.pop() if found else None
            match last:
                case Reap() if names:
                    found.append(Reap((*last.names, *names)))
                case Work() if ops:
                    found.append(Work(joined(last.phases, Phase(phase.where, ops, phase.netns, phase.tolerant))))
                case _:
                    found += [last] if last else []
                    work = Work((Phase(phase.where, ops, phase.netns, phase.tolerant),))
                    found.append(Reap(names) if names else work)
    return found


def runs(phase: Phase) -> Iterator[tuple[tuple[str, ...], tuple[Op, ...]]]:
    """The phase in order: (names of the host's links that go, nothing) or (nothing, other operations)."""
    for goes, ops in groupby(phase.ops, lambda op: phase.where == "host" and isinstance(op, DropLink)):
        if goes:
            yield tuple(op.name for op in ops if isinstance(op, DropLink)), ()
        else:
            yield (), tuple(ops)


def joined(phases: tuple[Phase, ...], more: Phase) -> tuple[Phase, ...]:
    """`more` behind the phases, or as part of the last one where both are for the same place."""
    last = phases[-1]
    if (last.where, last.netns, last.tolerant) != (more.where, more.netns, more.tolerant):
        return (*phases, more)
    return (*phases[:-1], Phase(last.where, last.ops + more.ops, last.netns, last.tolerant))


def step(stretch: Work | Rules) -> str:
    """What `timings` calls it."""
    if isinstance(stretch, Work):
        return "links"
    return "firewall" if isinstance(stretch.changes[0], AddRule) else "undo firewall"


class LinuxKernel:
    """Implements towpath.kernel.contract.Kernel. Build it in the main thread, in the namespace that is to be served."""

    def __init__(self, firewall: str = "auto", firewalls: Mapping[str, Firewall] | None = None) -> None:
        """firewall: the back end for phases that name none: "auto", "nftables" or "iptables".

        firewalls: back ends that are ready made; others are made when they are first asked for.
        """
        self._setting = firewall
        self._home = os.open(namespaces.OWN, os.O_RDONLY | os.O_CLOEXEC)
        self._crew = Crew()
        self._herald = Herald()
        self._reaper = Grouped("towpath-reaper", Reaper().reap)
        self._writer = Writer(self.firewall, self._default)
        self.timings = Timings()
        self._firewalls = dict(firewalls or {})
        self._picked = ""

    async def apply(self, plan: Plan) -> None:
        self._herald.start()
        line: list[Work | Rules] = []  # what one thread does without a word in between
        for stretch in stretches(plan):
            if isinstance(stretch, Work) or (isinstance(stretch, Rules) and self._writer.is_quick(stretch)):
                line.append(stretch)
                continue
            await self._run(line)
            line = []
            if isinstance(stretch, Reap):
                with self.timings.measure("undo links"):
                    await self._reap(stretch.names)
            else:
                with self.timings.measure(step(stretch)):
                    await self._writer.commit(stretch)
        await self._run(line)

    async def _run(self, line: list[Work | Rules]) -> None:
        if line:
            await self._crew.run(partial(self._do_line, line=tuple(line)))

    async def look(self, netns: str = "") -> NetnsSeen:
        return await self._crew.run(lambda netlink: self._at(netns, netlink, read.look))

    async def link(self, name: str, netns: str = "") -> LinkSeen | None:
        return await self._crew.run(lambda netlink: self._at(netns, netlink, lambda n: read.find_link(n, name)))

    async def shapes(self, link: str) -> tuple[ShapeSeen, ...]:
        return await self._crew.run(lambda netlink: read.shapes(netlink, link))

    async def tunnel_entries(self, link: str, table: int) -> frozenset[TunnelEntry]:
        return await self._crew.run(lambda netlink: read.tunnel_entries(netlink, link, table))

    async def route_device(self, address: Address) -> str:
        return await self._crew.run(lambda netlink: read.route_device(netlink, address))

    async def sysctl(self, path: str, netns: str = "") -> str | None:
        return await self._crew.run(lambda netlink: self._at(netns, netlink, lambda _: sysctl.read(path)))

    def netns_id(self, path: str) -> int:
        return namespaces.netns_id(path)

    def own_netns_id(self) -> int:
        return os.fstat(self._home).st_ino

    def firewall(self, name: str) -> Firewall:
        if name not in self._firewalls:
            from towpath.kernel import firewall

            self._firewalls[name] = firewall.make(name)
        return self._firewalls[name]

    def pick_firewall(self, setting: str) -> str:
        from towpath.kernel import firewall

        return firewall.pick(setting)

    async def heal(self, firewall: str, wanted: Callable[[], Wanted]) -> int:
        return await self._writer.heal(firewall, wanted)

    async def touched(self, firewall: str) -> bool:
        return await self._writer.touched(firewall)

    def changes(self) -> AsyncIterator[str]:
        return watch.changes()

    def route_changes(self) -> AsyncIterator[str]:
        return watch.changes(watch.ROUTES, rest=1.0)

    async def close(self) -> None:
        """Threads end when they have done what they hold; nothing in the kernel changes."""
        for part in (self._crew, self._reaper, self._writer, self._herald):
            part.close()
        if self._home >= 0:
            os.close(self._home)
            self._home = -1

    # --- in the threads -----------------------------------------------------------------------------------------

    def _do_line(self, netlink: Netlink, line: tuple[Work | Rules, ...]) -> None:
        for stretch in line:
            with self.timings.measure(step(stretch)):
                if isinstance(stretch, Rules):
                    self._writer.commit_now(stretch)
                else:
                    self._work(netlink, stretch.phases)

    def _work(self, netlink: Netlink, phases: tuple[Phase, ...]) -> None:
        for phase in phases:
            with suppress(*((_Gone,) if phase.tolerant else ())):
                self._do(netlink, phase)

    def _do(self, netlink: Netlink, phase: Phase) -> None:
        try:
            path = phase.netns if phase.where == "netns" else ""
            self._at(path, netlink, lambda n: Batch(n, phase.where, self._herald).run(phase.ops))
        except OSError as failure:  # of the socket itself: what the kernel refuses is PhaseFailed already
            raise PhaseFailed(phase.where, phase.ops[:3], failure.errno or 0, str(failure)) from failure

    def _at(self, path: str, netlink: Netlink, do: Callable[[Netlink], T]) -> T:
        """Run `do` in the namespace at `path` with a socket of that namespace; "" = home, with the thread's own."""
        if not path:
            return do(netlink)
        try:
            fd = namespaces.open_netns(path)
        except BadNetns as gone:
            raise _Gone(gone.what, hint=gone.hint) from None
        try:
            with namespaces.inside(fd, self._home), Netlink() as there:
                return do(there)
        finally:
            os.close(fd)

    async def _reap(self, names: tuple[str, ...]) -> None:
        outcomes = await asyncio.gather(*map(self._reaper.submit, names), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    def _default(self) -> str:
        if not self._picked:
            self._picked = self.pick_firewall(self._setting)
        return self._picked


class _Gone(BadNetns):
    """The namespace of the phase itself is not there, as opposed to one that an operation names."""
