"""The control API on the agent's unix socket: what the command line asks for, as JSON over HTTP/1.1."""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from aiohttp import web

from towpath import __version__, mode
from towpath.api import run, views
from towpath.attach import Attacher
from towpath.config import Config, network_from
from towpath.errors import BadNetns, BadRequest, NotFound, TowpathError, Undecodable
from towpath.kernel.contract import Kernel
from towpath.model import Attachment, Key, Network
from towpath.store.contract import Store

log = logging.getLogger(__name__)

BODY_LIMIT = 2**20  # bytes; the socket itself takes more, for CNI
KEY_PATH = "/v1/attachments/{origin}/{network}/{container}/{ifname}"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Agent(Protocol):
    """What the API needs of towpath.agent.Agent, a floor above."""

    config: Config
    store: Store
    kernel: Kernel
    attacher: Attacher
    started: float


class BodyTooLarge(BadRequest):
    http_status = 413


def routes(agent: Agent) -> list[web.RouteDef]:
    """Every route of the API; each answers JSON (but /metrics), errors as {"error": what, "hint": hint}."""
    control = Control(agent)
    table: list[tuple[str, str, Handler]] = [
        ("GET", "/v1/status", control.status),
        ("GET", "/v1/networks", control.networks),
        ("POST", "/v1/networks", control.create_network),
        ("GET", "/v1/networks/{name}", control.network),
        ("DELETE", "/v1/networks/{name}", control.drop_network),
        ("GET", "/v1/attachments", control.attachments),
        ("GET", KEY_PATH, control.attachment),
        ("GET", KEY_PATH + "/check", control.check),
        ("DELETE", KEY_PATH, control.detach),
        ("GET", "/v1/ipam", control.ipam),
        ("POST", "/v1/run", control.run),
        ("GET", "/metrics", control.metrics),
        ("*", "/v1/{rest:.*}", control.unknown),
    ]
    return [web.route(method, path, explained(handler)) for method, path, handler in table]


def explained(handler: Handler) -> Handler:
    """The handler, with every error turned into a JSON reply: here, and nowhere else, errors become HTTP."""

    @functools.wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except TowpathError as failed:
            body = {"error": failed.what, "hint": failed.hint}
            return web.json_response(body, status=failed.http_status)
        except Exception as bug:  # a bug of ours: the caller gets a word, the log the trace, the agent lives on
            log.exception("request failed", extra={"method": request.method, "path": request.path})
            body = {"error": f"internal error: {type(bug).__name__}: {bug}", "hint": "the agent's log says more"}
            return web.json_response(body, status=500)

    return answer


async def read_json(request: web.Request) -> dict[str, Any]:
    """The body, a JSON object of at most BODY_LIMIT bytes. Raises BodyTooLarge, Undecodable with line and column."""
    too_large = BodyTooLarge(f"the body is larger than {BODY_LIMIT} bytes")
    if (request.content_length or 0) > BODY_LIMIT:
        raise too_large
    raw = bytearray()
    async for chunk in request.content.iter_any():
        raw += chunk
        if len(raw) > BODY_LIMIT:
            raise too_large
    try:
        body = json.loads(raw)
    except json.JSONDecodeError as exc:
        raise Undecodable(f"the body is no JSON: {exc.msg} at line {exc.lineno} column {exc.colno}") from None
    except UnicodeDecodeError as exc:
        raise Undecodable(f"the body is no JSON: byte {exc.start} is not UTF-8") from None
    except RecursionError:
        raise Undecodable("the body is no JSON that can be read: it is nested too deeply") from None
    if not isinstance(body, dict):
        raise Undecodable(f"the body is not a JSON object but {type(body).__name__}")
    return body


def key_of(request: web.Request) -> Key:
    parts = request.match_info
    return Key(parts["origin"], parts["network"], parts["container"], parts["ifname"])


class Control:
    """The handlers, over one agent."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.attacher = agent.attacher

    async def unknown(self, request: web.Request) -> web.Response:
        raise NotFound(
            f"{request.method} {request.path} is not served", hint="is the command line newer than the agent?"
        )

    async def status(self, request: web.Request) -> web.Response:
        """GET /v1/status: who serves, since when, how much, and how long the steps of ADD and DEL take."""
        agent, attacher = self.agent, self.attacher
        store = await agent.store.status()
        phases = Counter(record.phase for record in attacher.attachments())
        body = {
            "version": __version__,
            "node": attacher.node.name or agent.config.node,
            "pid": os.getpid(),
            "uptime": round(time.time() - agent.started, 3),
            "socket": agent.config.socket,
            "state_dir": agent.config.state_dir,
            "firewall": attacher.setting.firewall,
            "netns": agent.kernel.own_netns_id(),
            "networks": len(attacher.list_networks()),
            "attachments": dict(phases),
            "store": {"backend": store.backend, "revision": store.revision, "keys": store.keys, **dict(store.detail)},
            "timings": attacher.timings.summary(),
        }
        return web.json_response(body)

    async def networks(self, request: web.Request) -> web.Response:
        return web.json_response([views.network(row) for row in self.attacher.list_networks()])

    async def network(self, request: web.Request) -> web.Response:
        return web.json_response(views.network(self.attacher.networks.get(request.match_info["name"])))

    async def create_network(self, request: web.Request) -> web.Response:
        """POST /v1/networks: the keys of a network in the YAML configuration."""
        body = await read_json(request)
        wanted = network_from(body, "network", modes=tuple(mode.installed()))
        made = await self.attacher.create_network(wanted)
        return web.json_response(views.network(made), status=201)

    async def drop_network(self, request: web.Request) -> web.Response:
        await self.attacher.drop_network(request.match_info["name"])
        return web.Response(status=204)

    async def attachments(self, request: web.Request) -> web.Response:
        """GET /v1/attachments?prefix=: in order of their ids."""
        found = self.attacher.attachments(request.query.get("prefix", ""))
        return web.json_response([views.attachment(record) for record in found])

    async def attachment(self, request: web.Request) -> web.Response:
        return web.json_response(views.attachment(await self._found(key_of(request))))

    async def _found(self, key: Key) -> Attachment:
        record = await self.attacher.find(key)
        if record is None:
            raise NotFound(f"attachment {str(key)!r} does not exist", hint="see: towpath attach ls")
        return record

    async def check(self, request: web.Request) -> web.Response:
        """How the kernel differs from the record, in words."""
        key = (await self._found(key_of(request))).key
        try:
            problems = list(await self.attacher.check(key))
        except BadNetns as gone:  # the container died without a word: that too is a difference
            problems = [gone.what]
        return web.json_response({"id": str(key), "problems": problems})

    async def detach(self, request: web.Request) -> web.Response:
        """Gone when it answers; NotFound where it was not there, so that a mistyped id is noticed."""
        await self.attacher.detach((await self._found(key_of(request))).key)
        return web.Response(status=204)

    async def ipam(self, request: web.Request) -> web.Response:
        return web.json_response([views.pool(usage) for usage in await self.attacher.usage()])

    async def run(self, request: web.Request) -> web.Response:
        """POST /v1/run (see api/run.py): attach a namespace that the caller made."""
        wanted = run.read(await read_json(request))
        if wanted.netns and not self.agent.kernel.netns_id(wanted.netns):
            raise BadRequest(
                f"netns {wanted.netns!r} is no network namespace that the agent can see",
                hint="the command and the agent must run in the same mount namespace",
            )
        record = await self.attacher.add(run.request(wanted, await self._network(wanted.network)))
        return web.json_response(views.attachment(record), status=201)

    async def _network(self, name: str) -> Network:
        """The row; `host` needs none beforehand: every node has that network."""
        if name == "host" and name not in self.attacher.networks.rows:
            return await self.attacher.network(Network("host", mode="host", masquerade=False))
        return self.attacher.networks.get(name)

    async def metrics(self, request: web.Request) -> web.Response:
        attacher = self.attacher
        text = views.metrics(
            attacher.attachments(),
            len(attacher.list_networks()),
            await attacher.usage(),
            attacher.timings.counts,
            self.agent.started,
        )
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
