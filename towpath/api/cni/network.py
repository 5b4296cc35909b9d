"""The row that a configuration asks for: keys of the reference's bridge and host-local plug-ins as a Network.

Only keys that are stated are compared with a row that exists; the reference's defaults count when the row is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from towpath.errors import BadConfig
from towpath.model import Dns, Network, Pool, Take, Trunk
from towpath.ranges import parse_pools, parse_range

from .conf import Conf
from .pieces import isolation, unsupported
from .results import Ip, check_fits, read_routes
from .section import Section

OWN_IPAM = ("towpath-ipam", "towpath")
REFERENCE_BRIDGE = "cni0"
FLAGS = {  # key of the configuration → field of the row
    "isGateway": "gateway",
    "isDefaultGateway": "default_route",
    "forceAddress": "force_address",
    "ipMasq": "masquerade",
    "hairpinMode": "hairpin",
    "promiscMode": "promiscuous",
    "portIsolation": "port_isolation",
    "preserveDefaultVlan": "preserve_default_vlan",
    "macspoofchk": "spoof_check",
    "enabledad": "dad",
    "deferredDelete": "deferred_delete",
}
REFERENCE_DEFAULTS = {"gateway": False, "default_route": False, "masquerade": False, "hairpin": False}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row as the configuration says it; `given`: the fields that it states."""

    network: Network
    given: frozenset[str]


def row_name(conf: Conf) -> str:
    """The row's name: the key `network`, else the CNI name."""
    return conf.body.text("network") or conf.name


def origin(conf: Conf) -> str:
    """The `origin` of this configuration's keys: a GC of one CNI network spares another one on the same row."""
    return "cni" if row_name(conf) == conf.name else f"cni:{conf.name}"


# --- IPAM ------------------------------------------------------------------------------------------------------------


def ipam_type(conf: Conf) -> str:
    """The type of the IPAM plug-in; "" where there is none."""
    section = conf.body.section("ipam")
    kind = section.text("type")
    if section and not kind:
        raise BadConfig("ipam.type is missing")
    return check_plugin_name("ipam.type", kind)


def check_plugin_name(where: str, kind: str) -> str:
    """CNI spec 1.1.0 section 1: a type names a file, it may hold nothing that leads to another directory."""
    if "/" in kind or kind in (".", ".."):
        raise BadConfig(f"{where} {kind!r} is no plug-in name: it names a file in CNI_PATH")
    return kind


def ipam_pools(conf: Conf) -> tuple[Pool, ...]:
    """The pools that `ipam` states: the old single form first, then `ranges`; () where it states none."""
    section = conf.body.section("ipam")
    if section.text("type") not in OWN_IPAM:
        return ()
    ranges = list(section.items("ranges"))
    if "subnet" in section:
        ranges.insert(0, [{k: section.raw[k] for k in ("subnet", "rangeStart", "rangeEnd", "gateway") if k in section}])
    return parse_pools(ranges, "ipam.ranges")


def extra_pools(conf: Conf) -> tuple[Pool, ...]:
    """Pools of the runtime (capability ipRanges), which come before the network's."""
    return parse_pools(conf.runtime.items("ipRanges"), "runtimeConfig.ipRanges")


def check_pools(conf: Conf, take: Take, network: Network) -> None:
    """Raise BadConfig where the pools cannot serve the call: none, too many for its version, not these addresses."""
    pools = (*take.extra, *network.pools)
    if not pools:
        raise BadConfig(f"no IP ranges specified for network {network.name!r}: ipam.subnet, ipam.ranges")
    check_fits(conf.version, (pool.ranges[0].start for pool in pools))
    for address in take.static:
        home = next((span for pool in pools for span in pool.ranges if address in span), None)
        if home is None:
            raise BadConfig(
                f"address {address} is in no range of network {network.name!r}: {', '.join(map(str, pools))}"
            )
        if address == home.gateway:
            raise BadConfig(f"address {address} is the gateway of network {network.name!r}")


def ipam_dns(conf: Conf) -> Dns:
    path = conf.body.section("ipam").text("resolvConf")
    if not path or conf.body.section("ipam").text("type") not in OWN_IPAM:
        return Dns()
    try:
        return parse_resolv_conf(Path(path).read_text(errors="replace"))
    except OSError as exc:
        raise BadConfig(f"ipam.resolvConf {path!r} cannot be read: {exc.strerror}") from exc


def parse_resolv_conf(text: str) -> Dns:
    """resolv.conf(5): the last `domain` and `search` count, options and servers add up."""
    servers: list[str] = []
    options: list[str] = []
    search: tuple[str, ...] = ()
    domain = ""
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0][0] in "#;":
            continue
        if words[0] == "nameserver":
            servers.append(words[1])
        elif words[0] == "domain":
            domain = words[1]
        elif words[0] == "search":
            search = tuple(words[1:])
        elif words[0] == "options":
            options += words[1:]
    return Dns(tuple(servers), domain, search, tuple(options))


# --- the bridge's keys -----------------------------------------------------------------------------------------------


def wanted_bridge(conf: Conf, answered: Iterable[Ip] = ()) -> Wanted:
    """The row of a bridge network. `answered`: addresses that a foreign IPAM gave, whose gateways the bridge takes."""
    body = conf.body
    stated: dict[str, Any] = {field: body.flag(key) for key, field in FLAGS.items() if key in body}
    if stated.get("default_route"):
        stated["gateway"] = True
    stated |= _numbers(body) | _ranges(conf, answered if stated.get("gateway") else ())
    if "bridge" in body:
        stated["bridge"] = body.text("bridge")
    if "isolation" in body:
        stated["isolation"] = isolation(body, "isolation")
    if "vlanTrunk" in body:
        stated["trunk"] = tuple(t for item in body.sections("vlanTrunk") for t in _trunks(item))
    _check_bridge(conf, stated)
    bridge = "" if "network" in body else REFERENCE_BRIDGE
    defaults = REFERENCE_DEFAULTS | {"bridge": bridge, "source": "cni"}
    return Wanted(Network(row_name(conf), mode="bridge", **(defaults | stated)), frozenset(stated))


def _numbers(body: Section) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if body.number("mtu"):
        found["mtu"] = body.number("mtu", low=68, high=65535)
    if "vlan" in body:
        found["vlan"] = body.number("vlan", high=4094)
    return found


def _ranges(conf: Conf, answered: Iterable[Ip]) -> dict[str, Any]:
    section = conf.body.section("ipam")
    found: dict[str, Any] = {}
    if pools := ipam_pools(conf) or tuple(map(_pool_around, answered)):
        found["pools"] = pools
    if "routes" in section and section.text("type") in OWN_IPAM:
        found["routes"] = read_routes(section)
    if section.text("dataDir") and section.text("type") in OWN_IPAM:
        found["data_dir"] = section.text("dataDir")
    return found


def _pool_around(ip: Ip) -> Pool:
    """The pool that a foreign IPAM's answer lets us see: it says what the bridge's own address is."""
    raw = {"subnet": str(ip.address.network)} | ({"gateway": str(ip.gateway)} if ip.gateway else {})
    return Pool((parse_range(raw, f"the IPAM plug-in's answer {ip.address}"),))


def _trunks(item: Section) -> list[Trunk]:
    """`{minID, maxID}` and `{id}`, which may stand together."""
    if ("minID" in item) != ("maxID" in item):
        raise BadConfig(f"{item.where}: minID and maxID need each other")
    found = []
    if "minID" in item:
        span = Trunk(item.number("minID", low=1, high=4094), item.number("maxID", low=1, high=4094))
        if span.first > span.last:
            raise item.wrong("minID", f"is above maxID {span.last}")
        found.append(span)
    if "id" in item:
        number = item.number("id", low=1, high=4094)
        found.append(Trunk(number, number))
    if not found:
        raise BadConfig(f"{item.where}: neither id nor minID and maxID")
    return found


def _check_bridge(conf: Conf, stated: dict[str, Any]) -> None:
    body = conf.body
    if stated.get("hairpin") and stated.get("promiscuous"):
        raise BadConfig("cannot set hairpin mode and promiscuous mode at the same time: hairpinMode, promiscMode")
    body.choice("ipMasqBackend", ("", "iptables", "nftables"))
    if body.flag("reserveHostPort"):
        raise unsupported(body, "reserveHostPort", "host ports are claimed in the agent's table, not by a socket")
    if body.flag("disableContainerInterface"):
        if ipam_type(conf):
            raise BadConfig("disableContainerInterface true cannot be used with ipam: what is down has no IP")
        stated["interface_up"] = False
