"""A control API to talk to: the true attacher over a kernel and a store in memory, served on a socket from a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from tests.fakes import FakeKernel
from towpath.api import control
from towpath.attach import Attacher, Setting
from towpath.config import Config
from towpath.kernel.contract import Kernel
from towpath.mode import Node
from towpath.store.contract import Store
from towpath.store.memory import MemoryStore


@dataclass
class FakeAgent:
    """What towpath.agent.build makes, without a machine under it."""

    config: Config
    store: Store
    kernel: Kernel
    attacher: Attacher
    started: float = field(default_factory=time.time)


def fake_agent(socket: Path, kernel: FakeKernel) -> FakeAgent:
    config = Config(node="n1", socket=str(socket), state_dir="/state")
    store = MemoryStore()
    attacher = Attacher(store, kernel, Node("n1"), Setting("nftables", "boot"))
    return FakeAgent(config, store, kernel, attacher)


@contextmanager
def served(socket: Path, kernel: FakeKernel) -> Iterator[FakeAgent]:
    """An agent that answers at `socket` while the block runs; it lives in a thread, so that plain code can call it."""
    agent = fake_agent(socket, kernel)
    up, loop = threading.Event(), asyncio.new_event_loop()
    done = asyncio.Event()

    async def serve() -> None:
        await agent.store.open()
        app = web.Application(client_max_size=16 * 2**20)
        app.add_routes(control.routes(agent))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.UnixSite(runner, str(socket)).start()
        up.set()
        await done.wait()
        await runner.cleanup()
        await agent.store.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert up.wait(10)
    try:
        yield agent
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(10)
        loop.close()
