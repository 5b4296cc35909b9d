"""Plug-ins that add one part to what others made: portmap, firewall, bandwidth, tuning; and towpath-ipam alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from towpath.errors import BadConfig
from towpath.model import Foreign, Network, Request, Take

from . import conf as confs
from . import pieces
from .call import Call, chain_request
from .network import Wanted, check_pools, extra_pools, ipam_dns, row_name, wanted_bridge
from .results import Ip, Link, Result


class Piece(ABC):
    """One part in a chain. ADD needs a prevResult and passes it on; with nothing asked for, it does nothing else."""

    part = ""
    needs_netns = True

    @abstractmethod
    async def asked(self, call: Call) -> dict[str, Any]:
        """What the configuration asks for, as fields of the Request; {} = nothing. Raises for every wrong value."""

    async def amend(self, call: Call, result: Result) -> Result:
        """The result as it is after this plug-in."""
        return result

    async def add(self, call: Call) -> dict[str, Any]:
        previous = call.conf.chained()
        asked = await self.asked(call)
        if not asked:
            return call.encode(previous)
        request = await chain_request(call, previous, (self.part,), **asked)
        if reason := await self.objection(call, request):
            raise BadConfig(reason)
        await call.attacher.add(request)
        async with call.undone((self.part,)):
            return call.encode(await self.amend(call, previous))

    async def objection(self, call: Call, request: Request) -> str:
        """Why the wire cannot carry this part; "" = it can."""
        return ""

    async def delete(self, call: Call) -> None:
        await call.attacher.detach(call.key, (self.part,))

    async def check(self, call: Call) -> None:
        call.conf.chained()
        if await self.asked(call):
            await call.check((self.part,))

    async def gc(self, call: Call) -> None:
        await call.collect()

    async def status(self, call: Call) -> None:
        """Ready: the agent answers, and this part needs nothing that could be missing."""
        return


class Portmap(Piece):
    part = "ports"

    async def asked(self, call: Call) -> dict[str, Any]:
        rules, ports = pieces.port_rules(call.conf.body), confs.port_maps(call.conf)
        return {"ports": ports, "port_rules": rules} if ports else {}

    async def objection(self, call: Call, request: Request) -> str:
        record = await call.record()
        if not (record and record.leases) and not getattr(request.address, "leases", ()):
            return f"prevResult has no IP address of {call.env.ifname}: nothing to publish ports of"
        return ""

    async def status(self, call: Call) -> None:
        call.kernel.firewall(call.attacher.setting.firewall)


class Firewall(Piece):
    part = "firewall"

    async def asked(self, call: Call) -> dict[str, Any]:
        pieces.check_firewall(call.conf.body)
        policy = pieces.isolation(call.conf.body, "ingressPolicy")
        record = await call.record()
        if (
            record
            and "firewall" in record.parts
            and ("ingressPolicy" not in call.conf.body or record.isolation == policy)
        ):
            return {}  # towpath-bridge has done it in its one call
        return {"isolation": policy}

    async def objection(self, call: Call, request: Request) -> str:
        home = getattr(request.place, "home", "")
        if request.isolation != "open" and not home:
            return f"ingressPolicy {request.isolation!r} needs a bridge, and no route to the container leads to one"
        return ""

    async def status(self, call: Call) -> None:
        call.kernel.firewall(call.attacher.setting.firewall)


class Bandwidth(Piece):
    part = "bandwidth"

    async def asked(self, call: Call) -> dict[str, Any]:
        rates = pieces.bandwidth(call.conf.body, call.conf.runtime.section("bandwidth"))
        return {"bandwidth": rates} if rates else {}

    async def objection(self, call: Call, request: Request) -> str:
        if not getattr(request.place, "veth", ""):
            return f"prevResult names no host interface that is the veth peer of {call.env.ifname}"
        return ""

    async def amend(self, call: Call, result: Result) -> Result:
        """The device that shapes what the container sends, as the reference lists it."""
        ifb = await call.kernel.link(call.key.ifb())
        if ifb is None:
            return result
        return replace(result, interfaces=(*result.interfaces, Link(ifb.name, ifb.mac, mtu=ifb.mtu)))


class Tuning(Piece):
    part = "tuning"

    async def asked(self, call: Call) -> dict[str, Any]:
        wanted = pieces.tuning(call.env, call.conf)
        pieces.check_allowed(wanted.sysctl)
        return {"tuning": wanted} if wanted != type(wanted)() else {}

    async def objection(self, call: Call, request: Request) -> str:
        netns = call.env.netns
        if await call.kernel.link(call.env.ifname, netns) is None:
            return f"CNI_IFNAME {call.env.ifname!r} is missing in {netns}"
        for path, _ in request.tuning.sysctl:
            if await call.kernel.sysctl(path, netns) is None:
                return f"sysctl {path!r} does not exist in {netns}"
        return ""

    async def amend(self, call: Call, result: Result) -> Result:
        wanted, index = pieces.tuning(call.env, call.conf), result.index(call.env.ifname)
        if index is None:
            return result
        links = list(result.interfaces)
        links[index] = replace(links[index], mac=wanted.mac or links[index].mac, mtu=wanted.mtu or links[index].mtu)
        return replace(result, interfaces=tuple(links))


class Ipam:
    """Leases for a main plug-in that is not ours: the reference bridge with `ipam.type: towpath-ipam`."""

    needs_netns = False  # the wire is somebody else's: the namespace is his to check

    def wanted(self, call: Call) -> Wanted:
        """The row: what the main plug-in does with bridge keys is not ours to compare."""
        bridge = wanted_bridge(call.conf)
        stated = {field: getattr(bridge.network, field) for field in ("pools", "routes", "data_dir")}
        row = Network(row_name(call.conf), bridge=bridge.network.bridge, gateway=False, source="cni", **stated)
        return Wanted(row, bridge.given & stated.keys())

    async def add(self, call: Call) -> dict[str, Any]:
        wanted = self.wanted(call)
        take = Take(confs.static_addresses(call.env, call.conf), extra_pools(call.conf))
        check_pools(call.conf, take, call.expected(wanted))
        async with call.attacher.joined(wanted.network, wanted.given) as network:
            record = await call.attacher.add(self.request(call, network, take))
            async with call.undone(record.parts):
                ips = tuple(Ip(lease.address, lease.gateway) for lease in record.leases)
                return call.encode(Result((), ips, network.routes, record.dns))

    def request(self, call: Call, network: Network, take: Take) -> Request:
        return Request(
            call.key,
            network,
            ("address",),
            place=Foreign(call.env.netns),
            address=take,
            dns=ipam_dns(call.conf),
            caller=call.caller,
        )

    async def delete(self, call: Call) -> None:
        await call.attacher.detach(call.key, ("address",))

    async def check(self, call: Call) -> None:
        call.conf.chained()
        await call.check(("address",))

    async def gc(self, call: Call) -> None:
        await call.collect()

    async def status(self, call: Call) -> None:
        wanted = self.wanted(call)
        check_pools(call.conf, Take((), extra_pools(call.conf)), call.expected(wanted))
        await call.ready(wanted)
