"""Read the agent's YAML into records; a mistake names file, line and key, and what would be right.

Every key is in one of two tables, KEYS (of the file) and NETWORK_KEYS (of each entry of `networks`), with its meaning;
defaults are those of the records. `towpath config show` and the documentation are made from the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from towpath.errors import BadConfig
from towpath.model import Network, Pool, Range, Subnet, check_name
from towpath.ranges import YAML, at, read_address, read_pools, read_range, refuse_overlap
from towpath.schema import Misfit, read_strictly, unknown_key

if TYPE_CHECKING:
    import yaml

MODES = ("host", "bridge")  # those that are shipped; the agent may know more by their entry points


@dataclass(frozen=True, slots=True)
class Cni:
    bin_dir: str = "/opt/cni/bin"


@dataclass(frozen=True, slots=True)
class Config:
    """What the agent of one node is told. node "" = the host name."""

    node: str = ""
    state_dir: str = "/var/lib/towpath"
    socket: str = "/run/towpath/agent.sock"
    firewall: str = "auto"
    log_level: str = "info"
    log_format: str = "text"
    cni: Cni = field(default_factory=Cni)
    networks: tuple[Network, ...] = ()


# --- the tables ------------------------------------------------------------------------------------------------------


class Described(NamedTuple):
    """One key as people read about it."""

    key: str
    type: str
    default: str
    meaning: str


class Key(NamedTuple):
    """check raises Misfit for a value of the right type that cannot work."""

    name: str
    type: str
    meaning: str
    check: Callable[[Any], None] = lambda value: None


def _one_of(*words: str) -> Callable[[str], None]:
    def check(value: str) -> None:
        if value not in words:
            raise Misfit(f"{value!r} is not one of {', '.join(words)}")

    return check


def _absolute(value: str) -> None:
    if not value.startswith("/"):
        raise Misfit(f"{value!r} is not an absolute path", hint="it must not depend on where the agent is started")


def _socket(value: str) -> None:
    _absolute(value)
    if len(value.encode()) > 107:  # sockaddr_un.sun_path is 108 bytes with its final zero: unix(7)
        raise Misfit(f"{value!r} is too long for a unix socket: 107 bytes at most")


def _node(value: str) -> None:
    if value:
        check_name("node", value)


def _between(low: int, high: int) -> Callable[[int], None]:
    def check(value: int) -> None:
        if value and not low <= value <= high:
            raise Misfit(f"{value} is not 0 or {low} to {high}")

    return check


KEYS = (
    Key("node", "text", "name of this node; empty = the host name", _node),
    Key("state_dir", "path", "where the agent keeps leases and attachments", _absolute),
    Key("socket", "path", "where the agent listens for CNI executables and the command line", _socket),
    Key(
        "firewall",
        "auto, nftables or iptables",
        "back end for ports, masquerade and isolation; auto = iptables where somebody else manages it, else nftables",
        _one_of("auto", "nftables", "iptables"),
    ),
    Key("log_level", "debug, info, warning or error", "what is logged", _one_of("debug", "info", "warning", "error")),
    Key("log_format", "text or json", "how it is logged", _one_of("text", "json")),
    Key("cni.bin_dir", "path", "where `towpath cni install` puts the executables, unless it is told", _absolute),
    Key("networks", "list of networks", "networks of this node: see the keys of a network"),
)

NETWORK_KEYS = (
    Key("name", "text", "name of the network; required"),
    Key("mode", "host or bridge", "host = the node's own network, bridge = a bridge of its own"),
    Key("bridge", "text", "name of the bridge device; empty = made from the network's name"),
    Key("subnet", "subnet", "the one subnet of the network; an attachment gets one address of it"),
    Key("range_start", "address", "first address to lease of `subnet`; the subnet's first unless given"),
    Key("range_end", "address", "last address to lease of `subnet`; the subnet's last unless given"),
    Key("subnets", "list of subnets", "in place of `subnet`: an attachment gets one address of each"),
    Key(
        "ranges",
        "list of lists of {subnet, range_start, range_end, gateway}",
        "in place of `subnet`: an attachment gets one address of each list",
    ),
    Key("gateway", "true, false, address or list of addresses", "whether the bridge is the gateway, and its addresses"),
    Key("default_route", "true or false", "containers get a default route through the gateway"),
    Key("force_address", "true or false", "a different gateway address on an existing bridge is replaced"),
    Key("masquerade", "true or false", "what leaves the network gets the node's address"),
    Key("isolation", "open, same-network or isolated", "who may reach the containers of the network"),
    Key("port_isolation", "true or false", "bridge ports reach the gateway but not one another"),
    Key("hairpin", "true or false", "a container reaches its own published port; false with `promiscuous`"),
    Key("promiscuous", "true or false", "the bridge takes every frame; excludes `hairpin`"),
    Key("mtu", "bytes", "MTU of the interfaces; 0 = the kernel's", _between(68, 65535)),
    Key("vlan", "VLAN id", "containers are untagged members of this VLAN; 0 = none", _between(1, 4094)),
    Key("trunk", "list of {first, last}", "VLAN ids that containers get tagged"),
    Key("preserve_default_vlan", "true or false", "container ports stay members of the bridge's default VLAN"),
    Key("spoof_check", "true or false", "frames with a MAC that is not the container's are dropped"),
    Key("dad", "true or false", "IPv6 duplicate address detection in containers"),
    Key("interface_up", "true or false", "the container's interface is set up"),
    Key("deferred_delete", "true or false", "DEL answers before the interface is gone"),
    Key("routes", "list of {dst, gw, mtu, advmss, priority, table, scope}", "further routes of containers"),
    Key("dns", "{nameservers, domain, search, options}", "passed to runtimes for the container's resolv.conf"),
    Key("data_dir", "path", "a host-local directory whose reservations are adopted when the network is made"),
)
# Special-purpose address registries (RFC 6890): what no interface of a container can have.
RESERVED = {
    ip_network("0.0.0.0/8"): "this host",
    ip_network("127.0.0.0/8"): "loopback",
    ip_network("224.0.0.0/4"): "multicast",
    ip_network("::/16"): "loopback and mapped addresses",
    ip_network("fe80::/10"): "link-local: every interface has it",
    ip_network("ff00::/8"): "multicast",
}
_ADDRESSING = ("subnet", "range_start", "range_end", "subnets", "ranges")
_OF_HOST = ("name", "mode", "dns")


def describe() -> tuple[Described, ...]:
    """(key, type, default, meaning) of every key of the file; see value() for what a Config has there."""
    return tuple(Described(k.name, k.type, _text(value(Config(), k.name)), k.meaning) for k in KEYS)


def describe_network() -> tuple[Described, ...]:
    """The same for the keys of one network."""
    plain = Network("x")
    defaults = {"name": "", "gateway": _text(True)}
    return tuple(
        Described(k.name, k.type, defaults.get(k.name, _text(getattr(plain, k.name, ""))), k.meaning)
        for k in NETWORK_KEYS
    )


def value(config: Config, key: str) -> Any:
    """The value of a key of describe(): value(config, "cni.bin_dir")."""
    return attrgetter(key)(config)


def _text(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None or default == () or not isinstance(default, str | int | tuple) else str(default)


# --- the file --------------------------------------------------------------------------------------------------------


def load(path: str | Path, *, modes: Collection[str] = MODES) -> Config:
    """Read the file. Raises BadConfig naming file, line and key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise BadConfig(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise BadConfig(f"{path} is no text: byte {exc.start} is not UTF-8") from exc
    return parse(text, str(path), modes=modes)


def parse(text: str, where: str = "configuration", *, modes: Collection[str] = MODES) -> Config:
    """Build a Config from YAML. modes: the network modes that are known.

    Raises BadConfig "<where>:<line>: <path of the key>: what is wrong".
    """
    data, tree = _read_yaml(text, where)
    try:
        return _config(data, modes)
    except Misfit as misfit:
        raise misfit.as_error(f"{where}:{_line(tree, misfit)}") from None


def _config(data: Any, modes: Collection[str]) -> Config:
    if data is None:
        return Config()
    if not isinstance(data, dict):
        raise Misfit(f"{data!r} is not a mapping of keys", hint=f"known keys: {', '.join(_names(KEYS))}")
    rest = {key: item for key, item in data.items() if key != "networks"}
    config = read_strictly(Config, rest)
    for key in KEYS:
        _check(key, value(config, key.name))
    networks = at("networks", lambda raw: _networks(raw, modes), data.get("networks") or ())
    return replace(config, networks=networks)


def _names(keys: Iterable[Key]) -> list[str]:
    return list(dict.fromkeys(key.name.partition(".")[0] for key in keys))


def _check(key: Key, found: Any) -> None:
    try:
        key.check(found)
    except Misfit as misfit:
        raise misfit.below(*key.name.split(".")) from None
    except BadConfig as exc:
        raise Misfit(exc.what, hint=exc.hint).below(*key.name.split(".")) from None


def _read_yaml(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """The data, and the tree of nodes that knows its lines."""
    import yaml  # 15 ms and 2 MB that most commands do without

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        tree = loader.get_single_node()
        if tree is None:
            return None, None
        _refuse_twice(tree, where, set())
        return loader.construct_document(tree), tree
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        what = " ".join(filter(None, (exc.context, exc.problem)))
        raise BadConfig(f"{where}:{mark.line + 1 if mark else 1}: {what}", hint="it is not valid YAML") from None
    except (yaml.YAMLError, ValueError) as exc:  # a character that YAML forbids; 2024-13-45 as a date
        raise BadConfig(f"{where}: {' '.join(str(exc).split())}", hint="it is not valid YAML") from None
    except RecursionError:
        raise BadConfig(f"{where}: nested too deeply") from None
    finally:
        loader.dispose()


def _refuse_twice(node: yaml.Node, where: str, seen: set[int]) -> None:
    """YAML forbids a key that is given twice (1.2 section 3.2.1.1); the parser would silently take the last one."""
    import yaml

    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, where, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise BadConfig(f"{where}:{line}: key {key.value!r} is given twice, first in line {lines[key.value]}")
            _refuse_twice(item, where, seen)


def _line(tree: yaml.Node | None, misfit: Misfit) -> int:
    """Where the mistake stands in the file, counted from 1; of the nearest thing around it that has a line."""
    import yaml

    node, line = tree, 1
    for step in (*misfit.path, misfit.key):
        found = None
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            found = (node.value[step], node.value[step])
        elif isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == step), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


# --- networks --------------------------------------------------------------------------------------------------------


def network_from(
    raw: Mapping[str, Any], where: str = "network", *, source: str = "cli", modes: Collection[str] = MODES
) -> Network:
    """Build a Network from the keys that people write (NETWORK_KEYS). Raises BadConfig "<where>: <key>: …"."""
    try:
        return replace(_network(raw, modes), source=source)
    except Misfit as misfit:
        raise misfit.as_error(where) from None


def _networks(raw: Any, modes: Collection[str]) -> tuple[Network, ...]:
    if not isinstance(raw, (list, tuple)):
        raise Misfit(f"{raw!r} is not a list of networks")
    networks = tuple(replace(at(i, lambda one: _network(one, modes), one), source="yaml") for i, one in enumerate(raw))
    _refuse_clashes(networks)
    return networks


def _network(raw: Any, modes: Collection[str]) -> Network:
    if not isinstance(raw, Mapping):
        raise Misfit(f"{raw!r} is not a network", hint="such as {name: web, subnet: 10.1.0.0/24}")
    names = _names(NETWORK_KEYS)
    for key in raw:
        if key not in names:
            raise unknown_key(key, names)
    plain = {key: item for key, item in raw.items() if key not in (*_ADDRESSING, "gateway")}
    if isinstance(raw.get("gateway"), bool):
        plain["gateway"] = raw["gateway"]
    if raw.get("promiscuous") is True:
        if raw.get("hairpin") is True:
            raise Misfit("true excludes hairpin: true").below("promiscuous")
        plain["hairpin"] = False  # on by default, and the bridge can do only one of the two
    network: Network = read_strictly(Network, plain)
    _check_values(network, raw, modes)
    return replace(network, pools=_pools(raw))


def _check_values(network: Network, raw: Mapping[str, Any], modes: Collection[str]) -> None:
    at("mode", _one_of(*modes), network.mode)
    if network.mode == "host":
        for key in raw:
            if key not in _OF_HOST:
                raise Misfit("has no meaning for mode host, which is the node's own network").below(key)
    for known in NETWORK_KEYS:
        if known.name not in _ADDRESSING:
            _check(known, getattr(network, known.name))
    at("dns", lambda servers: at("nameservers", _addresses, servers), network.dns.nameservers)
    for i, trunk in enumerate(network.trunk):
        if not 0 < trunk.first <= trunk.last < 4095:
            raise Misfit(f"{trunk.first} to {trunk.last} are not VLAN ids in order: 1 to 4094").below("trunk", i)
    if network.data_dir:
        at("data_dir", _absolute, network.data_dir)


def _pools(raw: Mapping[str, Any]) -> tuple[Pool, ...]:
    """From one of `subnet`, `subnets` and `ranges`; `gateway` may set the gateways' addresses."""
    given = [key for key in ("subnet", "subnets", "ranges") if raw.get(key) is not None]
    if len(given) > 1:
        raise Misfit(f"excludes {given[0]}: one of them says all").below(given[1])
    for key in ("range_start", "range_end"):
        if raw.get(key) is not None and given != ["subnet"]:
            raise Misfit("goes with subnet only", hint="inside ranges, each range has its own").below(key)
    pools: tuple[Pool, ...] = ()
    if given == ["subnet"]:
        pools = (Pool((read_range({key: raw.get(key) for key in ("subnet", "range_start", "range_end")}, YAML),)),)
    elif given == ["subnets"]:
        pools = at("subnets", _subnet_pools, raw["subnets"])
    elif given == ["ranges"]:
        pools = at("ranges", _range_pools, raw["ranges"])
    for span in (span for pool in pools for span in pool.ranges):
        at(given[0], _refuse_reserved, span.subnet)
    gateway = raw.get("gateway")
    return pools if gateway is None or isinstance(gateway, bool) else at("gateway", lambda g: _with(pools, g), gateway)


def _refuse_reserved(subnet: Subnet) -> None:
    for reserved, what in RESERVED.items():
        if subnet.version == reserved.version and subnet.overlaps(reserved):
            raise Misfit(f"{subnet} cannot be a network of containers: {reserved} is {what}")


def _subnet_pools(raw: Any) -> tuple[Pool, ...]:
    if not isinstance(raw, (list, tuple)):
        raise Misfit(f"{raw!r} is not a list of subnets")
    pools = tuple(Pool((at(i, _whole, subnet),)) for i, subnet in enumerate(raw))
    refuse_overlap(pools)
    return pools


def _whole(subnet: Any) -> Range:
    try:
        return read_range({"subnet": subnet}, YAML)
    except Misfit as misfit:
        raise Misfit(misfit.what, hint=misfit.hint) from None  # the list has no key `subnet` to be named


def _range_pools(raw: Any) -> tuple[Pool, ...]:
    pools = read_pools(raw, YAML)
    for i, pool in enumerate(pools):
        for j, span in enumerate(pool.ranges):
            # CNI lets this pass, but a bridge of ours would never be reached at it.
            if span.gateway is not None and span.gateway not in span.subnet:
                raise Misfit(f"{span.gateway} is not in {span.subnet}").below(i, j, "gateway")
    return pools


def _with(pools: tuple[Pool, ...], raw: Any) -> tuple[Pool, ...]:
    """The pools with these gateway addresses, each in the subnet that it lies in."""
    addresses = [read_address(raw)] if isinstance(raw, str) else _addresses(raw)
    for address in addresses:
        if not any(address in span.subnet for pool in pools for span in pool.ranges):
            raise Misfit(f"{address} is in none of the network's subnets")
        pools = tuple(
            Pool(tuple(replace(span, gateway=address) if address in span.subnet else span for span in pool.ranges))
            for pool in pools
        )
    return pools


def _addresses(raw: Any) -> list[Any]:
    if not isinstance(raw, (list, tuple)):
        raise Misfit(f"{raw!r} is not true, false, an address or a list of addresses")
    return [at(i, read_address, one) for i, one in enumerate(raw)]


def _refuse_clashes(networks: tuple[Network, ...]) -> None:
    """No two networks have one name, one bridge or one address."""
    names: dict[str, int] = {}
    bridges: dict[str, str] = {}
    for i, network in enumerate(networks):
        if names.setdefault(network.name, i) != i:
            raise Misfit(f"{network.name!r} is the name of networks[{names[network.name]}] already").below(i, "name")
        if network.mode != "host" and bridges.setdefault(network.device, network.name) != network.name:
            raise Misfit(f"{network.device!r} belongs to network {bridges[network.device]!r} already").below(
                i, "bridge"
            )
    _refuse_shared_subnets(networks)


def _refuse_shared_subnets(networks: tuple[Network, ...]) -> None:
    # Two subnets are apart or one holds the other. So in order, wider first, only the last one around has to be asked.
    found = sorted(
        ((span.subnet, i) for i, network in enumerate(networks) for pool in network.pools for span in pool.ranges),
        key=lambda pair: (pair[0].version, int(pair[0].network_address), pair[0].prefixlen),
    )
    around: tuple[Subnet, int] | None = None
    for subnet, i in found:
        if around is None or subnet.network_address not in around[0]:
            around = (subnet, i)
        elif i != around[1]:
            other, later = sorted((around, (subnet, i)), key=lambda pair: pair[1])
            name = networks[other[1]].name
            raise Misfit(f"subnet {later[0]} overlaps {other[0]} of network {name!r}").below(later[1])
