"""The CNI protocol on the agent's socket: one forwarded call in, exit status and stdout out.

The order of the checks is the reference's (skel): environment 4, stdin 5, JSON 6, name 7, version 6 and 1, then the
plug-in. Errors are JSON on stdout, as CNI wants it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from towpath.attach import Attacher
from towpath.errors import BadConfig, BadNetns, PoolEmpty, TowpathError, Unavailable
from towpath.kernel.contract import Kernel

from . import mesos
from .call import Call, Handler
from .chain import Bandwidth, Firewall, Ipam, Portmap, Tuning
from .conf import Conf, read_conf, read_json
from .env import Env, read_env, split_body
from .results import NEWEST, VERSIONS
from .wires import Bridge, Host, Loopback

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger(__name__)

HANDLERS: dict[str, Handler] = {
    "towpath-bridge": Bridge(),
    "towpath-host": Host(),
    "towpath-loopback": Loopback(),
    "towpath-ipam": Ipam(),
    "towpath-portmap": Portmap(),
    "towpath-firewall": Firewall(),
    "towpath-bandwidth": Bandwidth(),
    "towpath-tuning": Tuning(),
}
HANDLERS[mesos.NAME] = mesos.PortMapper(HANDLERS)
DEADLINE = 55.0  # seconds: a delegate that hangs is ended before the runtime gives up on us
NOT_AVAILABLE = 50  # CNI spec 1.1.0 section 2 "STATUS"
TRY_AGAIN = 11
INTERNAL = 999


async def serve_cni(
    attacher: Attacher, kernel: Kernel, body: bytes, plugin: str, caller: str, deadline: float = DEADLINE
) -> tuple[int, bytes]:
    """(exit status, stdout) of one call. Never raises but for cancellation, after which nothing half-done is left.

    plugin: name under which the executable was called; "" = what the configuration's `type` says.
    """
    # An answer to a wrong call is in the form that the call asked for, as far as it could be read.
    seen: dict[str, str] = {"plugin": plugin}
    start = time.perf_counter()
    try:
        async with asyncio.timeout(deadline):
            answer = await _serve(attacher, kernel, body, caller, seen)
    except TowpathError as exc:
        _note(seen, start, exc.what)
        return 1, _error(seen, _code(exc, seen), exc.what, exc.hint)
    except TimeoutError:
        _note(seen, start, "deadline")
        return 1, _error(seen, TRY_AGAIN, f"not done within {deadline:g} s: everything was put back", "")
    except Exception as exc:
        log.exception("cni call failed", extra=seen)
        return 1, _internal(seen, exc)
    _note(seen, start, "")
    return 0, b"" if answer is None else _line(answer)


async def _serve(
    attacher: Attacher, kernel: Kernel, body: bytes, caller: str, seen: dict[str, str]
) -> dict[str, Any] | None:
    variables, stdin = split_body(body)
    seen["command"] = variables.get("CNI_COMMAND", "")
    env = read_env(variables)
    if env.command == "VERSION":
        return _versions(stdin)
    raw = read_json(stdin)
    if (version := raw.get("cniVersion") or VERSIONS[0]) in VERSIONS:
        seen["version"] = version
    conf = read_conf(raw, env.command)
    seen |= {"version": conf.version, "network": conf.name, "container": env.container, "ifname": env.ifname}
    handler = _handler(seen, conf)
    check_netns(env, kernel, handler)
    return await _dispatch(handler, Call(env, conf, attacher, kernel, caller))


def _handler(seen: dict[str, str], conf: Conf) -> Handler:
    name = seen["plugin"] or conf.body.text("type")
    seen["plugin"] = name
    if name not in HANDLERS:
        raise BadConfig(f"type {name!r} is no plug-in of towpath", hint=f"there are: {', '.join(HANDLERS)}")
    return HANDLERS[name]


def check_netns(env: Env, kernel: Kernel, handler: Handler) -> None:
    """ADD and CHECK need a namespace, and not the agent's own: a wire there would cut off the node (code 8)."""
    if env.command not in ("ADD", "CHECK") or not handler.needs_netns:
        return
    number = kernel.netns_id(env.netns)
    if not number:
        raise BadNetns(f"failed to open netns {env.netns!r}: there is no network namespace")
    if number == kernel.own_netns_id() and not env.own_netns_allowed:
        raise BadNetns(
            f"CNI_NETNS {env.netns!r} should not be the same as the plugin's network namespace",
            hint="CNI_NETNS_OVERRIDE=1 allows it",
        )


async def _dispatch(handler: Handler, call: Call) -> dict[str, Any] | None:
    if call.env.command == "ADD":
        return await handler.add(call)
    verbs = {"DEL": handler.delete, "CHECK": handler.check, "GC": handler.gc, "STATUS": handler.status}
    await verbs[call.env.command](call)
    return None


def _versions(stdin: bytes) -> dict[str, Any]:
    """Echo the version that was asked for, if it is one of ours (spec, "VERSION"); stdin may be anything."""
    try:
        asked = json.loads(stdin)["cniVersion"]
    except (ValueError, TypeError, KeyError, RecursionError):
        asked = NEWEST
    return {"cniVersion": asked if asked in VERSIONS else NEWEST, "supportedVersions": list(VERSIONS)}


def _code(exc: TowpathError, seen: dict[str, str]) -> int:
    if seen["plugin"] == mesos.NAME:
        return mesos.code(exc, seen.get("command", ""))
    if seen.get("command") == "STATUS" and isinstance(exc, Unavailable | PoolEmpty):
        return NOT_AVAILABLE
    return exc.code


def _error(seen: dict[str, str], code: int, what: str, hint: str) -> bytes:
    version = mesos.ERROR_VERSION if seen["plugin"] == mesos.NAME else seen.get("version", NEWEST)
    return _line({"cniVersion": version, "code": code, "msg": what, "details": hint})


def failure(plugin: str, exc: Exception, command: str = "") -> bytes:
    """stdout for a call that could not even be begun."""
    seen = {"plugin": plugin, "command": command}
    if isinstance(exc, TowpathError):
        return _error(seen, _code(exc, seen), exc.what, exc.hint)
    return _internal(seen, exc)


def _internal(seen: dict[str, str], exc: Exception) -> bytes:
    return _error(seen, INTERNAL, f"internal error: {type(exc).__name__}: {exc}", "this is a bug in towpath")


def _line(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode() + b"\n"


def _note(seen: dict[str, str], start: float, error: str) -> None:
    took = round((time.perf_counter() - start) * 1000, 2)
    extra = {**seen, "ms": took} | ({"error": error} if error else {})
    # The runtime gets its answer first: this runs when the loop comes round again.
    asyncio.get_running_loop().call_soon(partial(log.info, "cni", extra=extra))


# --- the socket ------------------------------------------------------------------------------------------------------


def routes(attacher: Attacher, kernel: Kernel) -> list[web.RouteDef]:
    """`POST /cni`: the body as split_body reads it, header X-Plugin; the reply is stdout, header X-Exit the status."""
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        plugin, caller = request.headers.get("X-Plugin", ""), caller_of(request)
        status, stdout = await serve_cni(attacher, kernel, await request.read(), plugin, caller)
        return web.Response(body=stdout, content_type="application/json", headers={"X-Exit": str(status)})

    return [web.post("/cni", handle)]


def caller_of(request: web.Request) -> str:
    """Executable of the process that ran the plug-in; "" where that is not known any more."""
    peer = request.transport.get_extra_info("socket") if request.transport else None
    if peer is None or peer.family != socket.AF_UNIX:
        return ""
    pid, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))  # unix(7)
    return executable(parent_of(pid))


def parent_of(pid: int) -> int:
    """The parent's process id (proc(5), /proc/pid/stat field 4); 0 where the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123 (on the way of every ADD)
            return int(stat.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def executable(pid: int) -> str:
    """Path of what a process runs; "" where it is gone or has none."""
    if not pid:
        return ""
    try:
        return os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")  # noqa: PTH115 (the same)
    except OSError:
        return ""
