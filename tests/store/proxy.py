"""A door in front of an etcd member that loses or holds back what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum

from aiohttp import ClientSession, web

from tests.store.engine import free_port


class Fault(Enum):
    NONE = "the request is passed on, and the answer"
    LOSE_ANSWER = "the request is passed on, its answer is not"
    HOLD = "the request is passed on only when `release` is called"


class Proxy:
    """`faults`: what happens to the next transactions, in order; to those after them: nothing."""

    def __init__(self, target: str) -> None:
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.faults: list[Fault] = []
        self.seen = 0
        self._target = f"http://{target}"
        self._released = asyncio.Event()
        self._held: list[asyncio.Task[bytes]] = []

    async def release(self) -> None:
        """Pass on what is held, and wait until it is done."""
        self._released.set()
        await asyncio.gather(*self._held)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if not request.path.endswith("/txn"):
            return await self._pass_on(request, body)
        self.seen += 1
        fault = self.faults.pop(0) if self.faults else Fault.NONE
        if fault is Fault.HOLD:
            self._held.append(asyncio.create_task(self._later(request.path, body)))
        else:
            answer = await self._send(request.path, body)
            if fault is Fault.NONE:
                return web.Response(body=answer)
        assert request.transport
        request.transport.abort()
        return web.Response()

    async def _pass_on(self, request: web.Request, body: bytes) -> web.StreamResponse:
        async with (
            ClientSession() as session,
            session.request(request.method, self._target + request.path, data=body) as answer,
        ):
            response = web.StreamResponse(status=answer.status)
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
        return response

    async def _later(self, path: str, body: bytes) -> bytes:
        await self._released.wait()
        return await self._send(path, body)

    async def _send(self, path: str, body: bytes) -> bytes:
        async with ClientSession() as session, session.post(self._target + path, data=body) as answer:
            return await answer.read()


@asynccontextmanager
async def proxy_of(target: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(target)
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", proxy.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    host, port = proxy.endpoint.split(":")
    await web.TCPSite(runner, host, int(port)).start()
    try:
        yield proxy
    finally:
        await runner.cleanup()
