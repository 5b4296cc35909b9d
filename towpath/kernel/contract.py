"""What the rest of the house sees of the kernel: apply a plan, look, and hear that somebody else changed something.

`towpath.kernel.apply.LinuxKernel` is the real one; tests use `tests.fakes.FakeKernel`, which holds state and can be
told to fail.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from towpath.model import Address, Interface, Route
from towpath.plan import Plan, Rule, TunnelEntry
from towpath.timings import Timings


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """One link as rtnetlink tells it. `master`: name of its bridge, "" = none; peer_index: IFLA_LINK of a veth."""

    name: str
    index: int
    kind: str
    mac: str
    mtu: int
    up: bool
    master: str = ""
    peer_index: int = 0
    promiscuous: bool = False
    alias: str = ""
    allmulti: bool = False
    tx_queue: int = 0


@dataclass(frozen=True, slots=True)
class NetnsSeen:
    """What one network namespace holds."""

    links: tuple[LinkSeen, ...]
    addresses: tuple[tuple[str, Interface], ...]  # (link name, address)
    routes: tuple[tuple[str, Route], ...]  # (link name, route), main table

    def link(self, name: str) -> LinkSeen | None:
        return next((link for link in self.links if link.name == name), None)


@dataclass(frozen=True, slots=True)
class ShapeSeen:
    """Queueing disciplines of one link: root kind and rate in bits/s (tbf), burst in bits."""

    link: str
    kind: str
    rate: int
    burst: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a back end should hold: `settled` must be there, `moving` (an ADD or DEL is under way) may be."""

    settled: tuple[Rule, ...]
    moving: tuple[Rule, ...] = ()


class Firewall(Protocol):
    """One back end: "nftables" or "iptables"."""

    name: str

    quick: bool
    """A commit is a fraction of a millisecond: worth no queue. False: it starts a program, so many are done as one."""

    def commit(self, changes: tuple[object, ...]) -> int:
        """AddRule / DropRule in one transaction; the skeleton is put in first where it is missing.

        Returns how many transactions of nf_tables it made, -1 where that is not known. Raises PhaseFailed.
        """
        ...

    def seen(self) -> frozenset[object]:
        """Fingerprints of what is installed: compare with `fingerprints(rules)`. Unknown foreign rules are left out."""
        ...

    def fingerprints(self, rules: Iterable[Rule]) -> frozenset[object]: ...

    def heal(self, wanted: Iterable[Rule]) -> int:
        """Bring the back end to exactly `wanted`; returns how many things had to change (0 = nothing written)."""
        ...

    def remove(self) -> None:
        """Everything of ours leaves the kernel."""
        ...

    def describe(self, rule: Rule) -> str: ...


class Kernel(Protocol):
    timings: Timings
    """How long the kernel took: "links", "firewall", "undo firewall", "undo links"."""

    async def apply(self, plan: Plan) -> None:
        """Do the phases in order. Raises PhaseFailed at the first that fails: earlier ones stay done.

        BadNetns where a namespace that an intolerant phase or an AddVeth names is gone or none.
        """
        ...

    async def look(self, netns: str = "") -> NetnsSeen:
        """Everything in one namespace ("" = the agent's own). Raises BadNetns where the path is no namespace."""
        ...

    async def link(self, name: str, netns: str = "") -> LinkSeen | None: ...

    async def shapes(self, link: str) -> tuple[ShapeSeen, ...]: ...

    async def tunnel_entries(self, link: str, table: int) -> frozenset[TunnelEntry]:
        """What somebody wrote down about the tunnel device `link`, as the operations that would write it.

        Its permanent neighbours and forwarding entries; our policy rules; every route of the main table and of `table`,
        through whatever link, but for those that came with an address. Nothing of the link where there is none.
        """
        ...

    async def route_device(self, address: Address) -> str:
        """Name of the link through which the node reaches `address`; "" = none."""
        ...

    async def sysctl(self, path: str, netns: str = "") -> str | None:
        """Value of /proc/sys/<path> in that namespace; None where there is no such file."""
        ...

    def netns_id(self, path: str) -> int:
        """Inode of the namespace at `path`; 0 where there is none (also a plain file that is no namespace)."""
        ...

    def own_netns_id(self) -> int: ...

    def firewall(self, name: str) -> Firewall:
        """The back end of that name. Raises Unavailable where the host lacks it, with what is missing."""
        ...

    def pick_firewall(self, setting: str) -> str:
        """ "auto" → "iptables" where a foreign iptables manager owns the filter table, else "nftables"."""
        ...

    async def heal(self, firewall: str, wanted: Callable[[], Wanted]) -> int:
        """Firewall.heal, in turn with the commits of apply (one writer); `wanted` is asked when the turn has come.

        Returns how many things had to be changed.
        """
        ...

    async def touched(self, firewall: str) -> bool:
        """Whether somebody but us may have written to nf_tables since the last heal of this back end."""
        ...

    def changes(self) -> AsyncIterator[str]:
        """ "firewall", "links" or "addresses" each time somebody changed them; coalesced, never blocking the kernel."""
        ...

    def route_changes(self) -> AsyncIterator[str]:
        """ "routes" each time somebody changed routes, neighbours or policy rules, at most once a second."""
        ...

    async def close(self) -> None: ...
