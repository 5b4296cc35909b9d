"""Requests as tests ask for them: one bridge network, one container, and what a test changes about them."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from tests.fakes import FakeKernel
from towpath.attach import Attacher, Setting
from towpath.mode import Node
from towpath.model import InNetns, Key, Network, Pool, PortMap, Range, Request, Take
from towpath.store.contract import Store
from towpath.store.memory import MemoryStore

NETNS = "/run/netns/a"
ALL = ("wire", "address", "ports", "firewall")


def span(subnet: str) -> Range:
    """Every address of a subnet but its first (the gateway) and its last."""
    net = ip_network(subnet)
    last = net[-2] if net.version == 4 else net[-1]
    return Range(net, net[1], last, net[1])


def network(*subnets: str, name: str = "shop", **changes: Any) -> Network:
    pools = tuple(Pool((span(subnet),)) for subnet in subnets or ("10.1.0.0/24",))
    return Network(name, pools=pools, **{"source": "cni", **changes})


def request(container: str = "c1", *, netns: str = NETNS, ifname: str = "eth0", **changes: Any) -> Request:
    net = changes.pop("network", network())
    asked = {
        "parts": ALL,
        "place": InNetns(netns),
        "address": Take(),
        "ports": (PortMap(8080, 80),),
        **changes,
    }
    return Request(Key("cni", net.name, container, ifname), net, **asked)


def take(*static: str) -> Take:
    return Take(static=tuple(ip_address(text) for text in static))


async def attacher(kernel: FakeKernel, store: Store | None = None, boot: str = "boot-1") -> Attacher:
    """One that has started: rows read, unfinished things finished."""
    if store is None:
        store = MemoryStore()
        await store.open()
    made = Attacher(store, kernel, Node("test"), Setting("nftables", boot))
    await made.load()
    await made.recover()
    return made
