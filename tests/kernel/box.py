"""Network namespaces for tests of the true kernel: a host, its containers, and a LinuxKernel that lives in the host."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import secrets
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from towpath.kernel.apply import LinuxKernel
from towpath.kernel.netns import open_netns, setns
from towpath.plan import Op, Phase, Plan

T = TypeVar("T")


class Box:
    """A host namespace with a kernel in it, and containers c0, c1 ... beside it."""

    def __init__(self, containers: int) -> None:
        self.name = f"tpt-{secrets.token_hex(3)}"
        self.host = f"{self.name}-h"
        self.containers = [f"{self.name}-c{i}" for i in range(containers)]
        self.kernel: LinuxKernel
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=self.name, daemon=True)

    @property
    def paths(self) -> list[str]:
        return [f"/run/netns/{name}" for name in self.containers]

    def open(self) -> None:
        for name in (self.host, *self.containers):
            subprocess.run(["ip", "netns", "add", name], check=True)
            # A namespace is born with the machine's own settings (net/ipv4/devinet.c devinet_init_net).
            calm = "echo 0 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv6/conf/all/forwarding"
            enter = ["/usr/bin/nsenter", f"--net=/run/netns/{name}", "sh", "-c", calm]
            subprocess.run(enter, check=False, capture_output=True)
        self._thread.start()
        self.inside(self._open_kernel)

    def close(self) -> None:
        if self._thread.is_alive():
            self.wait(lambda: self.kernel.close())
            self._work.put(None)
            self._thread.join()
        for name in (self.host, *self.containers):
            subprocess.run(["ip", "netns", "del", name], check=False)

    def _open_kernel(self) -> None:
        self.kernel = LinuxKernel()

    def _serve(self) -> None:
        fd = open_netns(f"/run/netns/{self.host}")
        setns(fd)
        os.close(fd)
        self._loop = asyncio.new_event_loop()
        while (work := self._work.get()) is not None:
            work()
        self._loop.close()

    def inside(self, function: Callable[[], T]) -> T:
        """What `function` returns, called by the thread that lives in the host namespace."""
        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answer.put((True, function()))
            except BaseException as failure:
                answer.put((False, failure))

        self._work.put(work)
        done, result = answer.get(timeout=60)
        if not done:
            raise result
        returned: T = result
        return returned

    def wait(self, function: Callable[[], Awaitable[T]]) -> T:
        """The result of a coroutine in the loop of that thread."""

        async def run() -> T:
            return await function()

        return self.inside(lambda: self._loop.run_until_complete(run()))

    def apply(self, plan: Plan) -> None:
        self.wait(lambda: self.kernel.apply(plan))

    def do(self, *ops: Op, container: int = -1) -> None:
        """Apply one phase: in the host, or in a container."""
        if container < 0:
            self.apply((Phase("host", ops),))
        else:
            self.apply((Phase("netns", ops, self.paths[container]),))

    def run(self, *command: str, container: int = -1, check: bool = True) -> str:
        """Output of a command in one namespace; entered by the network only."""
        name = self.host if container < 0 else self.containers[container]
        full = ["/usr/bin/nsenter", f"--net=/run/netns/{name}", *command]
        return subprocess.run(full, check=check, capture_output=True, text=True).stdout

    def json(self, *command: str, container: int = -1) -> Any:
        return json.loads(self.run(*command, container=container) or "[]")


@contextmanager
def box(containers: int = 2) -> Iterator[Box]:
    made = Box(containers)
    try:
        made.open()
        yield made
    finally:
        made.close()
