"""The one way in: claim, plan, apply, mark. Undo, DEL, crash recovery and GC are one function: `detach`.

    add      claim rows in one transaction → plan (pure) → apply in the kernel → mark attached
    detach   mark detaching → apply plan_detach(record) → release the rows

A record is made of parts (see model.Attachment): a chain of plug-ins adds them one after the other under the same key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from errno import EEXIST, ENODEV

from towpath import claims, mode, schema
from towpath.errors import Conflict, NotFound, PhaseFailed, TowpathError
from towpath.kernel.contract import Kernel
from towpath.keylock import KeyLocks
from towpath.mode import Node
from towpath.model import Attachment, Foreign, Given, InNetns, Key, Lease, Network, Request, Take
from towpath.networks import Networks, adopted
from towpath.parts import ports, rules, shape, tuning
from towpath.plan import Plan, Rule
from towpath.store.contract import Delete, Put, Store
from towpath.timings import Timings

log = logging.getLogger(__name__)

ADOPTED_AT_ONCE = 200  # reservations in one transaction: a few milliseconds during which nobody else is served


@dataclass(frozen=True, slots=True)
class Setting:
    """What of the configuration an attachment depends on."""

    firewall: str  # name of the back end in use: "nftables" or "iptables"
    boot: str  # /proc/sys/kernel/random/boot_id


def plan_add(record: Attachment, network: Network) -> tuple[Plan, Plan]:
    """(links, firewall) of the parts that `record` names."""
    links: Plan = ()
    if "wire" in record.parts:
        links += mode.get(record.mode).plan_attach(record, network)
    if "bandwidth" in record.parts:
        links += shape.plan_shape(record, network.mtu)
    if "tuning" in record.parts:
        links += tuning.plan_tune(record)
    if "ports" in record.parts:
        links += ports.plan_localnet(record)
        return links, rules.plan_rules(record) + ports.plan_forget(record)
    return links, rules.plan_rules(record)


def plan_detach(record: Attachment) -> tuple[Plan, Plan]:
    """(firewall, links) that take away the parts that `record` names; asks neither the netns nor the network's row."""
    firewall = rules.plan_drop_rules(record)
    links: Plan = ()
    if "ports" in record.parts:
        firewall += ports.plan_forget(record)
    if "bandwidth" in record.parts:
        links += shape.plan_unshape(record)
    if "tuning" in record.parts:
        links += tuning.plan_untune(record)
    if "wire" in record.parts and record.mode:
        links += mode.get(record.mode).plan_detach(record)
    return firewall, links


def leaving(record: Attachment, parts: Iterable[str]) -> tuple[str, ...]:
    """Which parts go when these are asked to: whatever stands on an address or a wire goes with it."""
    asked = set(parts) or set(record.parts)
    if asked & {"wire", "address"}:
        asked = set(record.parts)
    return tuple(part for part in record.parts if part in asked)


class Attacher:
    """Attachments of this node. Public methods raise TowpathError only; one key is worked on by one call at a time."""

    def __init__(self, store: Store, kernel: Kernel, node: Node, setting: Setting) -> None:
        self.store = store
        self.kernel = kernel
        self.node = node
        self.setting = setting
        self.networks = Networks(store, kernel)
        self.records: dict[Key, Attachment] = {}
        self.standing: Callable[[], Iterable[Rule]] = tuple  # the node's own rules: no attachment brings or takes them
        self.timings = Timings()
        self._alone = KeyLocks()
        self._later: dict[Key, asyncio.Task[None]] = {}  # deferred deletes that have answered and are not done yet

    # --- the verbs ------------------------------------------------------------------------------------------------

    async def add(self, request: Request) -> Attachment:
        """Make the parts that the request names; nothing is left where it fails.

        Raises Conflict (already attached; port, address or name taken: the owner is named), PoolEmpty, BadConfig,
        PhaseFailed.
        """
        async with self._alone(request.key):
            await self._make_way(request)
            if "wire" in request.parts:
                with self.timings.measure("network"):
                    await self.networks.bring_up(request.network)
            with self.timings.measure("claim"):
                fresh, whole = await self._claim(request)
            try:
                await self._apply(fresh, request.network)
                with self.timings.measure("mark"):
                    return await self._save(replace(whole, phase="attached"))
            except (Exception, asyncio.CancelledError):
                self.timings.counts["failed add"] += 1
                await asyncio.shield(self._undo(whole, fresh.parts))
                raise

    async def detach(self, key: Key, parts: tuple[str, ...] = ()) -> None:
        """Take these parts away (() = all). What is gone already is success; what was never there too."""
        async with self._alone(key):
            await self._wait_for_deferred(key)
            record = self.records.get(key)
            if record is None:
                return
            going = leaving(record, parts)
            if going:
                await asyncio.shield(self._release(record, going, defer=record.deferred_delete))

    async def _wait_for_deferred(self, key: Key) -> None:
        if key in self._later:
            await asyncio.wait({self._later[key]})

    async def find(self, key: Key) -> Attachment | None:
        return self.records.get(key)

    def attachments(self, prefix: str = "") -> list[Attachment]:
        """In order of their keys; prefix of `origin/network/container/ifname`."""
        return [self.records[key] for key in sorted(self.records) if str(key).startswith(prefix)]

    # --- add: its steps -------------------------------------------------------------------------------------------

    async def _make_way(self, request: Request) -> None:
        """An earlier attachment of the same key: alive → Conflict; dead, or other parts of a chain → fine."""
        await self._wait_for_deferred(request.key)
        old = self.records.get(request.key)
        if old is None:
            return
        again = tuple(part for part in request.parts if part in old.parts)
        if not again and old.phase == "attached":
            return
        if old.phase == "attached" and set(again) & {"wire", "address"} and await self.alive(old):
            what = ", ".join(str(lease.address) for lease in old.leases) or "no address"
            raise Conflict(
                f"{request.key} is attached already ({what}): duplicate allocation is not allowed",
                hint=f"delete it first (CNI DEL), or: towpath attach rm {request.key}",
            )
        await self._release(old, leaving(old, again or old.parts))

    async def alive(self, record: Attachment) -> bool:
        """Whether the container that the record was made for still has its namespace or wire."""
        if record.netns and record.netns_id and self.kernel.netns_id(record.netns) == record.netns_id:
            return True
        return bool(record.veth) and await self.kernel.link(record.veth) is not None

    async def _claim(self, request: Request) -> tuple[Attachment, Attachment]:
        """Rows first. Returns (the parts of this call alone, the whole record)."""
        leases = await self._leases(request)
        try:
            fresh = await self._record(request, leases)
            old = self.records.get(request.key)
            whole = claims.merge(old, fresh) if old else fresh
            rows = claims.rows(fresh)
            await claims.refuse_clashes(self.store, fresh)
            cursor = await self._cursor(request, leases)
            result = await self.store.txn(
                claims.unclaimed(rows),
                (*rows, *cursor, Put(claims.attachment_row(request.key), schema.rewrite(None, whole))),
            )
            if not result.ok:
                raise await claims.taken(self.store, tuple(rows[i] for i in result.failed))
        except (Exception, asyncio.CancelledError):
            await self._abandon(request, leases)
            raise
        if isinstance(request.address, Take):
            (await self.networks.allocator(request.network)).commit(leases, str(request.key))
        self.records[request.key] = whole
        return fresh, whole

    async def _leases(self, request: Request) -> tuple[Lease, ...]:
        if isinstance(request.address, Take):
            return (await self.networks.allocator(request.network)).choose(request.address)
        if isinstance(request.address, Given):
            return request.address.leases
        old = self.records.get(request.key)
        return old.leases if old else ()

    async def _abandon(self, request: Request, leases: tuple[Lease, ...]) -> None:
        if isinstance(request.address, Take):
            (await self.networks.allocator(request.network)).abandon(leases)

    async def _cursor(self, request: Request, leases: tuple[Lease, ...]) -> tuple[Put, ...]:
        """Where the pools' round robin stands, so that a restart does not hand out what was just released."""
        if not isinstance(request.address, Take) or not leases:
            return ()
        allocator = await self.networks.allocator(request.network)
        return (Put(f"cursors/{request.network.name}", allocator.cursor(leases)),)

    async def _record(self, request: Request, leases: tuple[Lease, ...]) -> Attachment:
        key, network, place, parts = request.key, request.network, request.place, request.parts
        wire = "wire" in parts
        path = place.path if isinstance(place, InNetns | Foreign) else ""
        home, veth = (place.home, place.veth) if isinstance(place, Foreign) else ("", "")
        before = await self._before(request, path) if "tuning" in parts else ()
        return Attachment(
            key,
            mode=network.mode if wire else "",
            parts=parts,
            netns=path,
            netns_id=self.kernel.netns_id(path) if path else 0,
            veth=key.veth() if wire else veth,
            home=mode.get(network.mode).home(network) if wire else home,
            mac=(request.mac or key.mac()) if wire else request.mac,
            leases=leases,
            routes=request.routes or network.routes,
            dns=request.dns or network.dns,
            masquerade=network.masquerade and wire,
            isolation=request.isolation,
            spoof_check=network.spoof_check and wire,
            ports=request.ports,
            port_rules=request.port_rules,
            bandwidth=request.bandwidth,
            tuning=replace(request.tuning, before=before),
            deferred_delete=network.deferred_delete and wire,
            ipam=request.address.ipam if isinstance(request.address, Given) else "",
            caller=request.caller,
            boot=self.setting.boot,
            firewall=self.setting.firewall,
            labels=request.labels,
            aliases=request.aliases,
            name=request.name,
            created=time.time(),
        )

    async def _before(self, request: Request, path: str) -> tuple[tuple[str, str], ...]:
        """What tuning is about to change, as it is now."""
        values = [(p, await self.kernel.sysctl(p, path)) for p, _ in request.tuning.sysctl]
        found = [(p, value) for p, value in values if value is not None]
        link = await self.kernel.link(request.key.ifname, path)
        if link is not None:
            found += [("mac", link.mac), ("mtu", str(link.mtu)), ("promisc", str(int(link.promiscuous)))]
            found += [("allmulti", str(int(link.allmulti))), ("txQLen", str(link.tx_queue))]
        return tuple(found)

    async def _apply(self, fresh: Attachment, network: Network) -> None:
        links, firewall = plan_add(fresh, network)
        with self.timings.measure("links"):
            try:
                await self.kernel.apply(links)
            except PhaseFailed as failed:
                if not await self._mended(failed, fresh, network):
                    raise
                await self.kernel.apply(links)
        with self.timings.measure("firewall"):
            await self.kernel.apply(firewall)

    async def _mended(self, failed: PhaseFailed, fresh: Attachment, network: Network) -> bool:
        """Whether it is worth a second try: the bridge was taken away, or a deferred delete still holds the name."""
        if "wire" not in fresh.parts or not await self._nothing_made(fresh):
            return False
        if failed.errno == ENODEV and network.name in self.networks.up:
            self.networks.up.discard(network.name)
            await self.networks.bring_up(network)
            return True
        if failed.errno == EEXIST and self._later:
            await self.settle()
            return True
        return False

    async def _nothing_made(self, fresh: Attachment) -> bool:
        return await self.kernel.link(fresh.veth) is None

    async def _undo(self, whole: Attachment, parts: tuple[str, ...]) -> None:
        """The caller hears why the ADD failed; what its undo could not do is found again by the row."""
        try:
            await self._release(whole, parts)
        except TowpathError as failed:
            log.error("undo failed", extra={"attachment": str(whole.key), "error": str(failed)})

    async def _save(self, record: Attachment) -> Attachment:
        row = claims.attachment_row(record.key)
        old = await self.store.get(row)
        await self.store.txn((), (Put(row, schema.rewrite(old.value if old else None, record)),))
        self.records[record.key] = record
        return record

    # --- detach: its steps ----------------------------------------------------------------------------------------

    async def _release(self, record: Attachment, going: tuple[str, ...], *, defer: bool = False) -> None:
        """Kernel first, rows last: whatever fails in between is found again by its rows."""
        gone = replace(record, parts=going)
        if going == record.parts and record.phase != "detaching":
            record = await self._mark_detaching(record)
        firewall, links = plan_detach(gone)
        with self.timings.measure("undo firewall"):
            await self.kernel.apply(firewall)
        if defer and links:
            task = asyncio.create_task(self._finish(record, gone, links))
            self._later[record.key] = task
            task.add_done_callback(lambda done: self._deferred(record.key, done))
        else:
            await self._finish(record, gone, links)

    def _deferred(self, key: Key, done: asyncio.Task[None]) -> None:
        self._later.pop(key, None)
        if not done.cancelled() and (failed := done.exception()):
            # The row says "detaching": the next DEL, GC or start tries again.
            log.error("deferred delete failed", extra={"attachment": str(key), "error": str(failed)})

    async def _mark_detaching(self, record: Attachment) -> Attachment:
        record = replace(record, phase="detaching")
        self.records[record.key] = record
        row = claims.attachment_row(record.key)
        old = await self.store.get(row)
        if old is not None:
            await self.store.txn((), (Put(row, schema.rewrite(old.value, record)),), releasing=True)
        return record

    async def _finish(self, record: Attachment, gone: Attachment, links: Plan) -> None:
        with self.timings.measure("undo links"):
            await self.kernel.apply(links)
        row = claims.attachment_row(record.key)
        left = claims.without(record, gone.parts)
        last = Put(row, schema.rewrite(None, left)) if left.parts else Delete(row)
        drops = tuple(Delete(put.key) for put in claims.rows(gone))
        await self.store.txn((), (*drops, last), releasing=True)
        if left.parts:
            self.records[record.key] = left
        else:
            self.records.pop(record.key, None)
        allocator = self.networks.allocators.get(record.key.network)
        if allocator is not None and "address" in gone.parts:
            allocator.release(gone.leases)

    # --- the rest of life -----------------------------------------------------------------------------------------

    async def check(self, key: Key, parts: tuple[str, ...] = ()) -> tuple[str, ...]:
        """In words, how the kernel differs from what the record says of these parts; () = it does not."""
        record = self.records.get(key)
        if record is None:
            return (f"{key} is not attached",)
        asked = parts or record.parts
        problems = [f"{key} has no {part}" for part in asked if part not in record.parts]
        if "wire" in asked and "wire" in record.parts:
            node, inside = await self.kernel.look(), await self.kernel.look(record.netns)
            network = self.networks.get(key.network)
            problems += mode.get(record.mode).check(record, network, node, inside)
        held = replace(record, parts=tuple(part for part in record.parts if part in asked))
        problems += await self._missing_rules(held)
        if "bandwidth" in held.parts and not await self.kernel.shapes(record.veth):
            problems.append(f"bandwidth of {record.veth} is not limited")
        if "tuning" in held.parts:
            problems += await self._untuned(held)
        return tuple(problems)

    async def _untuned(self, record: Attachment) -> list[str]:
        tuned, ifname = record.tuning, record.key.ifname
        values = [(path, value, await self.kernel.sysctl(path, record.netns)) for path, value in tuned.sysctl]
        problems = [f"sysctl {path} is {now!r}, not {value!r}" for path, value, now in values if now != value]
        link = await self.kernel.link(ifname, record.netns)
        if link is None:
            return [*problems, f"interface {ifname} is missing in {record.netns}"]
        for what, wanted, now in (
            ("MAC", tuned.mac or link.mac, link.mac),
            ("MTU", tuned.mtu or link.mtu, link.mtu),
            ("promisc", link.promiscuous if tuned.promiscuous is None else tuned.promiscuous, link.promiscuous),
            ("allmulti", link.allmulti if tuned.allmulti is None else tuned.allmulti, link.allmulti),
            ("txQLen", tuned.tx_queue or link.tx_queue, link.tx_queue),
        ):
            if wanted != now:
                problems.append(f"{what} of {ifname} is {now}, not {wanted}")
        return problems

    async def _missing_rules(self, record: Attachment) -> list[str]:
        wanted = list(rules.rules(record))
        if not wanted:
            return []
        firewall = self.kernel.firewall(record.firewall)
        seen = await asyncio.to_thread(firewall.seen)
        return [
            f"firewall rule is missing: {firewall.describe(rule)}"
            for rule in wanted
            if not firewall.fingerprints([rule]) <= seen
        ]

    async def gc(self, origin: str, network: str, keep: frozenset[tuple[str, str]], caller: str) -> tuple[str, ...]:
        """Detach what this network holds beyond `keep` (container, ifname); returns what went wrong, in words.

        One that lives and came from another caller stays: two runtimes may share a network.
        """
        problems: list[str] = []
        for record in list(self.records.values()):
            key = record.key
            if key.origin != origin or key.network != network or (key.container, key.ifname) in keep:
                continue
            if caller and record.caller and record.caller != caller and await self.alive(record):
                continue
            try:
                await self.detach(key)
            except Exception as exc:  # every other attachment still gets its turn
                log.exception("gc could not detach", extra={"attachment": str(key)})
                problems.append(f"{key}: {exc}")
        await self.settle()
        row = self.networks.rows.get(network)
        if row is not None and row.source == "cni" and not self.in_use(network) and not problems:
            await self.networks.drop(network)
        return tuple(problems)

    async def load(self) -> None:
        """Read every row into memory. No write, neither to the store nor to the kernel."""
        await self.networks.load()
        for item in (await self.store.list("attachments/")).items:
            record = schema.read(Attachment, item.value)
            self.records[record.key] = record

    async def follow_firewall(self, setting: str) -> None:
        """With `auto`: when another manager takes over the host's filter table (or leaves it), move along.

        Records name their back end, so moving them is all: the next heal puts the rules in there and out here.
        """
        name = await asyncio.to_thread(self.kernel.pick_firewall, setting)
        if name != self.setting.firewall:
            log.warning("firewall back end changes", extra={"from": self.setting.firewall, "to": name})
            self.setting = replace(self.setting, firewall=name)
        for key in list(self.records):
            record = self.records.get(key)
            if record is not None and record.phase == "attached" and record.firewall not in ("", name):
                await self._save(replace(record, firewall=name))

    async def look_at_node(self) -> None:
        """The node's own addresses, as host mode reports them: neither loopback and link-local ones nor gateways."""
        seen = await self.kernel.look()
        ours = {link.name for link in seen.links if link.name == "lo" or link.alias == "towpath"}
        addresses = tuple(a for link, a in seen.addresses if link not in ours and not a.ip.is_link_local)
        self.node = replace(self.node, addresses=addresses)

    async def recover(self) -> int:
        """After a start: finish what a crash cut short, and reclaim what died meanwhile. Returns how many went."""
        gone = 0
        for record in list(self.records.values()):
            if record.phase == "attached" and record.boot == self.setting.boot and await self._lives_or_unknown(record):
                continue
            log.warning("reclaimed", extra={"attachment": str(record.key), "phase": record.phase})
            await self.detach(record.key)
            gone += 1
        return gone

    async def sweep(self) -> int:
        """Detach what died without a DEL: neither its namespace nor its wire is there any more. Returns how many."""
        dead = [r for r in list(self.records.values()) if r.phase == "attached" and "wire" in r.parts]
        gone = 0
        for record in dead:
            if not await self._lives_or_unknown(record) and self.records.get(record.key) is record:
                log.warning("died without a DEL", extra={"attachment": str(record.key)})
                await self.detach(record.key)
                gone += 1
        return gone

    async def _lives_or_unknown(self, record: Attachment) -> bool:
        return not record.netns or not record.netns_id or await self.alive(record)

    def in_use(self, network: str) -> bool:
        return any(key.network == network for key in self.records)

    # --- networks -------------------------------------------------------------------------------------------------

    async def network(self, wanted: Network, given: frozenset[str] | None = None) -> Network:
        """The row for a runtime's configuration (see Networks.want); reservations of host-local are adopted with it."""
        known = wanted.name in self.networks.rows
        row = await self.networks.want(wanted, given, self.in_use(wanted.name))
        if not known:
            await self._adopt(row)
        return row

    async def _adopt(self, network: Network) -> None:
        found = [r for r in await asyncio.to_thread(adopted, network, self.setting.boot) if r.key not in self.records]
        for start in range(0, len(found), ADOPTED_AT_ONCE):
            some = found[start : start + ADOPTED_AT_ONCE]
            if not await self._take_over(some):  # one of them is somebody's already: the others still come
                for record in some:
                    await self._take_over([record])
            await asyncio.sleep(0)  # other calls get their turn
        if found:
            self.networks.allocators.pop(network.name, None)
            log.info("adopted reservations of host-local", extra={"network": network.name, "found": len(found)})

    async def _take_over(self, records: list[Attachment]) -> bool:
        puts: dict[str, Put] = {}
        for record in records:
            row = Put(claims.attachment_row(record.key), schema.rewrite(None, record))
            puts.update((put.key, put) for put in (*claims.rows(record), row))
        everything = tuple(puts.values())
        if not (await self.store.txn(claims.unclaimed(everything), everything)).ok:
            return False
        self.records.update((record.key, record) for record in records)
        return True

    async def create_network(self, network: Network) -> Network:
        self.networks.check_free(network)
        made = await self.networks.create(network)
        await self._adopt(made)
        return made

    async def drop_network(self, name: str) -> None:
        """Conflict while anything is attached to it."""
        self.networks.get(name)
        if users := [str(key) for key in sorted(self.records) if key.network == name]:
            more = f" and {len(users) - 3} more" if len(users) > 3 else ""
            raise Conflict(
                f"network {name!r} is in use by {', '.join(users[:3])}{more}",
                hint="stop those containers, or remove their attachments: towpath attach rm KEY",
            )
        if self.networks.rows[name].source == "yaml":
            raise Conflict(f"network {name!r} comes from the configuration file", hint="remove it there and restart")
        await self.networks.drop(name)

    def list_networks(self) -> list[Network]:
        return [self.networks.rows[name] for name in sorted(self.networks.rows)]

    async def ready(self, network: Network) -> None:
        """Raises Unavailable or PoolEmpty where an ADD could not work now (CNI STATUS)."""
        await self.networks.reason_not_ready(network)

    async def usage(self) -> list[tuple[str, str, int, int, int]]:
        """(network, pool, size, used, free) of every pool."""
        found = []
        for network in self.list_networks():
            for text, size, used, free in (await self.networks.allocator(network)).usage():
                found.append((network.name, text, size, used, free))
        return found

    async def remove(self, text: str) -> None:
        """`towpath attach rm`: by the key as it is printed."""
        record = next((r for k, r in self.records.items() if str(k) == text), None)
        if record is None:
            raise NotFound(f"no attachment {text!r}", hint="see: towpath attach ls")
        await self.detach(record.key)

    async def settle(self) -> None:
        """Wait until every deferred delete is done."""
        if self._later:
            await asyncio.wait(set(self._later.values()))
