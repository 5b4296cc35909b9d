"""The network configuration of one call: read from stdin, checked in the order of the reference, its sources ranked.

CNI spec 1.1.0 section 1; the conventions for `runtimeConfig` and `args.cni` are CONVENTIONS.md of the CNI project;
`args["org.apache.mesos"]` is what the Mesos `network/cni` isolator injects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from towpath.errors import BadConfig, Undecodable
from towpath.model import Address, Dns, PortMap, check_name

from .env import Env
from .results import Result, check_version, decode, read_dns
from .section import Section, check_mac, plain_address, shown

ATTACHMENTS = ("cni.dev/valid-attachments", "cni.dev/attachments")  # the second: a misnomer that libcni still sends


@dataclass(frozen=True, slots=True)
class Conf:
    """One plug-in's configuration. What not every verb needs is read when asked for: a DEL must not trip over it."""

    body: Section
    name: str
    version: str

    @property
    def runtime(self) -> Section:
        return self.body.section("runtimeConfig")

    @property
    def args(self) -> Section:
        return self.body.section("args").section("cni")

    @property
    def mesos(self) -> Section:
        """The NetworkInfo of the task; empty for every other runtime."""
        return self.body.section("args").section("org.apache.mesos").section("network_info")

    def previous(self) -> Result | None:
        if "prevResult" not in self.body:
            return None
        return decode(self.body.section("prevResult").raw, "prevResult")

    def chained(self) -> Result:
        """The previous result of a plug-in that lives by one. Raises BadConfig."""
        result = self.previous()
        if result is None:
            raise BadConfig("must be called as chained plugin: prevResult is missing")
        return result


def read_json(stdin: bytes) -> dict[str, Any]:
    """The JSON object on stdin. Raises Undecodable for everything that is none, lone surrogates and NaN included."""
    try:
        value = json.loads(stdin.decode(), parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise Undecodable(f"the network configuration is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise Undecodable(f"the network configuration {shown(value)} is not an object")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def read_conf(raw: dict[str, Any], command: str) -> Conf:
    """Check name and version. Raises BadConfig (name), Undecodable (types), BadVersion."""
    body = Section(raw)
    name = body.text("name")
    if not name:
        raise BadConfig("name: the network configuration has no name")
    check_name("name", name)
    version = body.text("cniVersion") or "0.1.0"  # SPEC.md 0.1.0: absent means the first
    check_version(version, command)
    return Conf(body, name, version)


def kept(conf: Conf) -> frozenset[tuple[str, str]] | None:
    """GC: (container, ifname) of all that may stay; None where the runtime did not say, which must remove nothing."""
    key = next((key for key in ATTACHMENTS if key in conf.body.raw), None)
    if key is None:
        return None
    found = []
    for item in conf.body.sections(key):
        if not item.text("containerID") or not item.text("ifname"):
            raise BadConfig(f"{item.where} {shown(item.raw)} needs containerID and ifname")
        found.append((item.text("containerID"), item.text("ifname")))
    return frozenset(found)


# --- things that several sources may say -----------------------------------------------------------------------------


def mac(env: Env, conf: Conf) -> str:
    """Weakest to strongest: CNI_ARGS, args.cni, runtimeConfig."""
    return conf.runtime.mac("mac") or conf.args.mac("mac") or check_mac("CNI_ARGS MAC", env.args.get("MAC", ""))


def static_addresses(env: Env, conf: Conf) -> tuple[Address, ...]:
    """The addresses asked for by value: those of all sources together, as host-local does it."""
    found: dict[Address, None] = {}
    for where, text in _address_texts(env, conf):
        try:
            found[plain_address(text.partition("/")[0].strip())] = None
        except ValueError as exc:
            raise BadConfig(f"{where} {shown(text)} is not an IP address") from exc
    return tuple(found)


def _address_texts(env: Env, conf: Conf) -> Iterator[tuple[str, str]]:
    yield from (("CNI_ARGS IP", text) for text in filter(None, env.args.get("IP", "").split(",")))
    yield from (("args.cni.ips", text) for text in conf.args.texts("ips"))
    yield from (("runtimeConfig.ips", text) for text in conf.runtime.texts("ips"))
    for item in conf.mesos.sections("ip_addresses"):
        if text := item.text("ip_address"):
            yield item.at("ip_address"), text


def dns(conf: Conf, weaker: Dns) -> Dns:
    """runtimeConfig.dns, else the configuration's (if it has any field, even empty), else `weaker` (IPAM's)."""
    if conf.runtime.section("dns"):
        asked = conf.runtime.section("dns")
        return Dns(asked.texts("servers"), asked.text("domain"), asked.texts("searches"), asked.texts("options"))
    if conf.body.section("dns"):
        return read_dns(conf.body.section("dns"))
    return weaker


def aliases(conf: Conf) -> tuple[str, ...]:
    """Extra names: a list by convention; podman sends {network name: list}."""
    if isinstance(conf.runtime.raw.get("aliases"), dict):
        return conf.runtime.section("aliases").texts(conf.name)
    return conf.runtime.texts("aliases")


def labels(conf: Conf) -> tuple[tuple[str, str], ...]:
    found = {}
    for source in (conf.args, conf.mesos.section("labels")):
        for item in source.sections("labels"):
            found[item.text("key")] = item.text("value")
    return tuple((key, value) for key, value in found.items() if key)


def port_maps(conf: Conf) -> tuple[PortMap, ...]:
    """Published ports of runtimeConfig, or of a Mesos task; each once. Raises BadConfig naming entry and value."""
    found = [
        _port_map(item, item.number("hostPort"), item.number("containerPort"), "protocol")
        for item in conf.runtime.sections("portMappings")
    ]
    found += [
        _port_map(item, item.number("host_port"), item.number("container_port"), "protocol")
        for item in conf.mesos.sections("port_mappings")
    ]
    return tuple(dict.fromkeys(found))


def _port_map(item: Section, host_port: int, container_port: int, protocol: str) -> PortMap:
    proto, host_ip = item.text(protocol).lower() or "tcp", item.address("hostIP")
    try:
        return PortMap(host_port, container_port, proto, host_ip)
    except BadConfig as exc:
        raise BadConfig(f"{item.where}: {exc.what}") from exc
