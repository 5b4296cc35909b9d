"""One network of a test: its names and subnets, the configurations that make it, and the containers that joined."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest

from integration.callers import Json, Reply, Runtime, addresses, must
from integration.lab import Container, Host

# TOWPATH_LAB=reference drives the reference plugins through the same tests: so the lab itself is checked against them.
REFERENCE = os.environ.get("TOWPATH_LAB") == "reference"
ours = pytest.mark.skipif(REFERENCE, reason="the reference plug-in does not do this")
OURS = {
    "bridge": "towpath-bridge",
    "host-local": "towpath-ipam",
    "portmap": "towpath-portmap",
    "firewall": "towpath-firewall",
    "bandwidth": "towpath-bandwidth",
    "tuning": "towpath-tuning",
    "loopback": "towpath-loopback",
}
CAPABILITIES = {"portMappings": True, "ips": True, "mac": True, "ipRanges": True, "bandwidth": True, "aliases": True}


def plugin(reference: str) -> str:
    """The executable under test that stands for this reference plugin."""
    return reference if REFERENCE else OURS[reference]


@dataclass(slots=True)
class Member:
    """A container that joined: what it was told, and how to leave again."""

    container: Container
    result: Json
    runtime: Runtime
    ifname: str
    args: str = ""

    @property
    def addresses(self) -> list[str]:
        return addresses(self.result)

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def veth(self) -> str:
        """Name of the host end, as the result tells it."""
        outer: list[str] = [i["name"] for i in self.result["interfaces"] if not i.get("sandbox")]
        return outer[1]

    def leave(self) -> Reply:
        return self.runtime.delete(self.container.id, self.container.path, self.ifname, args=self.args)


@dataclass(slots=True)
class Net:
    """Network number N of a host: bridge `tbN`, 10.N.0.0/24 and fd00:N::/64."""

    host: Host
    number: int
    members: list[Member] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"n{self.number}"

    @property
    def bridge(self) -> str:
        return f"tb{self.number}"

    @property
    def subnet(self) -> str:
        return f"10.{self.number}.0.0/24"

    @property
    def gateway(self) -> str:
        return f"10.{self.number}.0.1"

    @property
    def subnet6(self) -> str:
        return f"fd00:{self.number}::/64"

    @property
    def gateway6(self) -> str:
        return f"fd00:{self.number}::1"

    def ipam(self, *ranges: Json, **keys: Any) -> Json:
        """Host-local's keys; no ranges = the IPv4 subnet."""
        found = {"type": plugin("host-local"), "ranges": [[r] for r in ranges or ({"subnet": self.subnet},)], **keys}
        return found | ({"dataDir": str(self.host.folder / "host-local")} if REFERENCE else {})

    def dual(self, **keys: Any) -> Json:
        return self.ipam({"subnet": self.subnet}, {"subnet": self.subnet6}, **keys)

    def wire(self, **keys: Any) -> Json:
        """The bridge plug-in's object: a gateway with a default route and masquerade unless `keys` say otherwise."""
        base = {
            "type": plugin("bridge"),
            "bridge": self.bridge,
            "isDefaultGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "capabilities": CAPABILITIES,
            "ipam": self.ipam(),
        }
        return {key: value for key, value in {**base, **keys}.items() if value is not None}

    def runtime(self, *plugins: Json, version: str = "1.0.0", **keys: Any) -> Runtime:
        """Its conflist as a runtime calls it; no plugins = the bridge with `keys`."""
        return Runtime(self.host.exec(), self.name, plugins or (self.wire(**keys),), version)

    def join(
        self,
        runtime: Runtime | None = None,
        *,
        container: Container | None = None,
        ifname: str = "eth0",
        args: str = "",
        **capabilities: Any,
    ) -> Member:
        """ADD a container (a new one unless given), which must succeed."""
        runtime = runtime or self.runtime()
        container = container or self.host.container()
        member = Member(container, {}, runtime, ifname, args)
        self.members.append(member)
        member.result = must(runtime.add(container.id, container.path, ifname, args=args, **capabilities))
        return member

    def refuse(
        self, runtime: Runtime, *, container: Container | None = None, args: str = "", **capabilities: Any
    ) -> Reply:
        """ADD that must fail; what a failed ADD left is still deleted at the end, as runtimes do."""
        container = container or self.host.container()
        self.members.append(Member(container, {}, runtime, "eth0", args))
        reply = runtime.add(container.id, container.path, args=args, **capabilities)
        assert not reply.ok, f"ADD should have been refused: {reply}"
        return reply

    def close(self) -> None:
        """Every container leaves and dies; the bridge and the network's row go."""
        left = [member.leave() for member in reversed(self.members)]
        for member in self.members:
            member.container.remove()
        self.host.agent.forget(self.name)  # first: the agent mends the device of a network that it has
        self.host.netns.call("ip", "link", "del", self.bridge)
        bad = [reply for reply in left if not reply.ok]
        assert REFERENCE or not bad, f"DEL failed: {bad[0]}"


def new_net(host: Host) -> Net:
    """A network of a number that this host has not had lately; 200 and above are left to tests that choose."""
    return Net(host, next(host.numbers))
