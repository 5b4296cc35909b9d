"""Which rows an attachment claims, who holds a row already, and how the parts of a chain become one record."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from towpath.errors import Conflict, TowpathError
from towpath.model import Attachment, Bandwidth, Key, PortMap, PortRules, Tuning
from towpath.networks import lease_row
from towpath.parts import ports
from towpath.store.contract import Absent, Put, Store


def attachment_row(key: Key) -> str:
    return f"attachments/{key}"


def rows(record: Attachment) -> tuple[Put, ...]:
    """Every unique thing that these parts claim; the value names the owner. Leases of others (pool -1) are not ours."""
    owner = str(record.key).encode()
    found = []
    if "address" in record.parts:
        found += [
            Put(lease_row(record.key.network, lease.address.ip), owner) for lease in record.leases if lease.pool >= 0
        ]
    if "wire" in record.parts and record.veth:
        found.append(Put(f"veths/{record.veth}", owner))
    if "ports" in record.parts:
        found += [Put(claim, owner) for claim in of_ports(record)]
    return tuple(found)


def unclaimed(puts: tuple[Put, ...]) -> tuple[Absent, ...]:
    return tuple(Absent(put.key) for put in puts)


def describe(row: str) -> str:
    """A claimed row as a person would say it."""
    kind, _, rest = row.partition("/")
    if kind == "leases":
        network, _, address = rest.partition("/")
        return f"address {address} of network {network!r}"
    if kind == "ports":
        proto, port, family, host = rest.split("/", 3)
        return f"host port {port}/{proto} on {'every IPv' + family + ' address' if host == '*' else host}"
    return f"host interface {rest}"


def in_use(row: str, owner: str) -> Conflict:
    return Conflict(
        f"{describe(row)} is in use by {owner}",
        hint=f"stop that container, choose another one, or see: towpath attach show {owner}",
    )


async def taken(store: Store, failed: tuple[Put, ...]) -> TowpathError:
    """The error for claims that did not hold: who has the first of them."""
    for put in failed:
        item = await store.get(put.key)
        if item is not None:
            return in_use(put.key, item.value.decode())
    return Conflict("a claim changed while it was read", hint="try again")


def of_ports(record: Attachment) -> Iterator[str]:
    return ports.claims(record.ports, ports.targets(record))


def refuse_twice(maps: Iterable[PortMap], versions: Collection[int]) -> None:
    """Raise Conflict where a container with addresses of these families asks for one host port twice."""
    own: list[str] = []
    for claim in ports.claims(maps, versions):
        if any(stem(claim) == stem(other) and ports.clash(claim, other) for other in own):
            raise Conflict(f"{describe(claim)} is asked for twice", hint="publish each host port once")
        own.append(claim)


async def refuse_clashes(store: Store, record: Attachment) -> None:
    """Raise Conflict where another attachment publishes the same port on an address that overlaps, or our own does."""
    if "ports" not in record.parts:
        return
    refuse_twice(record.ports, ports.targets(record))
    for claim in of_ports(record):
        for item in (await store.list(stem(claim))).items:
            if ports.clash(claim, item.key):
                raise in_use(item.key, item.value.decode())


def stem(claim: str) -> str:
    """`ports/<proto>/<port>/<family>/`: what claims that may clash have in common."""
    return claim[: claim.rindex("/") + 1]


def merge(old: Attachment, fresh: Attachment) -> Attachment:
    """The record of a chain so far, and the parts that one more plug-in adds."""
    whole = replace(
        old,
        phase="claimed",
        making=fresh.parts,
        parts=(*old.parts, *(part for part in fresh.parts if part not in old.parts)),
        leases=old.leases or fresh.leases,
        netns=old.netns or fresh.netns,
        netns_id=old.netns_id or fresh.netns_id,
        home=old.home or fresh.home,
        veth=old.veth or fresh.veth,
        mac=old.mac or fresh.mac,
        labels=old.labels or fresh.labels,
        aliases=old.aliases or fresh.aliases,
        name=old.name or fresh.name,
    )
    if "wire" in fresh.parts:
        whole = replace(
            whole,
            mode=fresh.mode,
            veth=fresh.veth,
            home=fresh.home,
            mac=fresh.mac,
            routes=fresh.routes,
            dns=fresh.dns,
            masquerade=fresh.masquerade,
            spoof_check=fresh.spoof_check,
            deferred_delete=fresh.deferred_delete,
        )
    if "ports" in fresh.parts:
        whole = replace(whole, ports=fresh.ports, port_rules=fresh.port_rules)
    if "firewall" in fresh.parts:
        whole = replace(whole, isolation=fresh.isolation)
    if "bandwidth" in fresh.parts:
        whole = replace(whole, bandwidth=fresh.bandwidth)
    if "tuning" in fresh.parts:
        whole = replace(whole, tuning=fresh.tuning)
    return whole


def without(record: Attachment, parts: tuple[str, ...]) -> Attachment:
    """The record when these parts are gone: what is left was whole before they came."""
    left = replace(record, phase="attached", making=(), parts=tuple(part for part in record.parts if part not in parts))
    if "ports" in parts:
        left = replace(left, ports=(), port_rules=PortRules())
    if "firewall" in parts:
        left = replace(left, isolation="open")
    if "bandwidth" in parts:
        left = replace(left, bandwidth=Bandwidth())
    if "tuning" in parts:
        left = replace(left, tuning=Tuning())
    return left
