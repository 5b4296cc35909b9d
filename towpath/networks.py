"""The networks of this node: their rows, their shared devices, and the pool of addresses of each."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import fields, replace
from typing import Any

from towpath import hostlocal, mode, schema
from towpath.errors import BadConfig, Conflict, NotFound, Unavailable
from towpath.ipam import Allocator
from towpath.kernel.contract import Kernel, LinkSeen
from towpath.model import Address, Attachment, Key, Lease, Network
from towpath.store.contract import Absent, Put, Store

log = logging.getLogger(__name__)

NOT_COMPARED = {"source", "v", "data_dir", "force_address"}


def row(name: str) -> str:
    return f"networks/{name}"


def lease_row(network: str, address: Address | str) -> str:
    return f"leases/{network}/{address}"


def differences(row: Network, wanted: Network, given: frozenset[str] | None) -> list[tuple[str, Any, Any]]:
    """(key, in the row, wanted) for every key that differs; given: the keys that were stated, None = all."""
    names = [f.name for f in fields(Network) if f.name not in NOT_COMPARED and (given is None or f.name in given)]
    return [(n, getattr(row, n), getattr(wanted, n)) for n in names if getattr(row, n) != getattr(wanted, n)]


def plain(value: Any) -> str:
    """A value as a person would write it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)


class Networks:
    """One owner for the rows `networks/` and for the allocators that stand on the rows `leases/`."""

    def __init__(self, store: Store, kernel: Kernel) -> None:
        self.store = store
        self.kernel = kernel
        self.rows: dict[str, Network] = {}
        self.up: set[str] = set()
        self._devices = asyncio.Lock()  # making, mending and dropping of shared devices go one after the other
        self.devices: dict[str, LinkSeen] = {}  # the shared device of each network that is up, as last seen
        self.allocators: dict[str, Allocator] = {}

    async def load(self) -> None:
        listing = await self.store.list("networks/")
        for item in listing.items:
            network = schema.read(Network, item.value)
            self.rows[network.name] = network

    def get(self, name: str) -> Network:
        if name not in self.rows:
            known = ", ".join(sorted(self.rows)) or "none"
            raise NotFound(
                f"network {name!r} does not exist", hint=f"networks: {known}. Make one: towpath network create"
            )
        return self.rows[name]

    async def allocator(self, network: Network) -> Allocator:
        """The network's pools with every lease that a row holds already taken."""
        found = self.allocators.get(network.name)
        if found is None:
            prefix = lease_row(network.name, "")
            listing = await self.store.list(prefix)
            cursor = await self.store.get(f"cursors/{network.name}")
            found = Allocator.load(
                network,
                ((item.key.removeprefix(prefix), item.value.decode()) for item in listing.items),
                cursor.value if cursor else b"",
            )
            self.allocators[network.name] = found
        return found

    # --- rows -----------------------------------------------------------------------------------------------------

    async def want(self, wanted: Network, given: frozenset[str] | None, in_use: bool) -> Network:
        """The row for a network that a runtime names with its configuration; made or, while unused, replaced.

        in_use: attachments of it exist. Raises BadConfig naming the first key that differs, with both values.
        """
        known = self.rows.get(wanted.name)
        if known is None:
            return await self.create(wanted)
        changed = differences(known, wanted, given)
        if not changed:
            return known
        if known.source == "cni" and (not in_use or wanted.force_address):
            return await self.save(wanted)
        key, here, there = changed[0]
        raise BadConfig(
            f"network {known.name!r} has {key} {plain(here)}, but this configuration says {plain(there)}",
            hint=f"make them equal, use another network name, or remove it first: towpath network rm {known.name}",
        )

    async def create(self, network: Network) -> Network:
        """A new row; Conflict where the name is taken."""
        mode.get(network.mode)
        result = await self.store.txn(
            (Absent(row(network.name)),), (Put(row(network.name), schema.rewrite(None, network)),), durable=True
        )
        if not result.ok:
            raise Conflict(f"network {network.name!r} exists already", hint=f"see: towpath network show {network.name}")
        self.rows[network.name] = network
        return network

    async def save(self, network: Network) -> Network:
        old = await self.store.get(row(network.name))
        await self.store.put(row(network.name), schema.rewrite(old.value if old else None, network))
        self.rows[network.name] = network
        self.allocators.pop(network.name, None)
        self.up.discard(network.name)
        return network

    async def declare(self, networks: tuple[Network, ...]) -> None:
        """Networks of the configuration file: their rows become what the file says; those it no longer names go."""
        named = {network.name for network in networks}
        for network in networks:
            if self.rows.get(network.name) != network:
                await self.save(network)
        for name in [n.name for n in self.rows.values() if n.source == "yaml" and n.name not in named]:
            await self.save(replace(self.rows[name], source="cli"))

    def check_free(self, network: Network) -> None:
        """Neither the bridge nor a subnet of a network that an administrator makes may belong to another network."""
        for other in self.rows.values():
            if other.name == network.name or "host" in (other.mode, network.mode):
                continue
            if other.device == network.device:
                raise Conflict(f"bridge {network.device!r} belongs to network {other.name!r}")
            for ours in subnets(network):
                for theirs in subnets(other):
                    if ours.version == theirs.version and ours.overlaps(theirs):
                        raise Conflict(f"subnet {ours} overlaps {theirs} of network {other.name!r}")

    # --- the shared device ----------------------------------------------------------------------------------------

    async def bring_up(self, network: Network) -> None:
        """The bridge is there with its addresses. Cheap when it was brought up before; see also `forget`."""
        if network.name not in self.up:
            async with self._devices:
                await self._bring_up(network)

    async def _bring_up(self, network: Network) -> None:
        if network.name not in self.rows:  # dropped since the caller read it
            await self.save(network)
        kind = mode.get(network.mode)
        seen = await self.kernel.look()
        if reason := kind.check_network(network, seen):
            raise BadConfig(reason, hint="choose another bridge name, or set forceAddress to replace its address")
        if network.force_address:
            await self.kernel.apply(kind.replace_addresses(network, seen))
        await self.kernel.apply(kind.plan_network(network))
        device = await self.kernel.link(kind.home(network)) if kind.home(network) else None
        if device is not None:
            self.devices[network.name] = device
        self.up.add(network.name)

    async def reason_not_ready(self, network: Network) -> None:
        """Raise Unavailable where an ADD could not work now (CNI STATUS)."""
        if reason := mode.get(network.mode).check_network(network, await self.kernel.look()):
            raise Unavailable(reason)
        if network.pools:
            (await self.allocator(network)).check_room()

    async def verify(self) -> int:
        """Bring back shared devices that somebody took away or stripped; returns how many."""
        mended = 0
        async with self._devices:
            seen = await self.kernel.look() if self.up else None
            for network in [self.rows[name] for name in sorted(self.up) if name in self.rows]:
                if seen is None:
                    break
                kind = mode.get(network.mode)
                if device := seen.link(kind.home(network)):
                    self.devices[network.name] = device
                if not kind.network_is_up(network, seen):
                    log.warning("network device mended", extra={"network": network.name, "device": network.device})
                    await self._bring_up(network)
                    mended += 1
        return mended

    async def verify_devices(self) -> int:
        """The same where only links changed: one question per network, however many containers there are."""
        for name in sorted(self.up):
            network = self.rows.get(name)
            device = mode.get(network.mode).home(network) if network else ""
            link = await self.kernel.link(device) if device else None
            if device and (link is None or not link.up):
                return await self.verify()
        return 0

    async def drop(self, name: str) -> None:
        """Row, cursor and shared device go. The caller has made sure that nothing is attached."""
        async with self._devices:
            await self._drop(self.get(name))

    async def _drop(self, network: Network) -> None:
        name = network.name
        self.rows.pop(name, None)  # first: an ADD that comes meanwhile waits for the lock and makes it anew
        self.allocators.pop(name, None)
        self.up.discard(name)
        await self.store.delete(lease_row(name, ""), prefix=True)
        await self.store.delete(f"cursors/{name}")
        device = mode.get(network.mode).home(network)
        seen = await self.kernel.link(device) if device else None
        if seen is not None and seen.kind == "bridge" and seen.alias == "towpath":
            await self.kernel.apply(mode.get(network.mode).plan_drop_network(network))
        await self.store.delete(row(name))  # last: a crash before it leaves a network that can be dropped again


def subnets(network: Network) -> set[Any]:
    return {span.subnet for pool in network.pools for span in pool.ranges}


def adopted(network: Network, boot: str, caller: str = "") -> list[Attachment]:
    """Reservations of the reference host-local's directory as records that hold an address and nothing else."""
    if not network.data_dir:
        return []
    found = []
    for address, container, ifname in hostlocal.reservations(network.data_dir, network.name):
        pool = next((i for i, p in enumerate(network.pools) if address in p), -1)
        if pool < 0:
            log.warning("reservation outside every pool", extra={"network": network.name, "address": str(address)})
            continue
        prefix = next(r.subnet.prefixlen for r in network.pools[pool].ranges if address in r)
        lease = Lease(hostlocal.interface(address, prefix), None, pool)
        key = Key("cni", network.name, container, ifname or "eth0")
        found.append(Attachment(key, phase="attached", parts=("address",), leases=(lease,), boot=boot, caller=caller))
    return found
