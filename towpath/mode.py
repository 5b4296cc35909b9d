"""What a network mode is: a record in, a plan out. Modes are found by name through the entry points `towpath.modes`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Protocol

from towpath.errors import BadConfig
from towpath.kernel.contract import NetnsSeen
from towpath.model import Attachment, Interface, Network
from towpath.plan import Plan


@dataclass(frozen=True, slots=True)
class Node:
    """This machine as a network sees it."""

    name: str
    addresses: tuple[Interface, ...] = ()


class Mode(Protocol):
    """Pure: no kernel, no store. One instance serves every network of its mode."""

    name: str
    needs_netns: bool

    def plan_network(self, network: Network) -> Plan:
        """What the network needs once per node (its bridge). Run again it changes nothing."""
        ...

    def check_network(self, network: Network, seen: NetnsSeen) -> str:
        """Why this node cannot carry the network as things are; "" = it can."""
        ...

    def network_is_up(self, network: Network, seen: NetnsSeen) -> bool:
        """Whether plan_network would change nothing."""
        ...

    def replace_addresses(self, network: Network, seen: NetnsSeen) -> Plan:
        """What must go first where the network may replace others' addresses (forceAddress)."""
        ...

    def plan_drop_network(self, network: Network) -> Plan: ...

    def home(self, network: Network) -> str:
        """The interface behind which attachments live; "" = none."""
        ...

    def plan_attach(self, record: Attachment, network: Network) -> Plan:
        """The wire of one container: links, addresses, routes. Its other parts are planned in towpath/parts/."""
        ...

    def plan_plug(self, record: Attachment, network: Network) -> Plan:
        """The wire that exists is joined to the network's device again, which was made anew."""
        ...

    def plan_detach(self, record: Attachment) -> Plan:
        """Take the wire away: only what the record claims; needs neither the netns nor the network's row."""
        ...

    def check(self, record: Attachment, network: Network, node: NetnsSeen, inside: NetnsSeen) -> Iterable[str]:
        """In words, each way in which the kernel differs from the record."""
        ...


@cache
def installed() -> dict[str, Mode]:
    """Every mode of every installed package, by name."""
    found: dict[str, Mode] = {point.name: point.load()() for point in entry_points(group="towpath.modes")}
    if not found:
        raise BadConfig("no network modes installed", hint="run: pip install -e .")
    return found


def get(name: str) -> Mode:
    modes = installed()
    if name not in modes:
        raise BadConfig(f"mode {name!r} is not installed", hint=f"installed modes: {', '.join(sorted(modes))}")
    return modes[name]
