"""The networks of this node: their rows, their shared devices, and the pool of addresses of each."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from towpath import hostlocal, mode, schema
from towpath.errors import BadConfig, Conflict, NotFound, Unavailable
from towpath.ipam import Allocator
from towpath.kernel.contract import Kernel, LinkSeen
from towpath.model import Address, Attachment, Key, Lease, Network
from towpath.plan import EnsureBridge, Plan
from towpath.store.contract import Absent, Delete, Put, Store
from towpath.unbroken import to_its_end

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

    def __init__(self, store: Store, kernel: Kernel, plug: Callable[[Network], Awaitable[None]]) -> None:
        """plug: called when a device was made, to join to it what had been joined to one that went."""
        self.store = store
        self.kernel = kernel
        self._plug = plug
        self.rows: dict[str, Network] = {}
        self.up: set[str] = set()
        self._devices = asyncio.Lock()  # making, mending and dropping of shared devices go one after the other
        self.devices: dict[str, LinkSeen] = {}  # the shared device of each network that is up, as last seen
        self.allocators: dict[str, Allocator] = {}
        self._held: Counter[str] = Counter()  # ADDs under way, by network: they have no record yet that tells

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
        if known.source == "cni" and not (in_use or self._held[wanted.name]):
            return await self.replace(known, wanted)
        if known.source == "cni" and wanted.force_address:
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

    async def replace(self, known: Network, wanted: Network) -> Network:
        """The row of an unused network says something else now: what its old device was made for goes with it."""
        async with self._devices:
            if mode.get(known.mode).plan_network(known) != mode.get(wanted.mode).plan_network(wanted):
                await to_its_end(self._drop_device(known))
            return await self.save(wanted)

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

    async def check_fits(self, network: Network) -> None:
        """A network that an administrator makes must go with the node's own devices and addresses as they are."""
        seen = await self.kernel.look()
        if reason := mode.get(network.mode).check_network(network, seen):
            raise Conflict(reason, hint="choose another bridge name")
        for device, address in seen.addresses:
            for subnet in subnets(network):
                if device != network.device and address.ip in subnet:
                    raise Conflict(
                        f"subnet {subnet} holds {address.ip}, which is this node's own address on {device}",
                        hint="choose a subnet that nothing on this node is in",
                    )

    # --- the shared device ----------------------------------------------------------------------------------------

    async def bring_up(self, network: Network) -> None:
        """The bridge is there with its addresses. Cheap when it was brought up before; see also `forget`."""
        if network.name not in self.up:
            async with self._devices:
                await to_its_end(self._bring_up(network))

    async def _bring_up(self, network: Network) -> None:
        kind = mode.get(network.mode)
        seen = await self.kernel.look()
        if reason := kind.check_network(network, seen):
            raise BadConfig(reason, hint="choose another bridge name; forceAddress replaces an address, never a device")
        if network.force_address:
            await self.kernel.apply(kind.replace_addresses(network, seen))
        await self.kernel.apply(kind.plan_network(network))
        if kind.home(network) and seen.link(kind.home(network)) is None:
            await self._plug(network)  # who hung on the one that went hangs on the new one
        device = await self.kernel.link(kind.home(network)) if kind.home(network) else None
        if device is not None:
            self.devices[network.name] = device
        self.up.add(network.name)

    async def reason_not_ready(self, network: Network) -> None:
        """Raise Unavailable where an ADD could not work now (CNI STATUS)."""
        if reason := mode.get(network.mode).check_network(network, await self.kernel.look()):
            raise Unavailable(reason)
        if network.pools and network.name in self.rows:  # of one that is still to be made, every address is free
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

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """While this lasts the network is not dropped (one whose drop has begun goes: see `stay`)."""
        self._held[name] += 1
        try:
            yield
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    async def stay(self, network: Network) -> None:
        """The row is there, also where a GC took it since the caller, who holds it, read it."""
        if network.name in self.rows:
            return
        async with self._devices:
            if network.name not in self.rows and network.source == "cni":
                await self.save(network)
        self.get(network.name)

    async def drop(self, name: str, in_use: Callable[[str], bool]) -> bool:
        """Row, cursor and shared device go; False where something is attached, or an ADD is under way."""
        async with self._devices:
            if in_use(name) or self._held[name]:
                return False
            network = self.get(name)
            self.rows.pop(name)  # first: an ADD that comes meanwhile waits for the lock and makes it anew
            self.allocators.pop(name, None)
            self.up.discard(name)
            try:
                await to_its_end(self._drop(network))
            except Exception:
                self.rows[name] = network  # its row is there still: it can be dropped again
                raise
        return True

    async def _drop(self, network: Network) -> None:
        name = network.name
        await self.store.txn((), (Delete(lease_row(name, ""), prefix=True), Delete(f"cursors/{name}")))
        await self._drop_device(network)
        await self.store.delete(row(name))  # last: a crash before it leaves a network that can be dropped again

    async def _drop_device(self, network: Network) -> None:
        """The device goes if it is of our making; another network's, or one with a port of somebody else's, stays."""
        kind = mode.get(network.mode)
        device = kind.home(network)
        others = (other for other in self.rows.values() if other.name != network.name)
        if not device or any(mode.get(other.mode).home(other) == device for other in others):
            return
        seen = await self.kernel.look()
        link = seen.link(device)
        ports = any(port.master == device for port in seen.links)
        if link is not None and not ports and made_by(kind.plan_network(network), link):
            await self.kernel.apply(kind.plan_drop_network(network))


def made_by(plan: Plan, seen: LinkSeen) -> bool:
    """Whether that bridge is of our making. A death before it was marked leaves the address that only we choose."""
    macs = {op.mac for phase in plan for op in phase.ops if isinstance(op, EnsureBridge)}
    return seen.kind == "bridge" and (seen.alias == "towpath" or (not seen.alias and seen.mac in macs))


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
