"""What a cluster's overlays are: DC/OS's `dcos_overlay_network`, key by key, and the keys that we add.

{"vtep_subnet": "44.128.0.0/20", "vtep_subnet6": "fd01:a::/64", "vtep_mac_oui": "70:B3:D5:00:00:00",
 "overlays": [{"name": "dcos", "subnet": "9.0.0.0/8", "prefix": 24},
              {"name": "dcos6", "subnet6": "fd01:b::/64", "prefix6": 80}]}

A record is checked when it is made: whoever holds one holds overlays that can work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import combinations

from towpath import schema
from towpath.errors import BadConfig
from towpath.model import ISOLATION, Subnet, check_ifname, check_name

NAME_ROOM = 13  # bytes: an interface is called m-<name> or d-<name>, and linux/if.h IFNAMSIZ leaves 15
RESERVED = ("host", "bridge", "default", "none")  # networks of Docker and Mesos
SPLITS = ("half", "none")
OUI = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}\Z")
MAC_BITS = 24  # of the tunnel address that go into the MAC
LEAST_MTU = {4: 552, 6: 1280}  # the installer of DC/OS; RFC 8200 section 5
MOST_MTU = 65535 - 70
SPARE = 2  # bits that a subnet to lease addresses from has at least: network, gateway, a container, broadcast


def _check_overlay_name(name: str) -> None:
    check_name("overlay name", name)
    check_ifname("overlay name", name)
    if len(name.encode()) > NAME_ROOM:
        raise BadConfig(f"overlay name {name!r} is longer than {NAME_ROOM} characters: its bridge is called m-{name}")
    if name in RESERVED:
        raise BadConfig(f"overlay name {name!r} is reserved: {', '.join(RESERVED)} mean something to the runtimes")


@dataclass(frozen=True, slots=True)
class Overlay:
    """One overlay: pools, and the prefix length of the block that each node gets of each pool.

    split: "half" = the lower half of a block belongs to CNI's bridge m-<name>, the upper one to Docker's d-<name>;
    "none" = all runtimes of a node share the block and the bridge m-<name>. enabled False = no node gets a block.
    """

    name: str
    subnet: IPv4Network | None = None
    prefix: int = 0
    subnet6: IPv6Network | None = None
    prefix6: int = 0
    enabled: bool = True
    split: str = "half"
    masquerade: bool = True
    isolation: str = "open"

    def __post_init__(self) -> None:
        _check_overlay_name(self.name)
        for what, value, known in (("split", self.split, SPLITS), ("isolation", self.isolation, ISOLATION)):
            if value not in known:
                raise BadConfig(f"{what} {value!r} of overlay {self.name!r} is not one of {', '.join(known)}")
        if self.subnet is None and self.subnet6 is None:
            raise BadConfig(f"overlay {self.name!r} has neither subnet nor subnet6")
        for key, pool, bits in (("prefix", self.subnet, self.prefix), ("prefix6", self.subnet6, self.prefix6)):
            self._check_prefix(key, pool, bits)

    def _check_prefix(self, key: str, pool: Subnet | None, bits: int) -> None:
        if pool is None:
            if bits:
                raise BadConfig(f"overlay {self.name!r} has {key} {bits}, but no pool for it")
            return
        most = pool.max_prefixlen - SPARE - (1 if self.split == "half" else 0)
        if not pool.prefixlen <= bits <= most:
            raise BadConfig(
                f"{key} {bits} of overlay {self.name!r} does not divide {pool}: {pool.prefixlen} to {most} would"
            )

    @property
    def pools(self) -> tuple[tuple[Subnet, int], ...]:
        """(pool, prefix length of a node's block), IPv4 first."""
        both: tuple[tuple[Subnet | None, int], ...] = ((self.subnet, self.prefix), (self.subnet6, self.prefix6))
        return tuple((pool, bits) for pool, bits in both if pool is not None)


@dataclass(frozen=True, slots=True)
class OverlayConfig:
    """All overlays of a cluster and the tunnel that they share.

    vtep_mtu 0 = what the underlay leaves. underlay: address family of the tunnel, 0 = IPv4 where the node has it.
    table: of the routes to other nodes' own addresses; only what comes from an overlay is routed by it.
    """

    vtep_subnet: IPv4Network | None = None
    vtep_subnet6: IPv6Network | None = None
    vtep_mac_oui: str = "70:B3:D5:00:00:00"
    vtep_mtu: int = 0
    overlays: tuple[Overlay, ...] = ()
    vni: int = 1024
    port: int = 64000
    table: int = 42
    underlay: int = 0
    v: int = 1

    def __post_init__(self) -> None:
        self._check_vteps()
        for what, value, low, high in (
            ("vni", self.vni, 1, 2**24 - 1),
            ("port", self.port, 1, 65535),
            ("table", self.table, 1, 252),
        ):
            if not low <= value <= high:
                raise BadConfig(f"{what} {value} is not {low} to {high}")
        if self.underlay not in (0, 4, 6):
            raise BadConfig(f"underlay {self.underlay} is not 4, 6 or 0 (IPv4 where the node has it)")
        self._check_overlays()
        self._check_mtu()

    def _check_vteps(self) -> None:
        if self.vtep_subnet is None and self.vtep_subnet6 is None:
            raise BadConfig("neither vtep_subnet nor vtep_subnet6 is given", hint="such as vtep_subnet: 44.128.0.0/20")
        if self.vtep_subnet is not None and not 32 - MAC_BITS <= self.vtep_subnet.prefixlen <= 30:
            raise BadConfig(f"vtep_subnet {self.vtep_subnet} is not /8 to /30: a MAC holds 24 bits of the address")
        if self.vtep_subnet6 is not None and self.vtep_subnet6.prefixlen > 126:
            raise BadConfig(f"vtep_subnet6 {self.vtep_subnet6} has no room for two nodes")
        oui = self.vtep_mac_oui
        if not OUI.match(oui) or not oui.endswith("00:00:00") or int(oui[:2], 16) & 1:
            raise BadConfig(
                f"vtep_mac_oui {oui!r} is not six bytes, the first even and the last three zero",
                hint="such as 70:B3:D5:00:00:00",
            )

    def _check_overlays(self) -> None:
        if not self.overlays:
            raise BadConfig("overlays: there must be at least one")
        names = [overlay.name for overlay in self.overlays]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise BadConfig(f"overlay name {twice!r} is given twice")
        for overlay in filter(lambda overlay: overlay.enabled, self.overlays):
            for key, pool, vteps in (
                ("vtep_subnet", overlay.subnet, self.vtep_subnet),
                ("vtep_subnet6", overlay.subnet6, self.vtep_subnet6),
            ):
                if pool is not None and vteps is None:
                    raise BadConfig(f"overlay {overlay.name!r} has {pool}, but {key} is not given: no way leads there")
        for (what, one), (other, two) in combinations(self.named_pools(), 2):
            if one.version == two.version and one.overlaps(two):
                raise BadConfig(f"{other} {two} overlaps {what} {one}")

    def _check_mtu(self) -> None:
        least = LEAST_MTU[6 if self.has_ipv6 else 4]
        if self.vtep_mtu and not least <= self.vtep_mtu <= MOST_MTU:
            why = ": IPv6 needs 1280 (RFC 8200 section 5)" if self.has_ipv6 and self.vtep_mtu < least else ""
            raise BadConfig(f"vtep_mtu {self.vtep_mtu} is not {least} to {MOST_MTU}{why}")

    def named_pools(self) -> Iterator[tuple[str, Subnet]]:
        """Every pool with what it is called in messages."""
        for key, pool in (("vtep_subnet", self.vtep_subnet), ("vtep_subnet6", self.vtep_subnet6)):
            if pool is not None:
                yield key, pool
        for overlay in self.overlays:
            for pool, _ in overlay.pools:
                yield f"pool of overlay {overlay.name!r}", pool

    @property
    def has_ipv6(self) -> bool:
        return self.vtep_subnet6 is not None

    @property
    def device(self) -> str:
        """Name of the tunnel device: vtep1024."""
        return f"vtep{self.vni}"

    def overlay(self, name: str) -> Overlay | None:
        return next((overlay for overlay in self.overlays if overlay.name == name), None)


DCOS = OverlayConfig(
    vtep_subnet=IPv4Network("44.128.0.0/20"),
    vtep_subnet6=IPv6Network("fd01:a::/64"),
    overlays=(
        Overlay("dcos", IPv4Network("9.0.0.0/8"), 24),
        Overlay("dcos6", subnet6=IPv6Network("fd01:b::/64"), prefix6=80),
    ),
)
"""What DC/OS 2 installs where its config.yaml says nothing."""


def read(raw: object, where: str = "dcos_overlay_network") -> OverlayConfig:
    """Build the record from JSON or YAML data. Raises BadConfig "<where>: <path of the key>: what is wrong"."""
    return schema.decode(OverlayConfig, raw, where)


def host_route_in_the_way(config: OverlayConfig, routes: Iterator[tuple[str, Subnet]]) -> str:
    """Why these overlays cannot be here: a pool that the host routes elsewhere already; "" = they can.

    routes: (link, destination) of the host. Default routes, and those through our own devices, stand in nobody's way.
    """
    everything = (ip_network("0.0.0.0/0"), ip_network("::/0"))
    own = {config.device, *(f"{side}-{overlay.name}" for overlay in config.overlays for side in "md")}
    for link, dst in routes:
        if link in own or dst in everything:
            continue
        for what, pool in config.named_pools():
            if pool.version == dst.version and pool.overlaps(dst):
                return f"{what} {pool} overlaps {dst}, which this host reaches through {link}"
    return ""
