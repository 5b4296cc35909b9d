"""Hosts of one cluster as namespaces on an underlay of their own; their stores are in memory, their kernels true.

host n: 10.0.0.<n+1>, 2001:db8::<n+1> on eth0; containers 0 and 1 of each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import TypeVar

from tests.kernel.box import Box, box
from tests.netns.firewall_lab import HOST, QUIET, Lab
from tests.overlay.cluster import who
from towpath.attach import Attacher, Setting
from towpath.kernel.nft import Nftables
from towpath.mode import Node
from towpath.model import Attachment, InNetns, Key, Request, Take
from towpath.overlay.cluster import declare
from towpath.overlay.config import DCOS, Overlay, OverlayConfig
from towpath.overlay.networks import networks
from towpath.overlay.reconcile import State, Tunnel
from towpath.overlay.records import NODES, Member, node_row
from towpath.store.contract import Batch, Event
from towpath.store.memory import MemoryStore

T = TypeVar("T")
DUAL = replace(
    DCOS,
    overlays=(
        Overlay("dcos", IPv4Network("9.0.0.0/8"), 24, IPv6Network("fd01:b::/64"), 80),
        Overlay("web", IPv4Network("10.64.0.0/10"), 24, IPv6Network("fd01:c::/64"), 80),
    ),
)
SIX = replace(
    DCOS, vtep_subnet=None, overlays=(Overlay("dcos", subnet6=IPv6Network("fd01:b::/64"), prefix6=80),), underlay=6
)


class Host:
    """One node: its namespace, its tunnel and its attachments. The cluster's store is everybody's."""

    def __init__(self, number: int, place: Box, cluster: MemoryStore, member: Member) -> None:
        self.number = number
        self.box = place
        self.store = cluster
        self.member = member
        self.net = Lab(place, Nftables())
        self.attacher = place.inside(self._attacher)
        self.tunnel = Tunnel(cluster, place.kernel, self.member, follow=self._follow)
        self.attacher.standing = lambda: self.tunnel.rules
        self.addresses: dict[tuple[str, int], Attachment] = {}

    def _attacher(self) -> Attacher:
        store = MemoryStore()
        return Attacher(store, self.box.kernel, Node(f"n{self.number}"), Setting("nftables", "boot"))

    async def _follow(self, state: State | None) -> None:
        for network in networks(state.config, state.own, state.mtu) if state else ():
            await self.attacher.networks.save(network)

    def wait(self, work: Callable[[], Awaitable[T]]) -> T:
        return self.box.wait(work)

    def heal(self) -> int:
        return self.wait(self.tunnel.heal)

    def attach(self, container: int, overlay: str = "dcos") -> Attachment:
        network = self.attacher.networks.get(overlay)
        key = Key("cni", overlay, f"c{container}", "eth0")
        parts = ("wire", "address", "ports", "firewall")
        place = InNetns(self.box.paths[container])
        request = Request(key, network, parts, place, Take())
        made = self.wait(lambda: self.attacher.add(request))
        self.net.serve(container, 80, name=f"h{self.number}c{container}")
        self.addresses[overlay, container] = made
        self._settle(made)
        return made

    def _settle(self, record: Attachment) -> None:
        """Wait until the container is known: the ports of a new bridge do not forward from the first moment on."""
        for address in record.addresses:
            asked = (self.net.ask(HOST, address, 80, wait=QUIET) for _ in range(20))
            assert next(filter(None, asked), None), f"{address} cannot be reached"

    def address(self, container: int, version: int, overlay: str = "dcos") -> str:
        record = self.addresses[overlay, container]
        return next(str(address) for address in record.addresses if address.version == version)

    def own(self, version: int) -> str:
        return str(self.member.at(version))


class Cluster:
    def __init__(self, hosts: list[Host], store: MemoryStore, switch: Box) -> None:
        self.hosts = hosts
        self.switch = switch
        self.store = store

    def settle(self) -> None:
        """Every host reads the tables and brings its kernel to them."""
        for _ in range(2):
            for host in self.hosts:
                host.tunnel.touch()
                host.heal()

    def tell(self, name: str, gone: bool) -> None:
        """What a watch would say of a node's row, to every host but itself."""
        for host in self.hosts:
            if host.member.name != name:
                host.wait(lambda host=host: self._tell(host, name, gone))  # type: ignore[misc]

    async def _tell(self, host: Host, name: str, gone: bool) -> None:
        revision = (await self.store.status()).revision
        item = await self.store.get(node_row(name))
        if gone:
            listing = (await self.store.list(NODES)).items
            item = replace(listing[0], key=node_row(name), value=b"", revision=revision)
        assert item is not None
        await host.tunnel.hear(Batch(revision, (Event(item, deleted=gone),)))


@contextmanager
def overlay_lab(count: int = 3, config: OverlayConfig = DUAL, containers: int = 2) -> Iterator[Cluster]:
    versions = (4, 6) if config.vtep_subnet else (6,)
    with ExitStack() as stack:
        switch = stack.enter_context(box(0))
        switch.run("sh", "-c", "ip link add br0 type bridge; ip link set br0 up")
        store = MemoryStore()
        switch.wait(store.open)
        switch.wait(lambda: declare(store, config))
        hosts = []
        for number in range(count):
            place = stack.enter_context(box(containers))
            plug_in(switch, place, number, versions)
            host = Host(number, place, store, who(number, versions))
            stack.callback(host.net.close)
            host.wait(host.attacher.store.open)
            host.wait(host.attacher.load)
            host.net.serve(HOST, 80, name=f"h{number}")
            hosts.append(host)
        cluster = Cluster(hosts, store, switch)
        cluster.settle()
        yield cluster


def plug_in(switch: Box, place: Box, number: int, versions: tuple[int, ...] = (4, 6)) -> None:
    """eth0 of `place` on the underlay, with the addresses of host `number`."""
    member = who(number, versions)
    lines = [
        f"ip link add u{number} type veth peer name eth0 netns {place.host}",
        f"ip link set u{number} up master br0",
    ]
    switch.run("sh", "-ec", "\n".join(lines))
    for address in member.addresses:
        bits, nodad = (24, "") if isinstance(address, IPv4Address) else (64, "nodad")
        place.run("ip", "address", "add", f"{address}/{bits}", "dev", "eth0", *([nodad] if nodad else []))
    place.run("sh", "-ec", "ip link set lo up; ip link set eth0 up")
