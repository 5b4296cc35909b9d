"""The result of a CNI call in every version of its form, 0.1.0 to 1.1.0, and back again.

One internal form (that of 1.1.0) is converted at the door. CNI spec: SPEC.md "Success" of each version; the forms are
told apart by their shape, because a prevResult does not always carry its version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from towpath.errors import BadConfig, BadVersion, Undecodable
from towpath.model import Address, Dns, Interface, Route

from .section import Section

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = VERSIONS[-1]
SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}  # SPEC.md, "CNI operations"


@dataclass(frozen=True, slots=True)
class Link:
    """One interface of a result. `sandbox` is the path of its network namespace, "" = the node's own."""

    name: str
    mac: str = ""
    sandbox: str = ""
    mtu: int = 0
    socket_path: str = ""
    pci_id: str = ""


@dataclass(frozen=True, slots=True)
class Ip:
    """One address of a result; `interface` is an index into its interfaces."""

    address: Interface
    gateway: Address | None = None
    interface: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    interfaces: tuple[Link, ...] = ()
    ips: tuple[Ip, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Dns = field(default_factory=Dns)

    def index(self, ifname: str) -> int | None:
        """Where the container's interface of that name stands among the interfaces."""
        return next((i for i, link in enumerate(self.interfaces) if link.name == ifname and link.sandbox), None)

    def of(self, ifname: str) -> tuple[Ip, ...]:
        """Addresses of the container's interface; one that names no interface counts (old runtimes leave it out)."""
        wanted = self.index(ifname)
        return tuple(ip for ip in self.ips if ip.interface is None or ip.interface == wanted)


def at_least(version: str, since: str) -> bool:
    return VERSIONS.index(version) >= VERSIONS.index(since)


def is_old(version: str) -> bool:
    """Whether results of this version are the ip4/ip6 form."""
    return not at_least(version, "0.3.0")


def check_version(version: str, command: str) -> None:
    """Raise BadVersion where the version is not served, or has no such command yet."""
    if version not in VERSIONS:
        raise BadVersion(
            "incompatible CNI versions", hint=f'config is "{version}", plugin supports [{" ".join(VERSIONS)}]'
        )
    since = SINCE.get(command, VERSIONS[0])
    if not at_least(version, since):
        raise BadVersion(f"config version {version} does not allow {command}", hint=f"{command} came with {since}")


def check_fits(version: str, addresses: Iterable[Interface | Address]) -> None:
    """Raise BadConfig where the form of this version cannot carry the addresses: one per family, and at least one."""
    if not is_old(version):
        return
    families = [address.version for address in addresses]
    if not families:
        raise BadConfig(f"CNI version {version} needs an IP address in its result, and this network gives none")
    if len(families) > len(set(families)):
        raise BadConfig(f"CNI version {version} does not support more than 1 address per family")


# --- out -------------------------------------------------------------------------------------------------------------


def encode(result: Result, version: str) -> dict[str, Any]:
    """The result in the form of `version`. Raises BadConfig where that form cannot carry it."""
    check_fits(version, (ip.address for ip in result.ips))
    body: dict[str, Any] = {"cniVersion": version}
    if is_old(version):
        body |= _old_families(result)
    else:
        body["interfaces"] = [_link(link, version) for link in result.interfaces]
        body["ips"] = [_ip(ip, version) for ip in result.ips]
        body["routes"] = [_route(route, version) for route in result.routes]
    body["dns"] = encode_dns(result.dns)
    return body


def _old_families(result: Result) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for ip in result.ips:
        routes = [_route(route, "0.2.0") for route in result.routes if route.dst.version == ip.address.version]
        body[f"ip{ip.address.version}"] = _present(ip=str(ip.address), gateway=_text(ip.gateway), routes=routes)
    return body


def _present(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in ("", 0, None, [], ())}


def _text(value: object | None) -> str:
    return "" if value is None else str(value)


def _link(link: Link, version: str) -> dict[str, Any]:
    body = {"name": link.name} | _present(mac=link.mac, sandbox=link.sandbox)
    if at_least(version, "1.1.0"):
        body |= _present(mtu=link.mtu, socketPath=link.socket_path, pciID=link.pci_id)
    return body


def _ip(ip: Ip, version: str) -> dict[str, Any]:
    body: dict[str, Any] = {} if at_least(version, "1.0.0") else {"version": str(ip.address.version)}
    if ip.interface is not None:
        body["interface"] = ip.interface
    return body | _present(address=str(ip.address), gateway=_text(ip.gateway))


def _route(route: Route, version: str) -> dict[str, Any]:
    body = _present(dst=str(route.dst), gw=_text(route.gw))
    if at_least(version, "1.1.0"):
        body |= _present(mtu=route.mtu, advmss=route.advmss, priority=route.priority, table=route.table)
        if route.scope is not None:
            body["scope"] = route.scope
    return body


def encode_dns(dns: Dns) -> dict[str, Any]:
    return _present(
        nameservers=list(dns.nameservers), domain=dns.domain, search=list(dns.search), options=list(dns.options)
    )


# --- in --------------------------------------------------------------------------------------------------------------


def decode(raw: Mapping[str, Any], where: str) -> Result:
    """Read a result of any version. Raises Undecodable or BadConfig naming the field."""
    section = Section(raw, where)
    if "ip4" in section or "ip6" in section:
        return _decode_old(section)
    result = Result(
        tuple(_read_link(item) for item in section.sections("interfaces")),
        tuple(_read_ip(item) for item in section.sections("ips")),
        read_routes(section),
        read_dns(section.section("dns")),
    )
    for index, ip in enumerate(result.ips):
        if ip.interface is not None and ip.interface >= len(result.interfaces):
            raise Undecodable(f"{where}.ips[{index}].interface {ip.interface} is beyond the interfaces")
    return result


def _decode_old(section: Section) -> Result:
    ips: list[Ip] = []
    routes: list[Route] = []
    for family in (4, 6):
        if f"ip{family}" not in section:
            continue
        part = section.section(f"ip{family}")
        ips.append(Ip(part.interface("ip"), part.address("gateway")))
        if ips[-1].address.version != family:
            raise part.wrong("ip", f"is not an IPv{family} address")
        routes += read_routes(part)
    return Result((), tuple(ips), tuple(routes), read_dns(section.section("dns")))


def _read_link(item: Section) -> Link:
    if not item.text("name"):
        raise Undecodable(f"{item.where}: an interface without name")
    return Link(
        item.text("name"),
        item.text("mac"),
        item.text("sandbox"),
        item.number("mtu"),
        item.text("socketPath"),
        item.text("pciID"),
    )


def _read_ip(item: Section) -> Ip:
    index = item.number("interface", high=2**31 - 1) if "interface" in item else None
    return Ip(item.interface("address"), item.address("gateway"), index)


def read_routes(section: Section, key: str = "routes") -> tuple[Route, ...]:
    """Routes of a result or of an IPAM configuration: `dst`, `gw`; since 1.1.0 also mtu, advmss, priority and so on."""
    return tuple(_read_route(item) for item in section.sections(key))


def _read_route(item: Section) -> Route:
    route = Route(
        item.subnet("dst"),
        item.address("gw"),
        item.number("mtu"),
        item.number("advmss"),
        item.number("priority"),
        item.number("table"),
        item.number("scope", high=255) if "scope" in item else None,
    )
    if route.gw is not None and route.gw.version != route.dst.version:
        raise item.wrong("gw", f"is of another family than {route.dst}")
    return route


def read_dns(section: Section) -> Dns:
    return Dns(section.texts("nameservers"), section.text("domain"), section.texts("search"), section.texts("options"))
