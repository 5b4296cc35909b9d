"""The nouns: networks, attachments and their parts. Frozen, and valid from birth.

A record is plain data. Nothing here knows the kernel, the store or a protocol; `towpath.schema` turns records into
JSON and back. Addresses are `ipaddress` objects: an *interface* (address with prefix length) where a prefix matters.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

from towpath.errors import BadConfig

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Subnet = IPv4Network | IPv6Network

ISOLATION = ("open", "same-network", "isolated")
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*\Z")  # CNI spec 1.1.0 section 1: network names and container ids
IFNAMSIZ = 15  # linux/if.h IFNAMSIZ - 1


def check_name(what: str, value: str) -> str:
    """Return `value` if CNI allows it as a network name or container id, else raise BadConfig."""
    if not NAME.match(value):
        raise BadConfig(
            f"{what} {value!r} is not a valid name: letters, digits, '_', '.', '-', first a letter or digit"
        )
    return value


def check_ifname(what: str, value: str) -> str:
    """Return `value` if Linux takes it as an interface name (net/core/dev.c dev_valid_name), else raise BadConfig."""
    if not value or len(value.encode()) > IFNAMSIZ:
        raise BadConfig(f"{what} {value!r} must be 1 to {IFNAMSIZ} bytes long")
    if value in (".", "..") or any(c in "/:" or c.isspace() for c in value):
        raise BadConfig(f"{what} {value!r} may not be '.' or '..' or hold '/', ':' or spaces")
    return value


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Who an attachment is: unique on a node. `origin` is the way in: cni, run, docker, netavark."""

    origin: str
    network: str
    container: str
    ifname: str

    def __str__(self) -> str:
        return f"{self.origin}/{self.network}/{self.container}/{self.ifname}"

    def digest(self) -> str:
        """40 hex digits that names of kernel objects are cut from."""
        return hashlib.sha1(str(self).encode(), usedforsecurity=False).hexdigest()

    def veth(self) -> str:
        """Name of the host end: `tp` + 12 hex (14 of the 15 bytes the kernel allows)."""
        return f"tp{self.digest()[:12]}"

    def ifb(self) -> str:
        """Name of the device that shapes what the container sends."""
        return f"tq{self.digest()[:12]}"

    def mac(self) -> str:
        """A locally administered unicast address derived from the key (IEEE 802c: x2 in the first octet)."""
        return self._mac("02")

    def host_mac(self) -> str:
        """The same for the host end, so that the result of an ADD is known without asking the kernel."""
        return self._mac("06")

    def _mac(self, first: str) -> str:
        d = self.digest()
        return ":".join([first, *(d[i : i + 2] for i in range(12, 22, 2))])


@dataclass(frozen=True, slots=True)
class Route:
    dst: Subnet
    gw: Address | None = None
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int = 0
    scope: int | None = None

    def __str__(self) -> str:
        return f"{self.dst} via {self.gw}" if self.gw else str(self.dst)


@dataclass(frozen=True, slots=True)
class Dns:
    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.nameservers or self.domain or self.search or self.options)


@dataclass(frozen=True, slots=True)
class PortMap:
    """One published port. `host_ip` None = every address of the node, in both families."""

    host_port: int
    container_port: int
    proto: str = "tcp"
    host_ip: Address | None = None

    def __post_init__(self) -> None:
        for what, value in (("hostPort", self.host_port), ("containerPort", self.container_port)):
            if not 0 < value < 65536:
                raise BadConfig(f"{what} {value} is not a port: 1 to 65535")
        if self.proto not in PROTOCOLS:
            raise BadConfig(f"protocol {self.proto!r} cannot be published: one of {', '.join(PROTOCOLS)}")

    def __str__(self) -> str:
        return f"{self.host_ip or '*'}:{self.host_port}/{self.proto}"


@dataclass(frozen=True, slots=True)
class PortRules:
    """How the ports of one attachment are published: the keys of the reference portmap plugin."""

    snat: bool = True
    masquerade_all: bool = False
    mark_bit: int = 13
    set_mark_chain: str = ""
    conditions_v4: tuple[str, ...] = ()
    conditions_v6: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Rates in bits per second, bursts in bits; 0 = not shaped. Ingress is what the container receives."""

    ingress_rate: int = 0
    ingress_burst: int = 0
    egress_rate: int = 0
    egress_burst: int = 0

    def __bool__(self) -> bool:
        return bool(self.ingress_rate or self.egress_rate)


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses start..end (both included) of one subnet may be leased; the gateway never is."""

    subnet: Subnet
    start: Address
    end: Address
    gateway: Address | None = None

    def __contains__(self, address: Address) -> bool:
        return address.version == self.start.version and int(self.start) <= int(address) <= int(self.end)

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"


@dataclass(frozen=True, slots=True)
class Pool:
    """Ranges of one address family; every attachment gets one address from each pool of its network."""

    ranges: tuple[Range, ...]

    def __contains__(self, address: Address) -> bool:
        return any(address in r for r in self.ranges)

    def __str__(self) -> str:
        return ",".join(map(str, self.ranges))


@dataclass(frozen=True, slots=True)
class Trunk:
    """VLAN ids first..last carried tagged on a bridge port."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Network:
    """One network of this node, as its row says it. Keys are the field names of our YAML."""

    name: str
    mode: str = "bridge"
    bridge: str = ""
    pools: tuple[Pool, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Dns = field(default_factory=Dns)
    gateway: bool = True
    default_route: bool = True
    force_address: bool = False
    masquerade: bool = True
    isolation: str = "open"
    port_isolation: bool = False
    hairpin: bool = True
    promiscuous: bool = False
    mtu: int = 0
    vlan: int = 0
    trunk: tuple[Trunk, ...] = ()
    preserve_default_vlan: bool = True
    spoof_check: bool = False
    dad: bool = False
    interface_up: bool = True
    deferred_delete: bool = False
    data_dir: str = ""  # a host-local directory whose reservations are adopted when the row is made
    source: str = "cli"
    v: int = 1

    def __post_init__(self) -> None:
        check_name("network name", self.name)
        if self.isolation not in ISOLATION:
            raise BadConfig(
                f"isolation {self.isolation!r} of network {self.name!r} is not one of {', '.join(ISOLATION)}"
            )
        if self.bridge:
            check_ifname("bridge", self.bridge)

    @property
    def device(self) -> str:
        """The bridge device: the configured name, or one derived from the network's."""
        if self.bridge:
            return self.bridge
        name = f"br-{self.name}"
        if len(name) <= IFNAMSIZ:
            return name
        return f"br-{hashlib.sha1(self.name.encode(), usedforsecurity=False).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class Lease:
    """One address of one attachment. `pool` is the index of the network's pool, -1 where the address is not ours."""

    address: Interface
    gateway: Address | None = None
    pool: int = -1


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the tuning part changed on a container's interface; `before` holds what was there, to be put back."""

    sysctl: tuple[tuple[str, str], ...] = ()
    mac: str = ""
    mtu: int = 0
    promiscuous: bool | None = None
    allmulti: bool | None = None
    tx_queue: int = 0
    before: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Attachment:
    """Everything one container interface claims on this node: the row that DEL, GC and recovery work from.

    parts: which pieces made something, in order of arrival: "wire", "address", "ports", "firewall", "bandwidth",
    "tuning". A part that is not named here is somebody else's and is never touched.
    phase: "claimed" (kernel perhaps half changed), "attached", "detaching".
    making: the parts that a "claimed" record is about, where it had others before; () = all of them.
    """

    key: Key
    mode: str = ""
    phase: str = "claimed"
    parts: tuple[str, ...] = ()
    making: tuple[str, ...] = ()
    netns: str = ""
    netns_id: int = 0
    veth: str = ""
    home: str = ""
    mac: str = ""
    leases: tuple[Lease, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Dns = field(default_factory=Dns)
    masquerade: bool = False
    isolation: str = "open"
    spoof_check: bool = False
    ports: tuple[PortMap, ...] = ()
    port_rules: PortRules = field(default_factory=PortRules)
    bandwidth: Bandwidth = field(default_factory=Bandwidth)
    tuning: Tuning = field(default_factory=Tuning)
    deferred_delete: bool = False
    ipam: str = ""
    caller: str = ""
    boot: str = ""
    firewall: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    aliases: tuple[str, ...] = ()
    name: str = ""
    created: float = 0.0
    v: int = 1

    @property
    def addresses(self) -> Iterator[Address]:
        return (lease.address.ip for lease in self.leases)


# --- what is asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Take:
    """Lease from the network's pools; `static` are asked for by value, `extra` pools come before the row's."""

    static: tuple[Address, ...] = ()
    extra: tuple[Pool, ...] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """Addresses that somebody else manages: a delegated IPAM plug-in (`ipam` names it) or a foreign wire in a chain."""

    leases: tuple[Lease, ...]
    ipam: str = ""


@dataclass(frozen=True, slots=True)
class InNetns:
    """Make the interface inside the network namespace at `path`."""

    path: str


@dataclass(frozen=True, slots=True)
class Foreign:
    """The wire is not ours. `veth`: its host end ("" = unknown); `home`: the interface behind which it lives."""

    path: str
    home: str = ""
    veth: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What a runtime asks for, decoded and checked. `parts` are the pieces this call makes (see Attachment.parts)."""

    key: Key
    network: Network
    parts: tuple[str, ...]
    place: InNetns | Foreign | None = None
    address: Take | Given | None = None
    mac: str = ""
    routes: tuple[Route, ...] = ()
    dns: Dns = field(default_factory=Dns)
    ports: tuple[PortMap, ...] = ()
    port_rules: PortRules = field(default_factory=PortRules)
    bandwidth: Bandwidth = field(default_factory=Bandwidth)
    isolation: str = "open"
    tuning: Tuning = field(default_factory=Tuning)
    caller: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    aliases: tuple[str, ...] = ()
    name: str = ""
