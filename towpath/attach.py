"""The one way in: claim, plan, apply, mark. Undo, DEL, crash recovery and GC are one function: `detach`.

    add      claim rows in one transaction → plan (pure) → apply in the kernel → mark attached
    detach   mark detaching → apply plan_detach(record) → release the rows

A record is made of parts (see model.Attachment): a chain of plug-ins adds them one after the other under the same key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from errno import EEXIST, ENODEV

from towpath import checking, claims, mode, schema
from towpath.errors import Conflict, PhaseFailed, TowpathError
from towpath.kernel.contract import Kernel
from towpath.keylock import KeyLocks
from towpath.mode import Node
from towpath.model import Attachment, Foreign, Given, InNetns, Key, Lease, Network, Request, Take
from towpath.networks import Networks, adopted
from towpath.parts import ports, rules, shape, tuning
from towpath.plan import Plan, Rule
from towpath.store.contract import Delete, Put, Store
from towpath.unbroken import to_its_end

log = logging.getLogger(__name__)

DETACHED_AT_ONCE = 64  # by a GC or after a start: they share transactions and the kernel's grace periods
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
        self.networks = Networks(store, kernel, self._plug)
        self.records: dict[Key, Attachment] = {}
        self.standing: Callable[[], Iterable[Rule]] = tuple  # the node's own rules: no attachment brings or takes them
        self.timings = kernel.timings
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
            with self.networks.held(request.network.name):
                return await self._add(request)

    async def detach(self, key: Key, parts: tuple[str, ...] = ()) -> None:
        """Take these parts away (() = all). What is gone already is success; what was never there too."""
        async with self._alone(key):
            await self._wait_for_deferred(key)
            record = self.records.get(key)
            if record is None:
                return
            going = leaving(record, parts)
            if going:
                await to_its_end(self._release(record, going, defer=record.deferred_delete))

    async def _wait_for_deferred(self, key: Key) -> None:
        if key in self._later:
            await asyncio.wait({self._later[key]})

    async def find(self, key: Key) -> Attachment | None:
        return self.records.get(key)

    def attachments(self, prefix: str = "") -> list[Attachment]:
        """In order of their keys; prefix of `origin/network/container/ifname`."""
        return [self.records[key] for key in sorted(self.records) if str(key).startswith(prefix)]

    # --- add: its steps -------------------------------------------------------------------------------------------

    async def _add(self, request: Request) -> Attachment:
        if "wire" in request.parts or isinstance(request.address, Take):
            await self.networks.stay(request.network)
        if "wire" in request.parts:
            with self.timings.measure("network"):
                await self.networks.bring_up(request.network)
        with self.timings.measure("claim"):
            fresh, whole, before = await self._claim(request)
        try:
            await to_its_end(self._apply(fresh, request.network))
            with self.timings.measure("mark"):
                return await self._save(replace(whole, phase="attached", making=()), known=before)
        except (Exception, asyncio.CancelledError):
            self.timings.counts["failed add"] += 1
            await to_its_end(self._undo(whole, fresh.parts))
            raise

    async def _make_way(self, request: Request) -> None:
        """An earlier attachment of the same key: alive → Conflict; dead, or other parts of a chain → fine."""
        await self._wait_for_deferred(request.key)
        old = self.records.get(request.key)
        if old is None:
            return
        if old.phase == "claimed" and old.making:  # an earlier call for these parts could not even be undone
            await to_its_end(self._release(old, old.making))
            old = self.records[request.key]
        again = tuple(part for part in request.parts if part in old.parts)
        if not again and old.phase == "attached":
            return
        if old.phase == "attached" and set(again) & {"wire", "address"} and await self.alive(old):
            what = ", ".join(str(lease.address) for lease in old.leases) or "no address"
            raise Conflict(
                f"{request.key} is attached already ({what}): duplicate allocation is not allowed",
                hint=f"delete it first (CNI DEL), or: towpath attach rm {request.key}",
            )
        await to_its_end(self._release(old, leaving(old, again or old.parts)))

    async def alive(self, record: Attachment) -> bool:
        """Whether the container that the record was made for still has its namespace or wire."""
        if record.netns and record.netns_id and self.kernel.netns_id(record.netns) == record.netns_id:
            return True
        return bool(record.veth) and await self.kernel.link(record.veth) is not None

    async def _claim(self, request: Request) -> tuple[Attachment, Attachment, bytes]:
        """Rows first. Returns (the parts of this call alone, the whole record, its row as it was before)."""
        leases = await self._leases(request)
        try:
            fresh = await self._record(request, leases)
            old = self.records.get(request.key)
            whole = claims.merge(old, fresh) if old else fresh
            rows = claims.rows(fresh)
            await claims.refuse_clashes(self.store, fresh)
            cursor = await self._cursor(request, leases)
            row = claims.attachment_row(request.key)
            kept = await self.store.get(row) if old else None
            put = Put(row, schema.rewrite(kept.value if kept else None, whole))
            result = await self.store.txn(claims.unclaimed(rows), (*rows, *cursor, put))
            if not result.ok:
                raise await claims.taken(self.store, tuple(rows[i] for i in result.failed))
        except (Exception, asyncio.CancelledError):
            await self._abandon(request, leases)
            raise
        if isinstance(request.address, Take):
            (await self.networks.allocator(request.network)).commit(leases, str(request.key))
        self.records[request.key] = whole
        return fresh, whole, kept.value if kept else b""

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
        try:
            await self.kernel.apply(links + firewall)
        except PhaseFailed as failed:
            if not await self._mended(failed, fresh, network):
                raise
            await self.kernel.apply(links + firewall)

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

    async def _save(self, record: Attachment, known: bytes | None = None) -> Attachment:
        """known: the row as it stood before this call; None = read it first."""
        row = claims.attachment_row(record.key)
        if known is None:
            old = await self.store.get(row)
            known = old.value if old else None
        await self.store.txn((), (Put(row, schema.rewrite(known or None, record)),))
        self.records[record.key] = record
        return record

    # --- detach: its steps ----------------------------------------------------------------------------------------

    async def _release(self, record: Attachment, going: tuple[str, ...], *, defer: bool = False) -> None:
        """Kernel first, rows last: whatever fails in between is found again by its rows."""
        gone = replace(record, parts=going, netns=record.netns if self._same_netns(record) else "")
        if set(going) != set(record.parts):
            self.records[record.key] = replace(record, phase="claimed", making=going)
        elif record.phase != "detaching":
            record = await self._mark_detaching(record)
        try:
            await self._take_away(record, gone, defer=defer)
        except BaseException:
            self.records[record.key] = record
            raise

    def _same_netns(self, record: Attachment) -> bool:
        """Whether the path still leads to the namespace of the record: another one there is somebody else's."""
        return bool(record.netns_id) and self.kernel.netns_id(record.netns) == record.netns_id

    async def _take_away(self, record: Attachment, gone: Attachment, *, defer: bool) -> None:
        firewall, links = plan_detach(gone)
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
        await self.kernel.apply(links)
        row = claims.attachment_row(record.key)
        left = claims.without(record, gone.parts)
        old = await self.store.get(row)
        last = Put(row, schema.rewrite(old.value if old else None, left)) if left.parts else Delete(row)
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
        return await checking.problems(self.kernel, record, self.networks, parts or record.parts)

    async def _plug(self, network: Network) -> None:
        """The network's device was made anew: the wires that hung on it are joined to it again."""
        kind = mode.get(network.mode)
        for record in list(self.records.values()):
            if record.key.network == network.name and record.phase == "attached" and "wire" in record.parts:
                await self.kernel.apply(kind.plan_plug(record, network) + ports.plan_localnet(record))

    async def gc(self, origin: str, network: str, keep: frozenset[tuple[str, str]], caller: str) -> tuple[str, ...]:
        """Detach what this network holds beyond `keep` (container, ifname); returns what went wrong, in words.

        One that lives and came from another caller stays: two runtimes may share a network.
        """
        going: list[Attachment] = []
        for record in list(self.records.values()):
            key = record.key
            if key.origin != origin or key.network != network or (key.container, key.ifname) in keep:
                continue
            if key in self._alone:  # its ADD or DEL is under way: the list is older than that
                continue
            if caller and record.caller and record.caller != caller and await self.alive(record):
                continue
            going.append(record)
        problems = await self._detach_each(going)
        await self.settle()
        row = self.networks.rows.get(network)
        if row is not None and row.source == "cni" and not problems:
            await self.networks.drop(network, self.in_use)  # not dropped = somebody joined it just now
        return tuple(problems)

    async def _detach_each(self, records: Iterable[Attachment]) -> list[str]:
        """Detach them, many at once; in words what failed: one that cannot go keeps no other back."""
        room = asyncio.Semaphore(DETACHED_AT_ONCE)
        outcomes = await asyncio.gather(*(self._detach_one(record, room) for record in records))
        return [failed for failed in outcomes if failed]

    async def _detach_one(self, record: Attachment, room: asyncio.Semaphore) -> str:
        async with room:
            now = self.records.get(record.key)
            if now is None or now.created != record.created:
                return ""  # gone meanwhile, perhaps made anew
            try:
                await self.detach(record.key)
            except Exception as exc:  # every other attachment still gets its turn
                trace = not isinstance(exc, TowpathError)
                log.error("could not detach", exc_info=trace, extra={"attachment": str(record.key), "error": str(exc)})
                return f"{record.key}: {exc}"
        return ""

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
        going = []
        for record in list(self.records.values()):
            known = record.boot == self.setting.boot and await self._lives_or_unknown(record)
            if known and record.phase == "attached":
                continue
            log.warning("reclaimed", extra={"attachment": str(record.key), "phase": record.phase})
            if known and record.phase == "claimed" and record.making:
                await self._give_up(record)
            else:
                going.append(record)
        failed = await self._detach_each(going)
        return len(going) - len(failed)

    async def _give_up(self, record: Attachment) -> None:
        """A plug-in of a chain was cut short: its parts go, those of the plug-ins before it live on."""
        async with self._alone(record.key):
            await to_its_end(self._undo(record, record.making))

    async def sweep(self) -> int:
        """Detach what died without a DEL: neither its namespace nor its wire is there any more. Returns how many."""
        wired = [r for r in list(self.records.values()) if r.phase == "attached" and "wire" in r.parts]
        dead = [record for record in wired if not await self._lives_or_unknown(record)]
        for record in dead:
            log.warning("died without a DEL", extra={"attachment": str(record.key)})
        failed = await self._detach_each(dead)
        return len(dead) - len(failed)

    async def _lives_or_unknown(self, record: Attachment) -> bool:
        return not record.netns or not record.netns_id or await self.alive(record)

    def in_use(self, network: str) -> bool:
        return any(key.network == network for key in self.records)

    # --- networks -------------------------------------------------------------------------------------------------

    async def network(self, wanted: Network, given: frozenset[str] | None = None) -> Network:
        """The row for a runtime's configuration (see Networks.want); reservations of host-local are adopted with it."""
        if wanted.name not in self.networks.rows:
            async with self._alone(wanted.name):  # others that name it first wait for its reservations too
                if wanted.name not in self.networks.rows:
                    await self._adopt(wanted)  # before the row: cut short, it is done again
        return await self.networks.want(wanted, given, self.in_use(wanted.name))

    @asynccontextmanager
    async def joined(self, wanted: Network, given: frozenset[str] | None = None) -> AsyncIterator[Network]:
        """The same for as long as the body takes: where it fails, the row and its device are as they were before."""
        before = self.networks.rows.get(wanted.name)
        row = await self.network(wanted, given)
        try:
            yield row
        except BaseException:
            if row is not before:
                await to_its_end(self._leave(row, before))
            raise

    async def _leave(self, row: Network, before: Network | None) -> None:
        """The caller hears why the call failed; an unused row that could not go now goes with the next GC."""
        try:
            if self.networks.rows.get(row.name) is not row or self.in_use(row.name):
                return
            if before is None:
                await self.networks.drop(row.name, self.in_use)
            else:
                await self.networks.want(before, None, in_use=False)
        except TowpathError as failed:
            log.error("network could not be put back", extra={"network": row.name, "error": str(failed)})

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
        await self.networks.check_fits(network)
        async with self._alone(network.name):
            if network.name not in self.networks.rows:
                await self._adopt(network)
            return await self.networks.create(network)

    async def drop_network(self, name: str) -> None:
        """Conflict while anything is attached to it."""
        self.networks.get(name)
        if users := [str(key) for key in sorted(self.records) if key.network == name]:
            more = f" and {len(users) - 3} more" if len(users) > 3 else ""
            raise Conflict(
                f"network {name!r} is in use by {', '.join(users[:3])}{more}",
                hint=f"stop those containers, or remove their attachments: towpath attach rm {users[0]}",
            )
        if self.networks.rows[name].source == "yaml":
            raise Conflict(f"network {name!r} comes from the configuration file", hint="remove it there and restart")
        if not await self.networks.drop(name, self.in_use):
            raise Conflict(f"network {name!r} is in use by an ADD that is under way", hint="try again")

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

    async def settle(self) -> None:
        """Wait until every deferred delete is done."""
        if self._later:
            await asyncio.wait(set(self._later.values()))
