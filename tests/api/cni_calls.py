"""A node in memory for CNI tests: the real Attacher on a fake kernel and the memory store."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from ipaddress import ip_interface
from typing import Any

from tests.fakes import FakeKernel
from towpath.api.cni import serve_cni
from towpath.attach import Attacher, Setting
from towpath.mode import Node
from towpath.store.memory import MemoryStore

NETNS = "/run/netns/a"
OTHER = "/run/netns/b"
SUBNET = {"type": "towpath-ipam", "subnet": "10.9.0.0/24"}
DUAL = {"type": "towpath-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}]]}
SPEC_CODES = {1, 2, 3, 4, 5, 6, 7, 8, 11, 50, 51, 100, 101, 102, 103, 104}


@dataclass
class Answer:
    status: int
    stdout: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.stdout)

    @property
    def code(self) -> int:
        """0 for success, else the error's code."""
        return 0 if self.status == 0 else int(self.body["code"])

    @property
    def msg(self) -> str:
        return "" if self.status == 0 else str(self.body["msg"])


def pack(env: dict[str, str], stdin: bytes) -> bytes:
    return b"".join(f"{k}={v}\0".encode() for k, v in env.items()) + b"\0" + stdin


@dataclass
class Desk:
    kernel: FakeKernel
    attacher: Attacher
    caller: str = "/usr/bin/podman"
    env: dict[str, str] = field(default_factory=dict)

    async def raw(self, plugin: str, env: dict[str, str], stdin: bytes, **more: Any) -> Answer:
        return Answer(*await serve_cni(self.attacher, self.kernel, pack(env, stdin), plugin, self.caller, **more))

    async def call(self, command: str, plugin: str, conf: Any, *, container: str = "c1", **env: str) -> Answer:
        """One call; keyword arguments without CNI_ in front: NETNS, IFNAME, ARGS, PATH; None-like "" = not sent."""
        variables = {"CONTAINERID": container, "NETNS": NETNS, "IFNAME": "eth0", "PATH": "/nowhere", **self.env, **env}
        sent = {f"CNI_{k}": v for k, v in variables.items() if v} | {"CNI_COMMAND": command}
        return await self.raw(plugin, sent, json.dumps(conf).encode())

    async def add(self, plugin: str, conf: Any, **more: Any) -> Any:
        """ADD that succeeds; returns the result."""
        answer = await self.call("ADD", plugin, conf, **more)
        assert answer.status == 0, answer.stdout
        return answer.body

    async def rows(self) -> set[str]:
        """Keys of everything in the store but networks and round-robin cursors."""
        items = (await self.attacher.store.list("")).items
        return {i.key for i in items if not i.key.startswith(("networks/", "cursors/"))}


async def make_desk(*addresses: str, firewall: str = "nftables") -> Desk:
    kernel = FakeKernel(netns=(NETNS, OTHER))
    store = MemoryStore()
    await store.open()
    kernel.add_link("eth0")
    kernel.host.addresses |= {("eth0", ip_interface(a)) for a in addresses or ("192.0.2.1/24", "2001:db8::1/64")}
    attacher = Attacher(store, kernel, Node("n1"), Setting(firewall, "boot-1"))
    await attacher.load()
    return Desk(kernel, attacher)


def bridge(version: str | None = "1.0.0", **keys: Any) -> dict[str, Any]:
    """A towpath-bridge configuration; version None = no cniVersion at all."""
    conf = {"name": "blue", "type": "towpath-bridge", "bridge": "blue0", "isGateway": True, "ipam": SUBNET, **keys}
    return conf if version is None else {"cniVersion": version, **conf}
