"""Published ports: which rules a record's port maps make, and which claims guard them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from towpath.model import Address, Attachment, PortMap
from towpath.plan import FlushConntrack, Phase, Plan, Publish, Sysctl


def targets(record: Attachment) -> dict[int, Address]:
    """Where ports lead: the first address of each family."""
    found: dict[int, Address] = {}
    for address in record.addresses:
        found.setdefault(address.version, address)
    return found


def families(port: PortMap, versions: Iterable[int]) -> Iterator[int]:
    """The families in which this port is published: the container's (`versions`) that the host address allows."""
    for version in versions:
        if port.host_ip is None or port.host_ip.version == version:
            yield version


def rules(record: Attachment) -> Iterator[Publish]:
    to = targets(record)
    for port in record.ports:
        for version in families(port, to):
            yield Publish(port, to[version], record.home, str(record.key), record.port_rules)


def claims(maps: Iterable[PortMap], versions: Collection[int]) -> Iterator[str]:
    """Row keys, unique on a node: `ports/<proto>/<port>/<family>/<host address or *>`."""
    for port in maps:
        for version in families(port, versions):
            anywhere = port.host_ip is None or port.host_ip.is_unspecified
            yield f"ports/{port.proto}/{port.host_port}/{version}/{'*' if anywhere else port.host_ip}"


def clash(claim: str, taken: str) -> bool:
    """Whether two claims of one protocol, port and family exclude each other: equal, or one of them is every address.

    A socket bound to 0.0.0.0 excludes one bound to a single address in the same way (EADDRINUSE, bind(2)).
    """
    return claim == taken or claim.endswith("/*") or taken.endswith("/*")


def plan_localnet(record: Attachment) -> Plan:
    """127.0.0.1:port reaches a container only where `home` may route loopback sources (route_localnet, IPv4 only)."""
    wanted = record.ports and record.home and record.port_rules.snat and 4 in targets(record)
    return (Phase("host", (Sysctl(f"net/ipv4/conf/{record.home}/route_localnet", "1"),)),) if wanted else ()


def plan_forget(record: Attachment) -> Plan:
    """Stale UDP flows would go on to where the port led before (or leads no longer)."""
    udp = tuple(port for port in record.ports if port.proto == "udp")
    return (Phase("host", (FlushConntrack(udp, tuple(record.addresses)),)),) if udp else ()
