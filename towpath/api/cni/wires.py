"""Plug-ins that make an interface or need none: towpath-bridge, towpath-host, towpath-loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

from towpath.claims import refuse_twice
from towpath.errors import BadConfig, BadNetns, CheckFailed
from towpath.model import Attachment, Given, InNetns, Interface, Lease, Network, Request, Route, Take
from towpath.plan import Phase, SetLink

from . import conf as confs
from .call import Call
from .delegate import Delegate, find
from .network import OWN_IPAM, Wanted, check_pools, extra_pools, ipam_dns, ipam_type, row_name, wanted_bridge
from .pieces import bandwidth, isolation, port_rules
from .results import Ip, Link, Result, check_fits, is_old


class Bridge:
    """Interface, addresses, ports, masquerade, isolation and bandwidth in one call."""

    needs_netns = True

    async def add(self, call: Call) -> dict[str, Any]:
        wanted = wanted_bridge(call.conf)
        request = bridge_request(call, wanted.network)  # all of the input is read before anything is touched
        async with _answered(call) as foreign:
            if foreign is not None:
                wanted = wanted_bridge(call.conf, foreign.ips)
            with_addresses(call, request, call.expected(wanted), foreign)  # what cannot work makes no row
            async with call.attacher.joined(wanted.network, wanted.given) as network:
                request = with_addresses(call, request, network, foreign)
                record = await call.attacher.add(request)
                async with call.undone(request.parts):
                    return call.encode(await bridge_result(call, record, network))

    async def delete(self, call: Call) -> None:
        await call.attacher.detach(call.key)
        await _pass_on(call, "DEL")

    async def check(self, call: Call) -> None:
        previous = call.conf.chained()
        record = await call.check(())
        check_result(call, previous, record)
        await _pass_on(call, "CHECK")

    async def gc(self, call: Call) -> None:
        await call.collect()
        await _pass_on(call, "GC")

    async def status(self, call: Call) -> None:
        wanted = wanted_bridge(call.conf)
        expected = call.expected(wanted)
        if foreign_ipam(call) is None and not layer2(call, expected):
            check_pools(call.conf, Take((), extra_pools(call.conf)), expected)
        call.kernel.firewall(call.attacher.setting.firewall)
        await call.ready(wanted)
        await _pass_on(call, "STATUS")


def foreign_ipam(call: Call) -> Delegate | None:
    """The IPAM plug-in of somebody else that the configuration names."""
    kind = ipam_type(call.conf)
    if not kind or kind in OWN_IPAM:
        return None
    return find("ipam.type", kind, call.env, call.conf.body.raw)


async def _pass_on(call: Call, command: str) -> None:
    delegate = foreign_ipam(call)
    if delegate is not None:
        await delegate.call(command)


@asynccontextmanager
async def _answered(call: Call) -> AsyncIterator[Result | None]:
    """The foreign IPAM's result, None where IPAM is ours. Its addresses are given back where the body fails."""
    delegate = foreign_ipam(call)
    if delegate is None:
        yield None
        return
    try:
        result, _ = await delegate.add()
        if not result.ips:
            raise BadConfig(f"IPAM plugin {delegate.kind} returned missing IP config")
        yield result
    except BaseException:
        await asyncio.shield(delegate.undo())
        raise


def bridge_request(call: Call, network: Network) -> Request:
    """What the call asks for; the network's row and the delegate are not asked yet, so parts are open."""
    env, conf = call.env, call.conf
    return Request(
        call.key,
        network,
        (),
        place=InNetns(env.netns),
        address=Take(confs.static_addresses(env, conf), extra_pools(conf)),
        mac=confs.mac(env, conf),
        dns=confs.dns(conf, ipam_dns(conf)),
        ports=confs.port_maps(conf),
        port_rules=port_rules(conf.body),
        bandwidth=bandwidth(conf.body.section("bandwidth"), conf.runtime.section("bandwidth")),
        isolation=isolation(conf.body, "isolation"),
        caller=call.caller,
        labels=confs.labels(conf),
        aliases=confs.aliases(conf),
        name=env.args.get("K8S_POD_NAME", ""),
    )


def with_addresses(call: Call, request: Request, network: Network, foreign: Result | None) -> Request:
    """The same request on its network, addresses decided: given by a foreign IPAM, taken from the pools, or none."""
    isolation = network.isolation if "isolation" not in call.conf.body else request.isolation
    request = replace(request, network=network, isolation=isolation)
    if network.mode == "host":
        raise BadConfig(f"network {network.name!r} is the host's own", hint="use the plug-in towpath-host for it")
    if foreign is not None:
        leases = tuple(Lease(ip.address, ip.gateway or _bridge_gateway(network, ip)) for ip in foreign.ips)
        check_fits(call.conf.version, (lease.address for lease in leases))
        dns = confs.dns(call.conf, foreign.dns)
        refuse_twice(request.ports, {lease.address.version for lease in leases})
        given = Given(leases, ipam_type(call.conf))
        request = replace(request, address=given, routes=foreign.routes, dns=dns)
        return replace(request, parts=_parts(request))
    if layer2(call, network):
        if request.ports:
            raise BadConfig(f"portMappings {request.ports[0]}: network {network.name!r} gives no address to publish")
        check_fits(call.conf.version, ())
        request = replace(request, address=None)
        return replace(request, parts=_parts(request))
    if isinstance(request.address, Take):
        check_pools(call.conf, request.address, network)
        pools = (*request.address.extra, *network.pools)
        refuse_twice(request.ports, {pool.ranges[0].subnet.version for pool in pools})
    return replace(request, parts=_parts(request))


def layer2(call: Call, network: Network) -> bool:
    """`ipam: {}`, or no ipam and no pools: an interface without addresses."""
    if ipam_type(call.conf):
        return False
    return "ipam" in call.conf.body or not network.pools


def _bridge_gateway(network: Network, ip: Ip) -> Any:
    """Where the bridge is the gateway and IPAM named none: the bridge's address of that subnet."""
    spans = (span for pool in network.pools for span in pool.ranges if network.gateway)
    return next((span.gateway for span in spans if span.subnet == ip.address.network), None)


def _parts(request: Request) -> tuple[str, ...]:
    parts = ["wire"]
    if request.address is not None:
        parts += ["address"]
    if request.ports:
        parts += ["ports"]
    if request.address is not None:
        parts += ["firewall"]
    if request.bandwidth:
        parts += ["bandwidth"]
    return tuple(parts)


async def bridge_result(call: Call, record: Attachment, network: Network) -> Result:
    """Interfaces in the reference's order [bridge, host end, container's end]; every address is on the third."""
    bridge = call.attacher.networks.devices.get(network.name) or await call.kernel.link(record.home)
    mtu = network.mtu or 1500  # a veth's default: drivers/net/veth.c, ether_setup
    return Result(
        (
            Link(record.home, bridge.mac if bridge else "", mtu=bridge.mtu if bridge else 0),
            Link(record.veth, record.key.host_mac(), mtu=mtu),
            Link(record.key.ifname, record.mac, record.netns, mtu=mtu),
        ),
        tuple(Ip(lease.address, lease.gateway, 2) for lease in record.leases),
        result_routes(record, network),
        record.dns,
    )


def result_routes(record: Attachment, network: Network) -> tuple[Route, ...]:
    """The record's routes, and the default ones that the bridge adds where it is the default gateway."""
    routes = list(record.routes)
    for lease in record.leases:
        default = ip_network("0.0.0.0/0" if lease.address.version == 4 else "::/0")
        if network.default_route and lease.gateway and not any(route.dst == default for route in routes):
            routes.append(Route(default, lease.gateway))
    return tuple(routes)


def check_result(call: Call, previous: Result, record: Attachment) -> None:
    """CHECK: what the runtime was told must be what the record says; others may have added to it (spec, "CHECK")."""
    held = {ip.address for ip in previous.ips}
    for lease in record.leases:
        if lease.address not in held:
            raise CheckFailed(f"prevResult does not have address {lease.address}")
    if is_old(call.conf.version):
        return
    index = previous.index(record.key.ifname)
    if index is None:
        raise CheckFailed(f"prevResult does not have interface {record.key.ifname}")
    mac = previous.interfaces[index].mac
    if "tuning" not in record.parts and mac and mac != record.mac:
        raise CheckFailed(f"prevResult has MAC {mac} of {record.key.ifname}, it is {record.mac}")


# --- host ------------------------------------------------------------------------------------------------------------


class Host:
    """The workload shares the node's namespace: its addresses are the node's, and there is nothing to make."""

    needs_netns = False

    def wanted(self, call: Call) -> Wanted:
        return Wanted(Network(row_name(call.conf), mode="host", masquerade=False, source="cni"), frozenset({"mode"}))

    async def add(self, call: Call) -> dict[str, Any]:
        await call.attacher.look_at_node()
        addresses = call.attacher.node.addresses
        if is_old(call.conf.version):  # this form holds one of each family
            addresses = tuple({address.version: address for address in reversed(addresses)}.values())
        check_fits(call.conf.version, addresses)
        wanted = self.wanted(call)
        async with call.attacher.joined(wanted.network, wanted.given) as network:
            record = await call.attacher.add(host_request(call, network, addresses))
            async with call.undone(record.parts):
                return call.encode(Result((), tuple(Ip(lease.address) for lease in record.leases), (), record.dns))

    async def delete(self, call: Call) -> None:
        await call.attacher.detach(call.key)

    async def check(self, call: Call) -> None:
        call.conf.chained()
        await call.check(())

    async def gc(self, call: Call) -> None:
        await call.collect()

    async def status(self, call: Call) -> None:
        await call.ready(self.wanted(call))


def host_request(call: Call, network: Network, addresses: Iterable[Interface]) -> Request:
    return Request(
        call.key,
        network,
        ("wire",),
        address=Given(tuple(Lease(address) for address in addresses)),
        dns=confs.dns(call.conf, ipam_dns(call.conf)),
        caller=call.caller,
        labels=confs.labels(call.conf),
        aliases=confs.aliases(call.conf),
        name=call.env.args.get("K8S_POD_NAME", ""),
    )


# --- loopback --------------------------------------------------------------------------------------------------------


class Loopback:
    """`lo` of the container is up. Nothing is recorded: the namespace holds all there is to know."""

    needs_netns = True

    async def add(self, call: Call) -> dict[str, Any]:
        previous = call.conf.previous()
        await self._refuse_strangers(call)
        await call.kernel.apply((Phase("netns", (SetLink("lo", up=True),), call.env.netns),))
        if previous is not None:
            return call.encode(previous)
        seen = await call.kernel.look(call.env.netns)
        lo = Link("lo", "00:00:00:00:00:00", call.env.netns)
        return call.encode(Result((lo,), tuple(Ip(a, None, 0) for name, a in seen.addresses if name == "lo")))

    async def _refuse_strangers(self, call: Call) -> None:
        for name, address in (await call.kernel.look(call.env.netns)).addresses:
            if name == "lo" and not address.ip.is_loopback:
                raise BadNetns(f"loopback interface in {call.env.netns} has the non-loopback address {address}")

    async def delete(self, call: Call) -> None:
        if call.env.netns and self._is_theirs(call):
            down = SetLink("lo", up=False)
            await call.kernel.apply((Phase("netns", (down,), call.env.netns, tolerant=True),))

    def _is_theirs(self, call: Call) -> bool:
        """Never the node's own `lo`, nor what is no namespace any more."""
        return call.kernel.netns_id(call.env.netns) not in (0, call.kernel.own_netns_id())

    async def check(self, call: Call) -> None:
        call.conf.previous()
        lo = await call.kernel.link("lo", call.env.netns)
        if lo is None or not lo.up:
            raise CheckFailed(f"loopback interface in {call.env.netns} is down")

    async def gc(self, call: Call) -> None:
        """Nothing outlives a namespace here."""

    async def status(self, call: Call) -> None:
        """Always ready: all it takes is the namespace."""
