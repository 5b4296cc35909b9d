"""A kernel and a firewall in memory: they hold state that reads well, refuse as Linux does, and fail or die on demand.

kernel = FakeKernel(netns=("/run/netns/a",))
await kernel.apply(plan)
assert kernel.state["host"] == {...}     # or compare str(kernel) with a golden text
kernel.fail_on = AddAddress              # the next AddAddress raises PhaseFailed, once
kernel.fail_on = 3                       # the op that would be number 3 of kernel.log (from 1) does, once
kernel.die_after = 3                     # after three ops in kernel.log: Crash, a BaseException, as kill -9 would be
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fake_tunnel import FakeTunnel
from towpath.errors import BadNetns, PhaseFailed, Unavailable
from towpath.kernel.contract import LinkSeen, NetnsSeen, ShapeSeen, Wanted
from towpath.model import Address, Interface, Route
from towpath.plan import (
    AddAddress,
    AddFdb,
    AddNeighbour,
    AddPolicyRule,
    AddRoute,
    AddRule,
    AddVeth,
    Announce,
    DropAddress,
    DropFdb,
    DropLink,
    DropNeighbour,
    DropPolicyRule,
    DropRoute,
    DropRule,
    EnsureBridge,
    EnsureVxlan,
    FlushConntrack,
    ForgetNeighbours,
    Phase,
    Plan,
    PlugPort,
    PortVlans,
    Publish,
    Rule,
    SetLink,
    Shape,
    Sysctl,
    TunnelEntry,
    Unshape,
)
from towpath.timings import Timings

HOST_ID = 4026531840
NO_MAC = "00:00:00:00:00:00"


class Crash(BaseException):
    """The agent died here: nothing after this op was done, and no handler of ours ran."""


class RefusalError(OSError):
    """What a fake operation says: (errno, text). FakeKernel turns it into PhaseFailed with the place and the op."""


@dataclass
class Place:
    """One network namespace."""

    id: int
    links: dict[str, LinkSeen] = field(default_factory=dict)
    addresses: set[tuple[str, Interface]] = field(default_factory=set)
    routes: set[tuple[str, Route]] = field(default_factory=set)
    sysctls: dict[str, str] = field(default_factory=dict)
    neighbours: set[tuple[str, Address]] = field(default_factory=set)
    announced: list[Announce] = field(default_factory=list)
    shapes: dict[str, tuple[ShapeSeen, ...]] = field(default_factory=dict)
    vlans: dict[str, PortVlans] = field(default_factory=dict)
    peers: dict[str, tuple[int, str]] = field(default_factory=dict)  # name → (id of the peer's place, peer's name)
    ports: dict[str, str] = field(default_factory=dict)  # name → "hairpin", "isolated", both or ""
    vxlans: dict[str, EnsureVxlan] = field(default_factory=dict)
    tunnel: FakeTunnel = field(default_factory=FakeTunnel)

    def need(self, name: str) -> LinkSeen:
        if name not in self.links:
            raise RefusalError(errno.ENODEV, f'no link "{name}"')
        return self.links[name]

    def lines(self) -> set[str]:
        """The whole place, one readable line per thing."""
        found = set()
        for link in self.links.values():
            if link.name == "lo" and not link.up:
                continue
            words = ["link", link.name, link.kind or "-", link.mac, "up" if link.up else "down"]
            words += [f"master {link.master}"] if link.master else []
            words += [f"mtu {link.mtu}"] if link.mtu not in (1500, 65536) else []
            words += ["promisc"] if link.promiscuous else []
            words += ["allmulti"] if link.allmulti else []
            words += [self.ports[link.name]] if self.ports.get(link.name) else []
            found.add(" ".join(words))
        found |= {f"address {address} on {name}" for name, address in self.addresses}
        found |= {f"route {route_text(route)} on {name}" for name, route in self.routes}
        found |= {f"sysctl {path} = {value}" for path, value in self.sysctls.items()}
        found |= {
            f"shape {s.link} {s.kind} {s.rate} burst {s.burst}" for shapes in self.shapes.values() for s in shapes
        }
        found |= self.tunnel.lines()
        found |= {f"vlans {port} pvid {v.pvid} trunk {v.trunk}" for port, v in self.vlans.items()}
        return found


def route_text(route: Route) -> str:
    words = [str(route.dst)]
    for word, value in (
        ("via", route.gw),
        ("mtu", route.mtu),
        ("advmss", route.advmss),
        ("metric", route.priority),
        ("table", route.table),
    ):
        words += [f"{word} {value}"] if value else []
    words += [f"scope {route.scope}"] if route.scope is not None else []
    return " ".join(words)


class FakeFirewall:
    """Rules as a set; a commit is atomic; a published port that is taken refuses as a map of nftables does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rules: set[Rule] = set()
        self.commits = 0
        self.fail_next: int = 0  # an errno: the next commit raises it

    quick = True

    def commit(self, changes: tuple[object, ...]) -> int:
        if self.fail_next:
            number, self.fail_next = self.fail_next, 0
            raise PhaseFailed("firewall", changes, number)
        after = set(self.rules)
        for change in changes:
            if isinstance(change, AddRule):
                self._refuse_taken(change, after)
                after.add(change.rule)
            elif isinstance(change, DropRule):
                after.discard(change.rule)
            else:
                raise TypeError(f"{change} is no change of a firewall")
        self.rules = after
        self.commits += 1
        return 1

    @staticmethod
    def _refuse_taken(change: AddRule, rules: set[Rule]) -> None:
        rule = change.rule
        if not isinstance(rule, Publish):
            return
        for other in rules:
            if isinstance(other, Publish) and other != rule and other.to.version == rule.to.version:
                one, two = rule.port, other.port
                if (one.host_ip, one.host_port, one.proto) == (two.host_ip, two.host_port, two.proto):
                    raise PhaseFailed("firewall", change, errno.EEXIST)

    def seen(self) -> frozenset[object]:
        return frozenset(self.rules)

    def fingerprints(self, rules: Iterable[Rule]) -> frozenset[object]:
        return frozenset(rules)

    def heal(self, wanted: Iterable[Rule]) -> int:
        target = set(wanted)
        changed = len(target ^ self.rules)
        self.rules = target
        return changed

    def remove(self) -> None:
        self.rules.clear()

    def describe(self, rule: Rule) -> str:
        return str(rule)


class FakeKernel:
    """Implements towpath.kernel.contract.Kernel in memory. See the head of this file."""

    def __init__(self, netns: Iterable[str] = (), firewall: str = "nftables") -> None:
        self.host = Place(HOST_ID)
        self.host.links["lo"] = LinkSeen("lo", 1, "", NO_MAC, 65536, up=True)
        self.netns: dict[str, Place] = {}
        self.log: list[object] = []
        self.fail_on: type | int | None = None
        self.fail_errno = errno.EBUSY
        self.die_after: int | None = None
        self.setting = firewall
        self.managed = False  # somebody else's iptables rules decide about forwarding
        self.firewalls = {name: FakeFirewall(name) for name in ("nftables", "iptables")}
        self.missing_firewalls: set[str] = set()
        self.missing_sysctls = {"net/bridge"}  # prefixes of files that this kernel lacks
        self.flushed: list[FlushConntrack] = []
        self.closed = False
        self.timings = Timings()
        self._next = 2
        self._watchers: list[asyncio.Queue[str]] = []
        for path in netns:
            self.add_netns(path)

    # --- what a test does to it -------------------------------------------------------------------------------

    def add_netns(self, path: str) -> int:
        """A new namespace with a loopback device that is down; returns its id."""
        place = Place(HOST_ID + 100 + self._index())
        place.links["lo"] = LinkSeen("lo", 1, "", NO_MAC, 65536, up=False)
        self.netns[path] = place
        return place.id

    def drop_netns(self, path: str) -> None:
        """The namespace dies: its links and their peers go with it."""
        place = self.netns[path]
        for name in list(place.links):
            self._forget(place, name)
        del self.netns[path]

    def add_link(self, name: str, kind: str = "dummy", netns: str = "", up: bool = True) -> LinkSeen:
        """A link that somebody else made."""
        link = LinkSeen(name, self._index(), kind, "0a:00:00:00:00:01", 1500, up=up)
        self._place(netns).links[name] = link
        return link

    def change(self, what: str) -> None:
        """What `changes()` yields next: "firewall" or "links"."""
        for queue in self._watchers:
            queue.put_nowait(what)

    @property
    def rules(self) -> set[Rule]:
        """The rules of the back end in use."""
        return self.firewalls[self.pick_firewall(self.setting)].rules

    @property
    def state(self) -> dict[str, set[str]]:
        """Every place that holds something, as lines: "host", each netns path, "firewall"."""
        places = {"host": self.host.lines(), **{path: place.lines() for path, place in self.netns.items()}}
        places["firewall"] = {str(rule) for wall in self.firewalls.values() for rule in wall.rules}
        return {where: lines for where, lines in places.items() if lines}

    def __str__(self) -> str:
        return "\n".join(
            line for where, lines in sorted(self.state.items()) for line in (where, *(f"  {x}" for x in sorted(lines)))
        )

    # --- the contract -----------------------------------------------------------------------------------------

    async def apply(self, plan: Plan) -> None:
        for phase in plan:
            await asyncio.sleep(0)  # others run between phases, as with the real one
            if phase.where == "firewall":
                self._commit(phase)
                continue
            path = phase.netns if phase.where == "netns" else ""
            if path and path not in self.netns and phase.tolerant:
                continue
            place = self._place(path)
            for op in phase.ops:
                self._gate(phase, op)
                try:
                    self._HANDS[type(op)](self, place, op)
                except RefusalError as no:
                    raise PhaseFailed(phase.where, op, no.errno or 0, no.strerror or "") from None
                self.log.append(op)

    async def look(self, netns: str = "") -> NetnsSeen:
        place = self._place(netns)
        return NetnsSeen(
            tuple(sorted(place.links.values(), key=lambda link: link.index)),
            tuple(sorted(place.addresses, key=str)),
            tuple(sorted(place.routes, key=str)),
        )

    async def link(self, name: str, netns: str = "") -> LinkSeen | None:
        return self._place(netns).links.get(name)

    async def shapes(self, link: str) -> tuple[ShapeSeen, ...]:
        return self.host.shapes.get(link, ())

    async def tunnel_entries(self, link: str, table: int) -> frozenset[TunnelEntry]:
        routes = {AddRoute(name, route) for name, route in self.host.routes if route.table in (0, table)}
        return frozenset(self.host.tunnel.entries.values()) | routes

    async def route_device(self, address: Address) -> str:
        best, device = -1, ""
        for name, interface in self.host.addresses:
            if address in interface.network and interface.network.prefixlen > best:
                best, device = interface.network.prefixlen, name
        for name, route in self.host.routes:
            if address in route.dst and route.dst.prefixlen > best:
                best, device = route.dst.prefixlen, name
        return device

    async def sysctl(self, path: str, netns: str = "") -> str | None:
        place = self._place(netns)
        return place.sysctls.get(path, "0") if self._has_sysctl(place, path) else None

    def netns_id(self, path: str) -> int:
        return self.netns[path].id if path in self.netns else 0

    def own_netns_id(self) -> int:
        return self.host.id

    def firewall(self, name: str) -> FakeFirewall:
        if name in self.missing_firewalls or name not in self.firewalls:
            raise Unavailable(f"firewall back end {name!r} is not on this host")
        return self.firewalls[name]

    def pick_firewall(self, setting: str) -> str:
        return setting if setting != "auto" else "iptables" if self.managed else "nftables"

    async def touched(self, firewall: str) -> bool:
        return True

    async def heal(self, firewall: str, wanted: Callable[[], Wanted]) -> int:
        wall, asked = self.firewall(firewall), wanted()
        return wall.heal([*asked.settled, *(rule for rule in asked.moving if rule in wall.rules)])

    def route_changes(self) -> AsyncIterator[str]:
        return self.changes()

    async def changes(self) -> AsyncIterator[str]:
        queue: asyncio.Queue[str] = asyncio.Queue()
        self._watchers.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.remove(queue)

    async def close(self) -> None:
        self.closed = True

    # --- hands ------------------------------------------------------------------------------------------------

    def _gate(self, phase: Phase, op: object, ahead: int = 0) -> None:
        """Die or fail where the test said so; `ahead` = ops of the same transaction that are not in the log yet."""
        done = len(self.log) + ahead
        if self.die_after is not None and done >= self.die_after:
            self.die_after = None
            raise Crash(f"died before {op}")
        hit = isinstance(op, self.fail_on) if isinstance(self.fail_on, type) else self.fail_on == done + 1
        if self.fail_on is not None and hit:
            self.fail_on = None
            raise PhaseFailed(phase.where, op, self.fail_errno)

    def _commit(self, phase: Phase) -> None:
        for ahead, op in enumerate(phase.ops):
            self._gate(phase, op, ahead)
        self.firewall(phase.firewall or self.pick_firewall(self.setting)).commit(phase.ops)
        self.log.extend(phase.ops)

    def _index(self) -> int:
        self._next += 1
        return self._next

    def _place(self, netns: str) -> Place:
        if not netns:
            return self.host
        if netns not in self.netns:
            raise BadNetns(f"network namespace {netns!r} does not exist")
        return self.netns[netns]

    def _by_id(self, number: int) -> Place:
        return next(place for place in (self.host, *self.netns.values()) if place.id == number)

    def _forget(self, place: Place, name: str) -> None:
        """A link goes: with it its addresses, routes, settings, its ports' master, and a veth's other end."""
        if place.links.pop(name, None) is None:
            return
        place.addresses = {pair for pair in place.addresses if pair[0] != name}
        place.routes = {pair for pair in place.routes if pair[0] != name}
        place.neighbours = {pair for pair in place.neighbours if pair[0] != name}
        place.tunnel.forget(name)
        place.sysctls = {path: value for path, value in place.sysctls.items() if device_of(path) != name}
        place.links = {k: replace(v, master="") if v.master == name else v for k, v in place.links.items()}
        for table in (place.shapes, place.vlans, place.ports, place.vxlans):
            table.pop(name, None)
        if peer := place.peers.pop(name, None):
            self._forget(self._by_id(peer[0]), peer[1])

    def _has_sysctl(self, place: Place, path: str) -> bool:
        if any(path.startswith(prefix) for prefix in self.missing_sysctls):
            return False
        device = device_of(path)
        return not device or device in place.links

    def _ensure_bridge(self, place: Place, op: EnsureBridge) -> None:
        link = place.links.get(op.name)
        if link is None:
            mac = op.mac or "02:00:00:00:00:01"
            link = LinkSeen(op.name, self._index(), "bridge", mac, op.mtu or 1500, up=True, alias="towpath")
        elif link.kind != "bridge":
            raise RefusalError(errno.EEXIST, f'"{op.name}" already exists but is not a bridge')
        place.links[op.name] = replace(link, up=True, promiscuous=op.promiscuous or link.promiscuous)

    def _add_veth(self, place: Place, op: AddVeth) -> None:
        inside = self._place(op.netns)
        for where, name, text in ((place, op.name, ""), (inside, op.peer, f" in {op.netns}")):
            if name in where.links:
                raise RefusalError(errno.EEXIST, f'a link "{name}" already exists{text}')
        if op.master:
            place.need(op.master)
        near, far = self._index(), self._index()
        mtu = op.mtu or 1500
        place.links[op.name] = LinkSeen(
            op.name,
            near,
            "veth",
            op.host_mac or f"fe:00:00:00:00:{near % 256:02x}",
            mtu,
            True,
            op.master,
            far,
            False,
            "towpath",
        )
        inside.links[op.peer] = LinkSeen(op.peer, far, "veth", op.mac, mtu, up=False, peer_index=near)
        place.peers[op.name] = (inside.id, op.peer)
        inside.peers[op.peer] = (place.id, op.name)
        place.ports[op.name] = " ".join(w for w, on in (("hairpin", op.hairpin), ("isolated", op.isolated)) if on)

    def _ensure_vxlan(self, place: Place, op: EnsureVxlan) -> None:
        link = place.links.get(op.name)
        if link is not None and link.kind != "vxlan":
            raise RefusalError(errno.EEXIST, f'"{op.name}" already exists but is not a VXLAN device')
        if link is None or replace(op, mtu=0) != replace(place.vxlans[op.name], mtu=0):
            self._forget(place, op.name)
            link = LinkSeen(op.name, self._index(), "vxlan", op.mac, 1500, up=True, alias="towpath")
        place.links[op.name] = replace(link, up=True, mtu=op.mtu or link.mtu)
        place.vxlans[op.name] = op

    def _add_entry(self, place: Place, op: AddNeighbour | AddFdb) -> None:
        place.need(op.link)
        place.tunnel.add(op)

    def _add_policy_rule(self, place: Place, op: AddPolicyRule) -> None:
        place.tunnel.add(op)

    def _drop_entry(self, place: Place, op: DropNeighbour | DropFdb | DropPolicyRule) -> None:
        place.tunnel.drop(op)

    def _plug_port(self, place: Place, op: PlugPort) -> None:
        if op.name in place.links:
            place.need(op.master)
            place.links[op.name] = replace(place.links[op.name], master=op.master)
            flags = (("hairpin", op.hairpin), ("isolated", op.isolated))
            place.ports[op.name] = " ".join(word for word, on in flags if on)

    def _drop_link(self, place: Place, op: DropLink) -> None:
        self._forget(place, op.name)

    def _set_link(self, place: Place, op: SetLink) -> None:
        link = place.need(op.name)
        if op.master:
            place.need(op.master)
        wanted = {
            field: value
            for field in ("up", "mac", "mtu", "promiscuous", "allmulti", "tx_queue", "master")
            if (value := getattr(op, field)) is not None
        }
        place.links[op.name] = replace(link, **wanted)
        if op.up is False:
            place.routes = {pair for pair in place.routes if pair[0] != op.name}

    def _port_vlans(self, place: Place, op: PortVlans) -> None:
        place.need(op.port)
        place.vlans[op.port] = op

    def _add_address(self, place: Place, op: AddAddress) -> None:
        place.need(op.link)
        place.addresses.add((op.link, op.address))

    def _drop_address(self, place: Place, op: DropAddress) -> None:
        place.addresses.discard((op.link, op.address))

    def _add_route(self, place: Place, op: AddRoute) -> None:
        if not place.need(op.link).up:
            raise RefusalError(errno.ENETDOWN, "")
        if op.route.gw is not None and not reachable(place, op.link, op.route.gw):
            raise RefusalError(errno.ENETUNREACH, "")
        place.routes.add((op.link, op.route))

    def _drop_route(self, place: Place, op: DropRoute) -> None:
        place.routes.discard((op.link, op.route))

    def _sysctl(self, place: Place, op: Sysctl) -> None:
        if self._has_sysctl(place, op.path):
            place.sysctls[op.path] = op.value
        elif not op.optional:
            raise RefusalError(errno.ENOENT, "")

    def _announce(self, place: Place, op: Announce) -> None:
        place.announced.append(op)

    def _forget_neighbours(self, place: Place, op: ForgetNeighbours) -> None:
        place.neighbours -= {(op.link, address) for address in op.addresses}

    def _shape(self, place: Place, op: Shape) -> None:
        place.need(op.port)
        rates = op.bandwidth
        if rates.ingress_rate:
            place.shapes[op.port] = (ShapeSeen(op.port, "tbf", rates.ingress_rate, rates.ingress_burst),)
        if rates.egress_rate:
            mtu = op.mtu or 1500
            place.links[op.ifb] = LinkSeen(op.ifb, self._index(), "ifb", NO_MAC, mtu, True, alias="towpath")
            place.shapes[op.ifb] = (ShapeSeen(op.ifb, "tbf", rates.egress_rate, rates.egress_burst),)

    def _unshape(self, place: Place, op: Unshape) -> None:
        place.shapes.pop(op.port, None)

    def _flush_conntrack(self, place: Place, op: FlushConntrack) -> None:
        self.flushed.append(op)

    _HANDS: dict[type, Callable[[FakeKernel, Place, Any], None]] = {
        EnsureBridge: _ensure_bridge,
        AddVeth: _add_veth,
        PlugPort: _plug_port,
        DropLink: _drop_link,
        SetLink: _set_link,
        PortVlans: _port_vlans,
        AddAddress: _add_address,
        DropAddress: _drop_address,
        AddRoute: _add_route,
        DropRoute: _drop_route,
        EnsureVxlan: _ensure_vxlan,
        AddNeighbour: _add_entry,
        DropNeighbour: _drop_entry,
        AddFdb: _add_entry,
        DropFdb: _drop_entry,
        AddPolicyRule: _add_policy_rule,
        DropPolicyRule: _drop_entry,
        Sysctl: _sysctl,
        Announce: _announce,
        ForgetNeighbours: _forget_neighbours,
        Shape: _shape,
        Unshape: _unshape,
        FlushConntrack: _flush_conntrack,
    }


def device_of(path: str) -> str:
    """The link that a sysctl path speaks of: net/ipv4/conf/eth0/forwarding → eth0; "" for all, default and others."""
    parts = path.split("/")
    if len(parts) >= 5 and parts[0] == "net" and parts[2] in ("conf", "neigh") and parts[3] not in ("all", "default"):
        return parts[3]
    return ""


def reachable(place: Place, link: str, gateway: Address) -> bool:
    """Whether the kernel would take `gateway` as a next hop: link-local, in a subnet of the link, or routed on link."""
    if gateway.is_link_local:
        return True
    own = [address for name, address in place.addresses if name == link and address.version == gateway.version]
    if own and all(address.network.num_addresses == 1 for address in own):
        return True  # host addresses only: apply asks for an on-link gateway
    return any(gateway in address.network for address in own) or any(
        name == link and route.gw is None and gateway in route.dst for name, route in place.routes
    )
