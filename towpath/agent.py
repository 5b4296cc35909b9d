"""The roof: the only place that builds and joins the parts. `towpath agent` runs it; `towpath.cni_once` borrows it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from towpath import notify, reconcile
from towpath.attach import Attacher, Setting
from towpath.config import Config
from towpath.errors import TowpathError
from towpath.kernel.contract import Kernel
from towpath.mode import Node
from towpath.store.contract import Store, StoreInUse
from towpath.store.sqlite import SqliteStore

log = logging.getLogger(__name__)

# Allocations between two collections of garbage, by generation. An ADD makes some thousands of objects and hardly a
# cycle: with Python's 700 a collection runs several times in each.
COLLECT = (20_000, 50, 100)


@dataclass(slots=True)
class Agent:
    """One node: its configuration, store, kernel and attachments."""

    config: Config
    store: Store
    kernel: Kernel
    attacher: Attacher
    started: float = field(default_factory=time.time)


def boot_id() -> str:
    """Changes at every boot (random(4)): what a record of another boot made in the kernel is gone."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@asynccontextmanager
async def build(config: Config) -> AsyncIterator[Agent]:
    """Store, kernel and attacher, loaded from state_dir. Raises StoreInUse where another agent holds it."""
    from towpath.kernel.apply import LinuxKernel

    state = Path(config.state_dir)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    store = SqliteStore(state)
    await store.open()
    try:
        kernel = LinuxKernel()
        try:
            attacher = Attacher(store, kernel, Node(config.node or socket.gethostname()), Setting("", boot_id()))
            await attacher.load()
            attacher.setting = Setting(_firewall(config, kernel, attacher), boot_id())
            await attacher.networks.declare(config.networks)
            await attacher.look_at_node()
            yield Agent(config, store, kernel, attacher)
            await attacher.settle()
        finally:
            await kernel.close()
    finally:
        await store.close()


def _firewall(config: Config, kernel: Kernel, attacher: Attacher) -> str:
    """The back end in use. With `auto`, what attachments already stand on stays, so that a restart moves nothing."""
    used = {record.firewall for record in attacher.records.values() if record.firewall}
    if config.firewall == "auto" and len(used) == 1:
        return used.pop()
    return kernel.pick_firewall(config.firewall)


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Ready is told to systemd only when the socket accepts."""
    # How long a thread of the kernel room that could go on waits for the interpreter at most (the default is 5 ms).
    sys.setswitchinterval(0.0005)
    async with build(config) as agent:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        reclaimed = await agent.attacher.recover()
        dirty = reconcile.Dirty()
        async with _serving(agent):
            log.info(
                "serving",
                extra={
                    "socket": config.socket,
                    "attachments": len(agent.attacher.records),
                    "reclaimed": reclaimed,
                    "firewall": agent.attacher.setting.firewall,
                },
            )
            notify.notify("READY=1")
            gc.freeze()  # what lives since the start need not be walked again at each collection
            gc.set_threshold(*COLLECT)
            background = [
                asyncio.create_task(_bring_to_date(agent, dirty)),
                asyncio.create_task(reconcile.follow(agent.kernel.changes(), dirty)),
            ]
            await stop.wait()
            notify.notify("STOPPING=1")
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
    log.info("stopped")


async def _bring_to_date(agent: Agent, dirty: reconcile.Dirty) -> None:
    await reconcile.adopt_devices(agent.attacher)
    await reconcile.reconcile(dirty, partial(reconcile.heal, agent.attacher, agent.config.firewall))


@asynccontextmanager
async def _serving(agent: Agent) -> AsyncIterator[None]:
    """The agent's socket: CNI calls and the control API, for root only."""
    from aiohttp import web

    from towpath.api import cni, control

    app = web.Application(client_max_size=16 * 2**20)
    app.add_routes(cni.routes(agent.attacher, agent.kernel))
    app.add_routes(control.routes(agent))
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    listener = listen(agent.config.socket)
    try:
        await web.SockSite(runner, listener).start()
        yield
    finally:
        await runner.cleanup()
        with contextlib.suppress(FileNotFoundError):
            Path(agent.config.socket).unlink()


def listen(path: str) -> socket.socket:
    """A unix socket at `path`, mode 0600. One that nobody answers is replaced; a living one raises StoreInUse."""
    place = Path(path)
    place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            place.unlink(missing_ok=True)
        else:
            raise StoreInUse(f"another agent answers at {path}", hint="stop it, or give this one another socket")
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    except OSError as exc:
        listener.close()
        raise TowpathError(f"cannot listen at {path}: {exc.strerror}") from exc
    finally:
        os.umask(before)
    listener.listen(512)
    listener.setblocking(False)
    return listener
