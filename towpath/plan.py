"""Kernel changes as data. A plan can be printed, compared and tested without root; nothing in it waits for the kernel.

Operations name links; `kernel.apply` resolves names to indices. Every operation is idempotent where the kernel lets it
be: what is there already as wanted, or gone already when it is to be dropped, is success. Three places exist:

    host      rtnetlink (and procfs) in the agent's own network namespace
    netns     the same inside a container's network namespace, entered by path
    firewall  rules of the firewall back end (nftables or iptables), one transaction for the phase
"""

from __future__ import annotations

from dataclasses import dataclass, field

from towpath.model import Address, Bandwidth, Interface, PortMap, PortRules, Route, Subnet, Trunk

# --- links and addresses: places "host" and "netns" ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EnsureBridge:
    """A bridge of that name, up. Fails with EEXIST where the name belongs to a link of another kind.

    mac: given at creation only, which pins it (a bridge with an address of its own keeps it when ports come and go).
    mtu 0 = the kernel's. A bridge that exists keeps its MAC and MTU.
    """

    name: str
    mac: str
    mtu: int = 0
    vlan_filtering: bool = False
    promiscuous: bool = False


@dataclass(frozen=True, slots=True)
class AddVeth:
    """A veth pair: host end `name` (up, port of `master` if given), peer `peer` born inside `netns`, down.

    Fails with EEXIST where either name is taken.
    """

    name: str
    peer: str
    netns: str
    mac: str
    master: str = ""
    mtu: int = 0
    hairpin: bool = False
    isolated: bool = False
    host_mac: str = ""  # of the host end; "" = the kernel's choice


@dataclass(frozen=True, slots=True)
class PlugPort:
    """The existing link `name` is a port of bridge `master`, with these flags. A missing link is success: it died."""

    name: str
    master: str
    hairpin: bool = False
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class DropLink:
    """The link is gone when this is done (several at once are deleted as one group; a missing link is success)."""

    name: str


@dataclass(frozen=True, slots=True)
class SetLink:
    """Properties of an existing link; None = leave as it is."""

    name: str
    up: bool | None = None
    mac: str | None = None
    mtu: int | None = None
    promiscuous: bool | None = None
    allmulti: bool | None = None
    tx_queue: int | None = None
    master: str | None = None


@dataclass(frozen=True, slots=True)
class PortVlans:
    """VLANs of a bridge port: `pvid` untagged (0 = none), `trunk` tagged; keep_default: VLAN 1 stays."""

    port: str
    pvid: int = 0
    trunk: tuple[Trunk, ...] = ()
    keep_default: bool = True


@dataclass(frozen=True, slots=True)
class AddAddress:
    """The address is on the link (present already = success). nodad: IPv6 duplicate address detection is skipped."""

    link: str
    address: Interface
    nodad: bool = True


@dataclass(frozen=True, slots=True)
class DropAddress:
    link: str
    address: Interface


@dataclass(frozen=True, slots=True)
class AddRoute:
    """A route through `link`; an equal one that is there already is success."""

    link: str
    route: Route


@dataclass(frozen=True, slots=True)
class DropRoute:
    """That route, whoever made it, is gone when this is done; one to the same place by another way stays."""

    link: str
    route: Route


@dataclass(frozen=True, slots=True)
class Sysctl:
    """`path` below /proc/sys with slashes, e.g. net/ipv4/ip_forward. A missing file is an error unless `optional`."""

    path: str
    value: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Announce:
    """Gratuitous ARP (RFC 5227 section 3), unsolicited neighbour advertisements (RFC 4861 section 7.2.6)."""

    link: str
    mac: str
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class ForgetNeighbours:
    """Entries of these addresses leave the neighbour table of `link` (stale ARP after an address is used again)."""

    link: str
    addresses: tuple[Address, ...]


# --- tunnels: place "host". The classes that add also say what is wanted and what is seen. -------------------------


@dataclass(frozen=True, slots=True)
class EnsureVxlan:
    """A VXLAN device (RFC 7348) with this MAC, up, that floods and learns nothing: what it knows it was told.

    local: the node's address on the underlay, whose family is that of every peer. mtu 0 = the kernel's.
    One that differs in anything but the MTU is made anew, and loses its addresses and entries with that.
    Fails with EEXIST where the name belongs to a link of another kind.
    """

    name: str
    vni: int
    port: int
    local: Address
    mac: str
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class AddNeighbour:
    """`address` is at `mac`, for good: nobody is asked. What the table said about the address before is replaced."""

    link: str
    address: Address
    mac: str


@dataclass(frozen=True, slots=True)
class DropNeighbour:
    link: str
    address: Address


@dataclass(frozen=True, slots=True)
class AddFdb:
    """Frames to `mac` leave VXLAN device `link` for the underlay address `to`, and no other."""

    link: str
    mac: str
    to: Address


@dataclass(frozen=True, slots=True)
class DropFdb:
    link: str
    mac: str
    to: Address


@dataclass(frozen=True, slots=True)
class AddPolicyRule:
    """What comes from `source` is routed by `table` before the main one is asked (ip-rule(8))."""

    source: Subnet
    table: int
    priority: int


@dataclass(frozen=True, slots=True)
class DropPolicyRule:
    source: Subnet
    table: int
    priority: int


TunnelEntry = AddNeighbour | AddFdb | AddRoute | AddPolicyRule


@dataclass(frozen=True, slots=True)
class Shape:
    """Token buckets: `port` (host end) shapes what the container receives, `ifb` what it sends.

    Done with tbf; `ifb` is created where an egress rate is set. Undone by DropLink(ifb) and `Unshape(port)`.
    """

    port: str
    ifb: str
    bandwidth: Bandwidth
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class Unshape:
    """Remove root and ingress queueing disciplines from `port`; a missing link is success."""

    port: str


@dataclass(frozen=True, slots=True)
class FlushConntrack:
    """Forget UDP flows to these published ports and to these container addresses (both directions)."""

    ports: tuple[PortMap, ...] = ()
    addresses: tuple[Address, ...] = ()


# --- firewall rules: place "firewall" ------------------------------------------------------------------------------
# The same classes say what is wanted, what is seen and what is dropped; a back end turns them into elements or rules.


@dataclass(frozen=True, slots=True)
class Publish:
    """host_ip:port/proto → to:container_port (DNAT), for packets from outside, the node, siblings and itself.

    port.host_ip None = every local address of `to`'s family. home: the interface behind which `to` lives.
    owner: printed in errors and comments.
    """

    port: PortMap
    to: Address
    home: str
    owner: str
    rules: PortRules = field(default_factory=PortRules)


@dataclass(frozen=True, slots=True)
class Masquerade:
    """What `address` sends out through any interface but `home` gets the node's address; multicast never.

    inner: it keeps its own where it leaves through a link that a KeepSource names.
    """

    address: Interface
    home: str
    owner: str
    inner: bool = False


@dataclass(frozen=True, slots=True)
class Accept:
    """Forwarding to and from `address` is accepted even where the host's policy is DROP."""

    address: Address
    home: str
    owner: str


@dataclass(frozen=True, slots=True)
class Fence:
    """Isolation of what lives behind bridge `home`: "same-network" or "isolated". `address` is one member of it."""

    address: Address
    home: str
    policy: str
    owner: str


@dataclass(frozen=True, slots=True)
class PinMac:
    """Frames that enter bridge port `port` with a source MAC other than `mac` are dropped."""

    port: str
    mac: str
    owner: str


@dataclass(frozen=True, slots=True)
class KeepSource:
    """`link` leads to other members of the overlays, who know each other by their own addresses (Masquerade.inner)."""

    link: str
    owner: str


@dataclass(frozen=True, slots=True)
class Guard:
    """Datagrams to UDP `port` of the node are dropped unless a Peer of that port sent them."""

    port: int
    owner: str


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node, whose datagrams to UDP `port` are taken."""

    address: Address
    port: int
    owner: str


@dataclass(frozen=True, slots=True)
class Bar:
    """Nothing from behind `home` goes to UDP `port`, of the node or of anybody: whatever source it claims to have."""

    home: str
    port: int
    owner: str


Rule = Publish | Masquerade | Accept | Fence | PinMac | KeepSource | Guard | Peer | Bar


@dataclass(frozen=True, slots=True)
class AddRule:
    rule: Rule


@dataclass(frozen=True, slots=True)
class DropRule:
    """The rule is gone when this is done; a missing one is success. Only this very rule is removed: an element with
    the same key that now says something else belongs to somebody else and stays."""

    rule: Rule


LinkOp = (
    EnsureBridge
    | AddVeth
    | PlugPort
    | DropLink
    | SetLink
    | PortVlans
    | AddAddress
    | DropAddress
    | AddRoute
    | DropRoute
    | EnsureVxlan
    | AddNeighbour
    | DropNeighbour
    | AddFdb
    | DropFdb
    | AddPolicyRule
    | DropPolicyRule
    | Sysctl
    | Announce
    | ForgetNeighbours
    | Shape
    | Unshape
    | FlushConntrack
)
Op = LinkOp | AddRule | DropRule


@dataclass(frozen=True, slots=True)
class Phase:
    """Operations for one place, done in order.

    netns: a path, for where == "netns" only. firewall: name of the back end, for where == "firewall" only.
    tolerant: the place itself may be gone (a namespace that died): then there is nothing to do. Used by detach.
    """

    where: str
    ops: tuple[Op, ...]
    netns: str = ""
    tolerant: bool = False
    firewall: str = ""


Plan = tuple[Phase, ...]


def steps(plan: Plan) -> Plan:
    """The same plan cut into phases of one operation each: for fault tests and for --dry-run."""
    return tuple(Phase(p.where, (op,), p.netns, p.tolerant, p.firewall) for p in plan for op in p.ops)
