"""Does the operations of one place, in order, with as few system calls as rtnetlink allows: the hot path of an attach.

Names are resolved first, in one call. Then messages gather until an operation needs their result: what makes a link is
sent alone (had it failed, a message behind it in the same call would still be done, to somebody else's link of that
name), what works on links that are there goes out together. Sysctls and shaping come in between where the plan says so.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from towpath.errors import PhaseFailed
from towpath.kernel import inet, links, shape, sysctl, tunnel
from towpath.kernel.herald import Herald
from towpath.kernel.netlink import Answer, Message, Netlink
from towpath.kernel.netns import open_netns
from towpath.plan import (
    AddAddress,
    AddFdb,
    AddNeighbour,
    AddPolicyRule,
    AddRoute,
    AddVeth,
    Announce,
    DropAddress,
    DropFdb,
    DropLink,
    DropNeighbour,
    DropPolicyRule,
    DropRoute,
    EnsureBridge,
    EnsureVxlan,
    FlushConntrack,
    ForgetNeighbours,
    Op,
    PlugPort,
    PortVlans,
    SetLink,
    Shape,
    Sysctl,
    Unshape,
)

GONE = frozenset({errno.ENODEV, errno.ENOENT, errno.EADDRNOTAVAIL, errno.ESRCH})
THERE = frozenset({errno.EEXIST})
NOTHING: frozenset[int] = frozenset()
AT_ONCE = 64  # messages in one call: each answer takes up to 1.3 kB of the socket's receive buffer, which has 208


class Batch:
    """One run in the namespace where `netlink` was opened; the calling thread is in it too (for sysctls)."""

    def __init__(self, netlink: Netlink, where: str, herald: Herald) -> None:
        self._netlink = netlink
        self._herald = herald
        self._where = where
        self._index: dict[str, int] = {}
        self._waiting: list[tuple[Op, Message, frozenset[int]]] = []
        self._host_only: frozenset[tuple[str, int]] = frozenset()

    def run(self, ops: Sequence[Op]) -> None:
        """Raises PhaseFailed for the first operation that the kernel refuses, BadNetns where a namespace is gone."""
        self._host_only = host_addresses_only(ops)
        self._resolve(names(ops))
        for op in ops:
            hand = self._HANDS.get(type(op))
            if hand is None:
                raise TypeError(f"{op} is no operation on links")
            hand(self, op)
        self._flush()

    # --- sending ------------------------------------------------------------------------------------------------

    def _resolve(self, wanted: Iterable[str]) -> None:
        asked = tuple(wanted)
        if not asked:
            return
        for name, answer in zip(asked, self._netlink.send([links.get_link(n) for n in asked]), strict=True):
            if answer.errno == 0:
                self._index[name] = links.IFINFO.unpack_from(answer.data[0])[2]

    def _find(self, name: str) -> int:
        """Index of a link; 0 where there is none, also after everything that waits is done."""
        if name not in self._index:
            self._flush()
            self._resolve((name,))
        return self._index.get(name, 0)

    def _need(self, op: Op, name: str) -> int:
        index = self._find(name)
        if not index:
            self._fail(op, errno.ENODEV, f'no link "{name}"')
        return index

    def _later(self, op: Op, message: Message, forgiven: frozenset[int] = NOTHING) -> None:
        self._waiting.append((op, message, forgiven))

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        for start in range(0, len(waiting), AT_ONCE):
            some = waiting[start : start + AT_ONCE]
            answers = self._netlink.send([message for _, message, _ in some])
            for (op, _, forgiven), answer in zip(some, answers, strict=True):
                self._check(op, answer, forgiven)

    def _now(self, op: Op, message: Message, forgiven: frozenset[int] = NOTHING) -> Answer:
        self._flush()
        answer = self._netlink.ask(message)
        self._check(op, answer, forgiven)
        return answer

    def _check(self, op: Op, answer: Answer, forgiven: frozenset[int]) -> None:
        if answer.errno and answer.errno not in forgiven:
            self._fail(op, answer.errno, answer.text)

    def _fail(self, op: Op, number: int, text: str = "") -> NoReturn:
        raise PhaseFailed(self._where, op, number, text)

    # --- links --------------------------------------------------------------------------------------------------

    def _ensure_bridge(self, op: EnsureBridge) -> None:
        self._flush()
        answer = self._netlink.ask(links.get_link(op.name))
        if answer.errno == errno.ENODEV:
            made = self._netlink.ask(links.new_bridge(op))
            if made.errno == 0:
                self._now(op, links.mark(op.name))
                return
            self._check(op, made, THERE)  # somebody was quicker: then theirs is the bridge
            answer = self._netlink.ask(links.get_link(op.name))
        self._check(op, answer, NOTHING)
        self._adopt_bridge(op, answer.data[0])

    def _adopt_bridge(self, op: EnsureBridge, body: bytes) -> None:
        link, _ = links.read_link(body)
        if link.kind != "bridge":
            self._fail(op, errno.EEXIST, f'"{op.name}" already exists but is not a bridge')
        self._index[op.name] = link.index
        if not link.alias and link.mac == op.mac:  # a death kept us from marking it: nobody else chooses that address
            self._later(op, links.mark(op.name))
        promiscuous = True if op.promiscuous and not link.promiscuous else None
        if not link.up or promiscuous:
            self._later(op, links.set_link(SetLink(op.name, up=True, promiscuous=promiscuous)))
        if op.vlan_filtering and not links.filters_vlans(body):
            self._later(op, links.filter_vlans(op.name))

    def _ensure_vxlan(self, op: EnsureVxlan) -> None:
        self._flush()
        answer = self._netlink.ask(links.get_link(op.name))
        if answer.errno == 0:
            if self._keep_vxlan(op, answer.data[0]):
                return
            self._drop_link(DropLink(op.name))
        elif answer.errno != errno.ENODEV:
            self._check(op, answer, NOTHING)
        self._now(op, tunnel.new_vxlan(op))
        self._now(op, links.mark(op.name))

    def _keep_vxlan(self, op: EnsureVxlan, body: bytes) -> bool:
        """Whether the device is as wanted, but for what can be set on a living one."""
        link, _ = links.read_link(body)
        if link.kind != "vxlan":
            self._fail(op, errno.EEXIST, f'"{op.name}" already exists but is not a VXLAN device')
        # A MAC that is set on a living device flushes its permanent neighbours: a new device says so more clearly.
        if link.mac != op.mac or tunnel.read_vxlan(body) != tunnel.Vxlan(op.vni, op.port, op.local):
            return False
        self._index[op.name] = link.index
        mtu = op.mtu if op.mtu and op.mtu != link.mtu else None
        if not link.up or mtu:
            self._later(op, links.set_link(SetLink(op.name, up=True, mtu=mtu)))
        return True

    def _add_veth(self, op: AddVeth) -> None:
        master = self._need(op, op.master) if op.master else 0
        self._flush()
        fd = open_netns(op.netns)
        try:
            answer = self._netlink.ask(links.new_veth(op, fd, master))
        finally:
            os.close(fd)
        if answer.errno == errno.EEXIST:
            taken = f'"{op.name}"' if self._find(op.name) else f'"{op.peer}" in {op.netns}'
            self._fail(op, errno.EEXIST, f"a link {taken} already exists")
        self._check(op, answer, NOTHING)
        self._now(op, links.mark(op.name, op.hairpin, op.isolated))

    def _plug_port(self, op: PlugPort) -> None:
        if self._find(op.name):
            self._now(op, links.set_link(SetLink(op.name, master=op.master), self._need(op, op.master)))
            self._now(op, links.mark(op.name, op.hairpin, op.isolated))

    def _drop_link(self, op: DropLink) -> None:
        self._index.pop(op.name, None)
        self._now(op, links.drop_link(op.name), GONE)

    def _set_link(self, op: SetLink) -> None:
        master = self._need(op, op.master) if op.master else 0
        self._later(op, links.set_link(op, master))

    def _port_vlans(self, op: PortVlans) -> None:
        index = self._need(op, op.port)
        for message in links.port_vlans(op, index):
            self._later(op, message, GONE if message.type == links.RTM_DELLINK else NOTHING)

    # --- addresses, routes, neighbours ----------------------------------------------------------------------------

    def _add_address(self, op: AddAddress) -> None:
        self._later(op, inet.add_address(self._need(op, op.link), op.address, op.nodad), THERE)

    def _drop_address(self, op: DropAddress) -> None:
        if index := self._find(op.link):
            self._later(op, inet.drop_address(index, op.address), GONE)

    def _add_route(self, op: AddRoute) -> None:
        index, gw = self._need(op, op.link), op.route.gw
        onlink = gw is not None and (op.link, gw.version) in self._host_only
        self._later(op, inet.add_route(index, op.route, onlink), THERE)

    def _drop_route(self, op: DropRoute) -> None:
        if index := self._find(op.link):
            self._later(op, inet.drop_route(index, op.route), GONE)

    def _add_neighbour(self, op: AddNeighbour) -> None:
        self._later(op, tunnel.add_neighbour(self._need(op, op.link), op))

    def _drop_neighbour(self, op: DropNeighbour) -> None:
        if index := self._find(op.link):
            self._later(op, inet.drop_neighbour(index, op.address), GONE)

    def _add_fdb(self, op: AddFdb) -> None:
        self._later(op, tunnel.add_fdb(self._need(op, op.link), op))

    def _drop_fdb(self, op: DropFdb) -> None:
        if index := self._find(op.link):
            self._later(op, tunnel.drop_fdb(index, op), GONE)

    def _add_policy_rule(self, op: AddPolicyRule) -> None:
        self._later(op, tunnel.add_rule(op), THERE)

    def _drop_policy_rule(self, op: DropPolicyRule) -> None:
        self._later(op, tunnel.drop_rule(op), GONE)

    def _forget_neighbours(self, op: ForgetNeighbours) -> None:
        if index := self._find(op.link):
            for address in op.addresses:
                self._later(op, inet.drop_neighbour(index, address), GONE)

    # --- what is no rtnetlink -------------------------------------------------------------------------------------

    def _sysctl(self, op: Sysctl) -> None:
        self._flush()
        try:
            sysctl.write(op.path, op.value)
        except OSError as refusal:
            if not (op.optional and refusal.errno == errno.ENOENT):
                self._fail(op, refusal.errno or 0, refusal.strerror or "")

    def _announce(self, op: Announce) -> None:
        self._flush()
        self._herald.announce(op)

    def _shape(self, op: Shape) -> None:
        port = self._need(op, op.port)
        self._flush()
        try:
            shape.apply(self._netlink, op, port)
        except OSError as refusal:
            self._fail(op, refusal.errno or 0, refusal.strerror or "")

    def _unshape(self, op: Unshape) -> None:
        if port := self._find(op.port):
            for message in shape.remove(port):
                self._now(op, message, shape.NOT_THERE)

    def _flush_conntrack(self, op: FlushConntrack) -> None:
        from towpath.kernel import conntrack

        self._flush()
        try:
            conntrack.flush(op.ports, op.addresses)
        except OSError as refusal:
            self._fail(op, refusal.errno or 0, refusal.strerror or "")

    _HANDS: dict[type, Callable[[Batch, Any], None]] = {
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
        AddNeighbour: _add_neighbour,
        DropNeighbour: _drop_neighbour,
        AddFdb: _add_fdb,
        DropFdb: _drop_fdb,
        AddPolicyRule: _add_policy_rule,
        DropPolicyRule: _drop_policy_rule,
        ForgetNeighbours: _forget_neighbours,
        Sysctl: _sysctl,
        Announce: _announce,
        Shape: _shape,
        Unshape: _unshape,
        FlushConntrack: _flush_conntrack,
    }


def names(ops: Iterable[Op]) -> tuple[str, ...]:
    """Links whose index the operations need and which none of them makes: asked for once, before anything is done."""
    wanted: dict[str, None] = {}
    made: set[str] = set()
    for op in ops:
        match op:
            case AddVeth():
                wanted |= {op.master: None} if op.master else {}
                made.add(op.name)
            case PlugPort():
                wanted[op.master] = None
            case EnsureBridge() | EnsureVxlan():
                made.add(op.name)
            case SetLink(master=str(master)) if master:
                wanted[master] = None
            case AddAddress() | DropAddress() | AddRoute() | DropRoute() | ForgetNeighbours():
                wanted[op.link] = None
            case AddNeighbour() | DropNeighbour() | AddFdb() | DropFdb():
                wanted[op.link] = None
            case PortVlans() | Shape() | Unshape():
                wanted[op.port] = None
    return tuple(name for name in wanted if name not in made)


def host_addresses_only(ops: Iterable[Op]) -> frozenset[tuple[str, int]]:
    """(link, IP version) pairs that get only /32 or /128 addresses here.

    No gateway can be in a subnet of theirs, so the kernel has to be told that it is on the link.
    """
    host: dict[tuple[str, int], bool] = {}
    for op in ops:
        if isinstance(op, AddAddress):
            key = (op.link, op.address.version)
            host[key] = host.get(key, True) and op.address.network.num_addresses == 1
    return frozenset(key for key, only in host.items() if only)
