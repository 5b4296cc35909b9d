"""One decoded CNI call and what a plug-in's handler makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from towpath.attach import Attacher
from towpath.errors import CheckFailed, NotFound
from towpath.kernel.contract import Kernel
from towpath.model import Attachment, Foreign, Given, Key, Lease, Network, Request
from towpath.networks import differences

from .conf import Conf, kept
from .env import Env
from .network import Wanted, origin, row_name
from .results import Result, encode


@dataclass(frozen=True, slots=True)
class Call:
    """What was asked, and the two things that can do it. `caller`: executable of the runtime."""

    env: Env
    conf: Conf
    attacher: Attacher
    kernel: Kernel
    caller: str = ""

    @property
    def key(self) -> Key:
        return Key(origin(self.conf), row_name(self.conf), self.env.container, self.env.ifname)

    def encode(self, result: Result) -> dict[str, Any]:
        return encode(result, self.conf.version)

    async def record(self) -> Attachment | None:
        return await self.attacher.find(self.key)

    @asynccontextmanager
    async def undone(self, parts: tuple[str, ...]) -> AsyncIterator[None]:
        """Where the body fails or is cancelled, the parts that this call has made go again."""
        try:
            yield
        except BaseException:
            await asyncio.shield(self.attacher.detach(self.key, parts))
            raise

    async def check(self, parts: tuple[str, ...]) -> Attachment:
        """Compare the kernel with the record. Raises NotFound, or CheckFailed with every difference in words."""
        record = await self.record()
        if record is None:
            raise NotFound(f"{self.key} is not attached", hint="was its ADD answered by this node?")
        if problems := await self.attacher.check(self.key, parts):
            raise CheckFailed("; ".join(problems))
        return record

    async def collect(self) -> None:
        """GC of this network: everything of it that the runtime does not list goes. No list, no change."""
        keep = kept(self.conf)
        if keep is None:
            return
        if problems := await self.attacher.gc(self.key.origin, self.key.network, keep, self.caller):
            raise CheckFailed(f"GC of {self.conf.name!r} left something behind: {'; '.join(problems)}")

    def expected(self, wanted: Wanted) -> Network:
        """The row as it will be if `attacher.network(wanted)` agrees: what the configuration leaves out, a row says."""
        known = self.attacher.networks.rows.get(wanted.network.name)
        if known is None:
            return wanted.network
        return replace(known, **{field: getattr(wanted.network, field) for field in wanted.given})

    async def ready(self, wanted: Wanted) -> None:
        """STATUS: raise where an ADD could not work now. Writes nothing; without a row, every address is free."""
        known = self.attacher.networks.rows.get(wanted.network.name)
        if known is None:
            await self.attacher.ready(wanted.network)
            return
        # An unused row is replaced at the next ADD; one in use refuses a configuration that differs.
        if self.attacher.in_use(known.name) and differences(known, wanted.network, wanted.given):
            await self.attacher.network(wanted.network, wanted.given)
        await self.attacher.ready(known)


class Handler(Protocol):
    """One plug-in. Verbs raise TowpathError; DEL succeeds over what is gone."""

    needs_netns: bool  # ADD and CHECK want a namespace other than the agent's

    async def add(self, call: Call) -> dict[str, Any]: ...

    async def delete(self, call: Call) -> None: ...

    async def check(self, call: Call) -> None: ...

    async def gc(self, call: Call) -> None: ...

    async def status(self, call: Call) -> None: ...


async def chain_request(call: Call, previous: Result, parts: tuple[str, ...], **asked: Any) -> Request:
    """The request of a plug-in that adds `parts` to a wire that is there already: ours (a record) or a foreign one."""
    record = await call.record()
    given: Given | None = None
    if record is None or not record.leases:
        given = Given(tuple(Lease(ip.address, ip.gateway) for ip in previous.of(call.env.ifname)))
    return Request(
        call.key,
        Network(call.key.network, mode="", source="cni"),
        parts,
        place=await _place(call, previous, record),
        address=given,
        caller=call.caller,
        **asked,
    )


async def _place(call: Call, previous: Result, record: Attachment | None) -> Foreign:
    """Where the wire ends on the host: the record knows, else the route to the address and the veth's peer tell."""
    if record is not None and "wire" in record.parts:
        return Foreign(call.env.netns, record.home, record.veth)
    ips = previous.of(call.env.ifname)
    home = await call.kernel.route_device(ips[0].address.ip) if ips else ""
    return Foreign(call.env.netns, home, await host_end(call, previous))


async def host_end(call: Call, previous: Result) -> str:
    """Host end of the container's veth, among the interfaces that the result names; "" = none of them."""
    inside = await call.kernel.link(call.env.ifname, call.env.netns)
    if inside is None or not inside.peer_index:
        return ""
    for link in previous.interfaces:
        seen = None if link.sandbox else await call.kernel.link(link.name)
        if seen is not None and seen.index == inside.peer_index:
            return seen.name
    return ""
