"""Follows the nodes table: what leads to the other nodes is in this node's kernel, and nothing else of that kind.

A node's row that changes costs what leads to that node, however many there are. In full it is done at start, when the
configuration changes, when the kernel says that somebody touched routes or neighbours, and on a timer. Whatever cannot
be read or done now stays as it is: the tables that were known last go on carrying traffic.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import chain

from towpath.errors import BadConfig, TowpathError
from towpath.kernel.contract import Kernel, NetnsSeen
from towpath.model import Subnet
from towpath.overlay import cluster, guard, tables
from towpath.overlay.config import OverlayConfig, host_route_in_the_way
from towpath.overlay.records import CONFIG, NODES, Member, node_row
from towpath.overlay.tables import Difference, Tables
from towpath.plan import AddRule, DropLink, DropRule, Op, Phase, Rule
from towpath.store.contract import Batch, Event, Reset, Store

log = logging.getLogger(__name__)

INTERVAL = 30.0  # seconds between two full comparisons where nothing was heard
AGAIN = 1.0  # seconds after one that failed


@dataclass(slots=True)
class State:
    """What this node is in the cluster, and what follows from the tables as last read."""

    config: OverlayConfig
    own: Member
    mtu: int
    members: dict[str, Member]
    wanted: Tables
    revision: int  # of the store when the nodes were read

    def rules(self, bridges: tuple[str, ...]) -> frozenset[Rule]:
        return guard.rules(self.config, self.own, self.members.values(), bridges)


def refuse_routed_pools(config: OverlayConfig, seen: NetnsSeen) -> None:
    """Raise BadConfig where the host routes a pool elsewhere. Once the node is in, such a route is a foreign one."""
    pairs: list[tuple[str, Subnet]] = [(link, route.dst) for link, route in seen.routes]
    pairs += [(link, address.network) for link, address in seen.addresses]
    if reason := host_route_in_the_way(config, iter(pairs)):
        raise BadConfig(reason, hint="choose another pool, or remove the route")


async def _nobody(state: State | None) -> None:
    """Who follows what this node is where nobody else does."""


class Tunnel:
    """Keeps one node's tunnel equal to the nodes table.

    who: name and underlay addresses of this node. bridges: gives the bridges of the node's other networks.
    follow: is called with the state after every change of configuration or of the node's slices, with None after the
    node was removed from the cluster.
    """

    def __init__(
        self,
        store: Store,
        kernel: Kernel,
        who: Member,
        *,
        bridges: Callable[[], tuple[str, ...]] = lambda: (),
        follow: Callable[[State | None], Awaitable[None]] = _nobody,
    ) -> None:
        self.store = store
        self.kernel = kernel
        self.who = who
        self.state: State | None = None
        self.rules: frozenset[Rule] = frozenset()  # for Attacher.standing, whose heal keeps them in the kernel
        self._written: frozenset[Rule] = frozenset()
        self.removed = False
        self._bridges = bridges
        self._follow = follow
        self._turn = asyncio.Lock()
        self._dirty = asyncio.Event()
        self._stale = True  # the tables are to be read again

    # --- in full --------------------------------------------------------------------------------------------------

    async def heal(self) -> int:
        """Bring the kernel to the tables; returns how many entries had to change. Raises TowpathError."""
        async with self._turn:
            self._dirty.clear()
            failed = None
            try:
                if self._stale:
                    await self._load()
            except TowpathError as failure:
                if self.state is None:
                    raise
                failed = failure  # what was known last is kept true meanwhile
            changed = await self._bring() if self.state else 0
            if failed:
                raise failed
            return changed

    async def _load(self) -> None:
        """Read configuration and nodes, and join: a node that holds what it should writes nothing."""
        config = await cluster.read_config(self.store)
        if config is None or self.removed:
            await self._leave()
            return
        seen = await self.kernel.look()
        if self.state is None and await self.store.get(node_row(self.who.name)) is None:
            refuse_routed_pools(config, seen)
        mtu = tables.mtu(config, self.who, seen)  # what cannot work is refused before anything is written
        own = await cluster.join(self.store, self.who)
        listing = await self.store.list(NODES)
        members = cluster.read_members(listing.items)
        wanted = tables.wanted(config, own, members.values())
        before, self.state = self.state, State(config, own, mtu, members, wanted, listing.revision)
        self._stale = False
        if before is not None and before.config.device != config.device:
            await self.kernel.apply((Phase("host", (DropLink(before.config.device),)),))
        if before is None or (before.config, before.own) != (config, own):
            await self._follow(self.state)

    async def _bring(self) -> int:
        state = self._need()
        look = await self.kernel.look()
        if (mtu := tables.mtu(state.config, state.own, look)) != state.mtu:
            state.mtu = mtu
            await self._follow(state)
        host: list[Op] = list(tables.device(state.config, state.own, state.mtu))
        host += tables.strange_addresses(state.config, state.own, look)
        await self.kernel.apply((Phase("host", tuple(host)),))
        seen = await self.kernel.tunnel_entries(state.config.device, state.config.table)
        found = tables.difference(state.config, state.wanted, seen)
        await self._apply(found, state.rules(self._bridges()))
        return len(found)

    # --- one node at a time -----------------------------------------------------------------------------------------

    async def hear(self, batch: Batch) -> None:
        """Rows of nodes have changed. Raises PhaseFailed."""
        async with self._turn:
            if self.state is None or self._stale or batch.revision <= self.state.revision:
                return
            for event in batch.events:
                if event.item.key == node_row(self.who.name):
                    await self._own_row(event)
                else:
                    await self._hear(event)

    async def _hear(self, event: Event) -> None:
        state = self.state
        if state is None:
            return
        name = event.item.key.removeprefix(NODES)
        new = None if event.deleted else cluster.read_member(event.item)
        old = state.members.pop(name, None)
        if new is not None:
            state.members[name] = new
        state.wanted, found = tables.step(state.config, state.own, state.wanted, old, new)
        await self._apply(found, self._rules_after(old, new))

    def _rules_after(self, old: Member | None, new: Member | None) -> frozenset[Rule]:
        """The rules with one node's addresses exchanged; an address that another node has too stays."""
        state = self._need()
        before = frozenset(old.addresses if old else ())
        after = frozenset(new.addresses if new else ())
        others = frozenset(chain.from_iterable(member.addresses for member in state.members.values()))
        return (self._written - guard.peers(state.config, before - others)) | guard.peers(state.config, after - before)

    async def _own_row(self, event: Event) -> None:
        if not event.deleted:
            if cluster.read_member(event.item) != self._need().own:
                self.touch()
            return
        log.warning("this node was removed from the cluster: its tunnel goes", extra={"node": self.who.name})
        self.removed = True
        await self._leave()

    async def _leave(self) -> None:
        """Tunnel, routes and rules go; containers live on beside each other."""
        state, self.state, self._stale = self.state, None, False
        if state is None:
            return
        await self._follow(None)
        found = tables.change({}, state.wanted.values())
        await self.kernel.apply((Phase("host", (*found.drop, DropLink(state.config.device))),))
        await self._apply(Difference(), frozenset())

    # --- doing ------------------------------------------------------------------------------------------------------

    async def _apply(self, found: Difference, rules: frozenset[Rule]) -> None:
        """Peers are let in before anything leads to them, and shut out after nothing does any more."""
        add, drop = rules - self._written, self._written - rules
        self.rules = rules | self._written  # a heal that comes in between takes neither the old nor the new away
        phases = (
            Phase("firewall", tuple(map(AddRule, add))),
            Phase("host", found.ops),
            Phase("firewall", tuple(map(DropRule, drop))),
        )
        await self.kernel.apply(tuple(phase for phase in phases if phase.ops))
        self._written = self.rules = rules

    def _need(self) -> State:
        if self.state is None:
            raise TowpathError("this node is in no overlay")
        return self.state

    def touch(self) -> None:
        """The tables are read again soon, and all is compared."""
        self._stale = True
        self._dirty.set()

    # --- following --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_nodes())
            group.create_task(self._watch_config())
            group.create_task(self._listen())
            group.create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            wait = INTERVAL
            try:
                if changed := await self.heal():
                    log.info("tunnel brought to the nodes table", extra={"changed": changed})
            except TowpathError as failed:
                log.error("the tunnel could not be brought to the nodes table", extra={"error": str(failed)})
                wait = AGAIN
            with contextlib.suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the event.
                async with asyncio.timeout(wait):
                    await self._dirty.wait()

    async def _watch_nodes(self) -> None:
        watch = self.store.watch(NODES)
        self.touch()  # what changed before the watch began is read once it has
        async for said in watch:
            match said:
                case Batch():
                    await self._hear_safely(said)
                case Reset():
                    self.touch()

    async def _hear_safely(self, batch: Batch) -> None:
        try:
            await self.hear(batch)
        except TowpathError as failed:
            log.error("a node's change could not be done, all is compared", extra={"error": str(failed)})
            self.touch()

    async def _watch_config(self) -> None:
        async for said in self.store.watch(CONFIG):
            if isinstance(said, Batch | Reset):
                self.touch()

    async def _listen(self) -> None:
        async for _ in self.kernel.route_changes():
            self._dirty.set()
