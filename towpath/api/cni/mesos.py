"""mesos-cni-port-mapper: DC/OS's way of port mapping for UCR, a delegating plug-in with the keys of the original.

Keys as in Mesos' src/slave/containerizer/mesos/isolators/network/cni/plugins/port_mapper: `name`, `chain`, `delegate`,
`excludeDevices`, `args`. Ports are published like everyone's: `chain` names nothing here, and `excludeDevices`, which
the original needs because it knows no hairpin, is not applied. So ports are reachable from the bridge as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from towpath.errors import BadConfig, BadRequest, DelegateFailed, PoolEmpty, Unreadable

from . import conf as confs
from .call import Call, Handler, chain_request
from .conf import Conf
from .delegate import Delegate, find
from .network import check_plugin_name
from .results import check_version
from .section import Section

NAME = "mesos-cni-port-mapper"
ERROR_VERSION = "0.3.0"  # what the original writes into its errors
CHAIN_LENGTH = 28  # iptables: XT_EXTENSION_MAXNAMELEN - 1


def code(exc: Exception, command: str) -> int:
    """The original's error codes: 100 reading, 101 arguments, 102 delegate, 103 port mapping, 104 command."""
    if isinstance(exc, Unreadable):
        return 100
    if isinstance(exc, DelegateFailed | PoolEmpty):
        return 102
    if isinstance(exc, BadRequest):
        return 104 if command not in ("", "ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION") else 101
    return 103


class PortMapper:
    """Runs its delegate, then publishes the ports of the task. A delegate of ours does both, without a process."""

    needs_netns = True

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self.handlers = handlers

    async def add(self, call: Call) -> dict[str, Any]:
        inner = delegated(call)
        ours = self._ours(inner)
        if ours is not None:
            return await ours.add(inner)
        return await self._add_foreign(call, self._foreign(inner))

    async def _add_foreign(self, call: Call, delegate: Delegate) -> dict[str, Any]:
        ports = confs.port_maps(call.conf)
        try:
            result, body = await delegate.add()
            if not result.of(call.env.ifname):
                raise DelegateFailed(f"the delegate plugin {delegate.kind} did not return an IP address")
            if ports:
                await call.attacher.add(await chain_request(call, result, ("ports",), ports=ports))
        except BaseException:
            await asyncio.shield(delegate.undo())
            raise
        return body

    async def delete(self, call: Call) -> None:
        await call.attacher.detach(call.key, ("ports",))
        await self._pass_on(call, "DEL")

    async def check(self, call: Call) -> None:
        if self._ours(delegated(call)) is None and confs.port_maps(call.conf):
            await call.check(("ports",))
        await self._pass_on(call, "CHECK")

    async def gc(self, call: Call) -> None:
        await call.collect()
        await self._pass_on(call, "GC")

    async def status(self, call: Call) -> None:
        call.kernel.firewall(call.attacher.setting.firewall)
        await self._pass_on(call, "STATUS")

    async def _pass_on(self, call: Call, command: str) -> None:
        inner = delegated(call)
        ours = self._ours(inner)
        if ours is None:
            await self._foreign(inner).call(command)
            return
        verbs = {"DEL": ours.delete, "CHECK": ours.check, "GC": ours.gc, "STATUS": ours.status}
        await verbs[command](inner)

    def _ours(self, inner: Call) -> Handler | None:
        kind = inner.conf.body.text("type")
        if kind == NAME:
            raise BadConfig(f"delegate.type {kind!r} would delegate to itself")
        return self.handlers.get(kind)

    def _foreign(self, inner: Call) -> Delegate:
        return find("delegate.type", inner.conf.body.text("type"), inner.env, inner.conf.body.raw)


def delegated(call: Call) -> Call:
    """The delegate's call: its own object, with the name, the args and what GC and CHECK need; no version is added."""
    body = call.conf.body
    chain = body.text("chain")
    if not chain or len(chain) > CHAIN_LENGTH:
        raise body.wrong("chain", f"is not the name of a chain: 1 to {CHAIN_LENGTH} characters")
    body.texts("excludeDevices")
    delegate = body.section("delegate")
    if not check_plugin_name("delegate.type", delegate.text("type")):
        raise BadConfig("delegate: the delegate plugin has no type")
    passed = ("args", "prevResult", *confs.ATTACHMENTS)
    raw = {**delegate.raw, "name": call.conf.name, **{key: body.raw[key] for key in passed if key in body.raw}}
    version = delegate.text("cniVersion") or "0.1.0"
    check_version(version, "ADD")
    return replace(call, conf=Conf(Section(raw), call.conf.name, version))
