"""Writes the overlay's cluster tables: by compare-and-set, so that two nodes at once never get the same.

Every round reads the configuration first and the claims after it, and its transaction asks that the configuration is
still the same and each new claim still free. So no block is given by one configuration beside a block of another.
A round is lost only to one that somebody else won.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from towpath import schema
from towpath.errors import Conflict, NotFound, TowpathError, Unavailable
from towpath.overlay import allocate
from towpath.overlay.config import OverlayConfig
from towpath.overlay.records import CONFIG, NODES, SUBNETS, VTEPS, Claim, Member, claims, node_row
from towpath.store.contract import Absent, AtRevision, Change, Compare, Delete, Item, OutcomeUnknown, Put, Store

log = logging.getLogger(__name__)

ROUNDS = 1000  # as many nodes may join in the same moment


@dataclass(frozen=True, slots=True)
class Tables:
    """What one round has read."""

    config: OverlayConfig
    config_item: Item
    row: Item | None
    claims: dict[str, Item]

    def owners(self) -> dict[str, str]:
        return {key: schema.read(Claim, item.value).node for key, item in self.claims.items()}


async def read_config(store: Store) -> OverlayConfig | None:
    """The overlays of this cluster; None = it has none."""
    item = await store.get(CONFIG)
    return schema.read(OverlayConfig, item.value) if item else None


async def declare(store: Store, config: OverlayConfig) -> None:
    """The cluster's overlays are these from now on. Raises Conflict where nodes hold what they would contradict."""
    for _ in range(ROUNDS):
        item = await store.get(CONFIG)
        if item is not None:
            old = schema.read(OverlayConfig, item.value)
            allocate.check_change(old, config, await _claims(store))
        row = schema.rewrite(item.value if item else None, config)
        compare: Compare = AtRevision(CONFIG, item.revision) if item else Absent(CONFIG)
        if await _commit(store, (compare,), (Put(CONFIG, row),)):
            return
    raise Unavailable("the cluster's overlays keep changing: nothing was declared")


async def join(store: Store, who: Member) -> Member:
    """The node's row with everything that the overlays give it: made, or brought to the configuration.

    who: name and underlay addresses; what else it says is ignored. Run again it writes nothing.
    Raises NotFound where the cluster has no overlays, PoolEmpty, Conflict where another node has the address.
    """
    for _ in range(ROUNDS):
        tables = await _read(store, who.name)
        held = schema.read(Member, tables.row.value) if tables.row else None
        member = allocate.admit(tables.config, replace(who, vtep=None, slices=()), held, tables.owners())
        await _refuse_same_address(store, member, held)
        compares, changes = _difference(tables, held, member)
        if not changes or await _commit(store, compares, changes):
            return member
    raise Unavailable(f"node {who.name!r} lost {ROUNDS} rounds against other nodes that join: try again")


async def leave(store: Store, name: str) -> bool:
    """Row and claims of the node go; they are free from now on. False = there was no such node."""
    for _ in range(ROUNDS):
        row = await store.get(node_row(name))
        mine = [i for i in (await _claims(store)).values() if schema.read(Claim, i.value).node == name]
        items = [*([row] if row else []), *mine]
        if not items:
            return False
        compares = tuple(AtRevision(item.key, item.revision) for item in items)
        if await _commit(store, compares, tuple(Delete(item.key) for item in items)):
            return True
    raise Unavailable(f"the rows of node {name!r} keep changing: nothing was removed")


def read_members(items: Iterable[Item]) -> dict[str, Member]:
    """The nodes by name. A row that cannot be read is logged and left out: one node's mistake stops no other."""
    found = {}
    for item in items:
        member = read_member(item)
        if member is not None:
            found[member.name] = member
    return found


def read_member(item: Item) -> Member | None:
    try:
        member = schema.read(Member, item.value)
    except TowpathError as broken:
        log.warning("a node's row is left out", extra={"row": item.key, "why": broken.what})
        return None
    if item.key != node_row(member.name):
        log.warning("a node's row is left out", extra={"row": item.key, "why": f"it names node {member.name!r}"})
        return None
    return member


async def _read(store: Store, name: str) -> Tables:
    item = await store.get(CONFIG)  # before the claims: see the head of this file
    if item is None:
        raise NotFound("this cluster has no overlays", hint="declare them in dcos_overlay_network")
    row = await store.get(node_row(name))
    return Tables(schema.read(OverlayConfig, item.value), item, row, await _claims(store))


async def _claims(store: Store) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for prefix in (SUBNETS, VTEPS):
        found.update((item.key, item) for item in (await store.list(prefix)).items)
    return found


async def _refuse_same_address(store: Store, member: Member, held: Member | None) -> None:
    if held is not None and held.addresses == member.addresses:
        return
    others = read_members((await store.list(NODES)).items)
    for other in others.values():
        if other.name != member.name and (same := set(other.addresses) & set(member.addresses)):
            raise Conflict(
                f"address {min(map(str, same))} of node {member.name!r} is that of node {other.name!r}",
                hint=f"if that node is gone: towpath cluster remove {other.name}",
            )


def _difference(tables: Tables, held: Member | None, member: Member) -> tuple[tuple[Compare, ...], tuple[Change, ...]]:
    """What one transaction asks and writes; claims of this node that its row does not name (any more) go."""
    wanted = claims(member)
    owners = tables.owners()
    mine = {key for key, node in owners.items() if node == member.name}
    new = [key for key in wanted if key not in mine]
    gone = sorted(mine - set(wanted))
    if not new and not gone and held == member:
        return (), ()
    row = node_row(member.name)
    claim = schema.rewrite(None, Claim(member.name))
    compares: list[Compare] = [AtRevision(CONFIG, tables.config_item.revision)]
    compares.append(AtRevision(row, tables.row.revision) if tables.row else Absent(row))
    compares += [Absent(key) for key in new]
    compares += [AtRevision(key, tables.claims[key].revision) for key in sorted(mine)]
    changes: list[Change] = [Put(row, schema.rewrite(tables.row.value if tables.row else None, member))]
    changes += [Put(key, claim) for key in new]
    changes += [Delete(key) for key in gone]
    return tuple(compares), tuple(changes)


async def _commit(store: Store, compares: tuple[Compare, ...], changes: tuple[Change, ...]) -> bool:
    """False: somebody was quicker, or nobody knows whether it was done: read, then decide."""
    try:
        return (await store.txn(compares, changes, durable=True)).ok
    except OutcomeUnknown as unknown:
        log.info("a write may have been lost, reading again", extra={"why": unknown.what})
        return False
