"""The body of POST /v1/run, read and checked: how `towpath run` asks the agent for an attachment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Any

from towpath import schema
from towpath.errors import BadConfig, BadRequest
from towpath.model import Address, Dns, InNetns, Key, Network, PortMap, Request, Take, check_ifname, check_name

ORIGIN = "run"
IFNAME = "eth0"


def parse_address(text: str) -> Address:
    """One IPv4 or IPv6 address; raises BadConfig."""
    try:
        return ip_address(text)
    except ValueError:
        raise BadConfig(f"{text!r} is not an IP address", hint="for example 10.1.0.5 or fd00::5") from None


def parse_port(text: str) -> PortMap:
    """Read `[ADDRESS:]HOST:CONTAINER[/PROTOCOL]`, an IPv6 address in brackets; raises BadConfig."""
    spec, slash, proto = text.partition("/")
    front, _, container = spec.rpartition(":")
    address, colon, host = front.rpartition(":")
    if (slash and not proto) or not (_decimal(host) and _decimal(container)) or (colon and not address):
        raise BadConfig(
            f"port {text!r} is not [ADDRESS:]HOST:CONTAINER[/PROTOCOL]",
            hint="for example 8080:80 or 127.0.0.1:53:53/udp",
        )
    return PortMap(int(host), int(container), proto or "tcp", _host_address(address, text) if colon else None)


def _decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _host_address(text: str, spec: str) -> Address:
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    address = parse_address(bare)
    if isinstance(address, IPv6Address) and bare == text:
        raise BadConfig(f"port {spec!r}: an IPv6 address stands in brackets", hint=f"write [{address}]:HOST:CONTAINER")
    return address


@dataclass(frozen=True, slots=True)
class Run:
    """What is asked for. ports, ip: as on the command line; netns: a path that the agent can open, "" = host mode."""

    network: str
    container: str
    ifname: str = IFNAME
    netns: str = ""
    ports: tuple[str, ...] = ()
    ip: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    name: str = ""
    aliases: tuple[str, ...] = ()
    dns: Dns = field(default_factory=Dns)

    def __post_init__(self) -> None:
        check_name("network name", self.network)
        check_name("container name", self.container)
        check_ifname("ifname", self.ifname)

    @property
    def key(self) -> Key:
        return Key(ORIGIN, self.network, self.container, self.ifname)


def read(body: Mapping[str, Any]) -> Run:
    """Decode a body; raises BadRequest that names the key. `ip` may be one address alone."""
    data = dict(body)
    if isinstance(data.get("ip"), str):
        data["ip"] = [data["ip"]] if data["ip"] else []
    return schema.decode(Run, data, "body")


def request(run: Run, network: Network) -> Request:
    """The request for this network. Raises BadRequest where it asks for what the network's mode cannot give."""
    if network.mode == "host":
        return _host_request(run, network)
    if not run.netns:
        raise BadRequest(f"netns is missing: network {network.name!r} needs a network namespace to put {run.ifname} in")
    ports = tuple(map(parse_port, run.ports))
    if ports and not network.pools:
        raise BadRequest(
            f"network {network.name!r} publishes no ports: it has no subnet, so nobody gets an address",
            hint="leave out -p, or use a network with a subnet: towpath network create NAME --subnet 10.1.0.0/24",
        )
    return Request(
        run.key,
        network,
        ("wire", "address", *(["ports"] if ports else []), "firewall"),
        place=InNetns(run.netns),
        address=Take(static=tuple(map(parse_address, run.ip))),
        dns=run.dns,
        ports=ports,
        isolation=network.isolation,
        labels=tuple(sorted(run.labels.items())),
        aliases=run.aliases,
        name=run.name,
    )


def _host_request(run: Run, network: Network) -> Request:
    if run.netns:
        raise BadRequest(f"network {network.name!r} is the host's own: netns {run.netns!r} has no place there")
    if run.ports or run.ip:
        what = "publishes no ports" if run.ports else "gives no addresses"
        raise BadRequest(
            f"network {network.name!r} {what}: it is the host's own",
            hint="leave out -p and --ip, or use a bridge network",
        )
    labels = tuple(sorted(run.labels.items()))
    return Request(run.key, network, ("wire",), dns=run.dns, labels=labels, aliases=run.aliases, name=run.name)
