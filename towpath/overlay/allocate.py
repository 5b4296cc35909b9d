"""Who gets what: DC/OS's maths, bit by bit. Pure: what is taken comes in, what a node gets goes out.

The lowest free block of each overlay (block 0 included), the lowest free tunnel address (the network's and the
broadcast address excluded), and a MAC made of the OUI and the address's low 24 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_network
from typing import TypeVar

from towpath.errors import Conflict, PoolEmpty
from towpath.model import Address, Subnet
from towpath.overlay.config import MAC_BITS, Overlay, OverlayConfig
from towpath.overlay.records import SUBNETS, VTEPS, Member, Slice, Vtep

Net = TypeVar("Net", IPv4Network, IPv6Network)


def lowest_block(pool: Net, bits: int, taken: Iterable[Subnet]) -> Net | None:
    """The first block of length `bits` in `pool` that overlaps nothing taken; None = the pool is used up."""
    size = 1 << (pool.max_prefixlen - bits)
    place, end = int(pool.network_address), int(pool.broadcast_address)
    held = ((int(t.network_address), int(t.broadcast_address)) for t in taken if t.version == pool.version)
    for first, last in sorted(held):
        if first >= place + size:
            break
        if last >= place:
            place = (last // size + 1) * size  # pools are aligned to their own, larger, size
    return type(pool)((place, bits)) if place <= end else None


def free_addresses(pool: Subnet, taken: Collection[Address]) -> Iterator[Address]:
    """Addresses strictly between the pool's first and last one, lowest first."""
    first, last = int(pool.network_address), int(pool.broadcast_address)
    kind = IPv4Address if pool.version == 4 else IPv6Address
    held = {int(address) for address in taken if address.version == pool.version}
    for value in range(first + 1, min(last, first + (1 << MAC_BITS))):
        if value not in held:
            yield kind(value)


def vtep_mac(oui: str, address: Address) -> str:
    """70:B3:D5:00:00:00 and 44.128.0.1 → 70:b3:d5:80:00:01."""
    return f"{oui[:8].lower()}:{address.packed[-3:].hex(':')}"


def halves(block: Subnet) -> tuple[Subnet, Subnet]:
    """(of m-<name>, of d-<name>)."""
    lower, upper = block.subnets(1)
    return lower, upper


def bridges(overlay: Overlay, one: Slice) -> dict[str, tuple[Subnet, ...]]:
    """The bridges of a node on this overlay, with the subnets of each."""
    if overlay.split == "none":
        return {f"m-{overlay.name}": one.blocks}
    cut = [halves(block) for block in one.blocks]
    return {
        f"m-{overlay.name}": tuple(lower for lower, _ in cut),
        f"d-{overlay.name}": tuple(upper for _, upper in cut),
    }


# --- one node --------------------------------------------------------------------------------------------------------


def admit(config: OverlayConfig, who: Member, held: Member | None, taken: Mapping[str, str]) -> Member:
    """The row of node `who`: what it holds already stays, what the overlays add is the lowest that is free.

    taken: claim key → node. Raises PoolEmpty naming the pool that has no room; then nothing is given.
    """
    others = {key for key, node in taken.items() if node != who.name}
    before = held or who
    vtep = _vtep(config, who.name, before.vtep, others)
    slices = tuple(
        _slice(overlay, before.slice(overlay.name), others) for overlay in config.overlays if overlay.enabled
    )
    return replace(who, vtep=vtep, slices=slices)


def _vtep(config: OverlayConfig, node: str, held: Vtep | None, others: Collection[str]) -> Vtep:
    names = [key.removeprefix(VTEPS) for key in others if key.startswith(VTEPS)]
    macs = {name for name in names if name.count(":") == 5 and len(name) == 17}
    addresses = [_address(name) for name in names if name not in macs]
    mac = held.mac if held else ""
    ip, ip6 = (held.ip, held.ip6) if held else (None, None)
    for pool in (config.vtep_subnet, config.vtep_subnet6):
        if pool is None or (ip if pool.version == 4 else ip6) is not None:
            continue
        free = free_addresses(pool, addresses)
        # A MAC can be taken though its address is free: where the cluster had no IPv4 at first, it came from IPv6.
        found = next((a for a in free if mac or vtep_mac(config.vtep_mac_oui, a) not in macs), None)
        if found is None:
            raise PoolEmpty(f"tunnel addresses {pool} are used up: none is left for node {node!r}")
        mac = mac or vtep_mac(config.vtep_mac_oui, found)
        if isinstance(found, IPv4Address):
            ip = IPv4Interface((int(found), pool.prefixlen))
        else:
            ip6 = IPv6Interface((int(found), pool.prefixlen))
    return Vtep(mac, ip, ip6)


# A round that was lost, and every node that joins, reads the same thousands of claims again.
@lru_cache(1 << 14)
def _address(text: str) -> Address:
    return IPv6Address(text) if ":" in text else IPv4Address(text)


_network = lru_cache(1 << 14)(ip_network)


def _slice(overlay: Overlay, held: Slice | None, others: Collection[str]) -> Slice:
    prefix = f"{SUBNETS}{overlay.name}/"
    taken = [_network(key.removeprefix(prefix)) for key in others if key.startswith(prefix)]
    kept = held or Slice(overlay.name)
    subnet, subnet6 = kept.subnet, kept.subnet6
    if overlay.subnet is not None and subnet is None:
        subnet = _block(overlay, overlay.subnet, overlay.prefix, taken)
    if overlay.subnet6 is not None and subnet6 is None:
        subnet6 = _block(overlay, overlay.subnet6, overlay.prefix6, taken)
    return Slice(overlay.name, subnet, subnet6)


def _block(overlay: Overlay, pool: Net, bits: int, taken: Iterable[Subnet]) -> Net:
    found = lowest_block(pool, bits, taken)
    if found is None:
        raise PoolEmpty(
            f"pool {pool} of overlay {overlay.name!r} is used up: no /{bits} is left",
            hint="remove nodes that are gone: towpath cluster remove NODE",
        )
    return found


# --- changes of the configuration ------------------------------------------------------------------------------------


def check_change(old: OverlayConfig, new: OverlayConfig, taken: Collection[str]) -> None:
    """Raise Conflict where the new configuration contradicts what nodes were given under the old one."""
    if any(key.startswith(VTEPS) for key in taken):
        for key in ("vtep_subnet", "vtep_subnet6", "vtep_mac_oui"):
            before, after = getattr(old, key), getattr(new, key)
            if before is not None and before != after:
                raise Conflict(f"{key} is {before} and nodes have addresses by it: it cannot become {after}")
    for overlay in old.overlays:
        used = any(key.startswith(f"{SUBNETS}{overlay.name}/") for key in taken)
        after_overlay = new.overlay(overlay.name)
        if used and after_overlay is not None:
            _check_overlay_change(overlay, after_overlay)


def _check_overlay_change(old: Overlay, new: Overlay) -> None:
    for key in ("subnet", "prefix", "subnet6", "prefix6", "split"):
        before, after = getattr(old, key), getattr(new, key)
        if before not in (None, 0) and before != after:
            raise Conflict(
                f"overlay {old.name!r} has {key} {before} and nodes have blocks of it: it cannot become {after}",
                hint="make another overlay, or remove this one first",
            )
