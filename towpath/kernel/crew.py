"""Threads that wait for the kernel so that the event loop does not: a few for any work, one for each group commit.

All are born in the agent's own network namespace and are daemons: an agent that ends waits for none of them.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from towpath.kernel.netlink import Netlink
from towpath.kernel.netns import Lost

log = logging.getLogger(__name__)

T = TypeVar("T")
THREADS = 3  # the kernel does link changes one at a time (rtnl lock): more would only wait side by side


class Closed(RuntimeError):
    """Work was asked of a kernel that is closed."""


class _Reply:
    """Where the outcome of one request goes: a future of the loop that asked."""

    __slots__ = ("_loop", "future")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()

    def settle(self, result: object, error: BaseException | None = None) -> None:
        """Called from a worker thread."""
        try:
            self._loop.call_soon_threadsafe(self._set, result, error)
        except RuntimeError:
            log.debug("nobody is left to hear the outcome: the event loop is closed")

    def _set(self, result: object, error: BaseException | None) -> None:
        if self.future.done():
            return  # cancelled by the one who asked; the kernel did it nevertheless
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class Crew:
    """Runs functions of one argument, the thread's own netlink socket, in the agent's namespace."""

    def __init__(self, count: int = THREADS) -> None:
        self._count = count
        self._jobs: queue.SimpleQueue[tuple[Callable[[Netlink], Any], _Reply] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    async def run(self, work: Callable[[Netlink], T]) -> T:
        """The result of `work`, or what it raised. Cancelling stops the waiting, not the work."""
        if self._closed:
            raise Closed("the kernel is closed")
        self._fill()
        reply = _Reply()
        self._jobs.put((work, reply))
        result: T = await reply.future
        return result

    def close(self) -> None:
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)

    def _fill(self) -> None:
        """Start what is missing; from the loop's thread, because a new thread is born in its creator's namespace."""
        if len(self._threads) < self._count or not all(thread.is_alive() for thread in self._threads):
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            while len(self._threads) < self._count:
                thread = threading.Thread(target=self._serve, name="towpath-kernel", daemon=True)
                thread.start()
                self._threads.append(thread)

    def _serve(self) -> None:
        with Netlink() as netlink:
            while (job := self._jobs.get()) is not None:
                work, reply = job
                try:
                    reply.settle(work(netlink))
                except Lost as lost:
                    log.error("a kernel thread ends: %s", lost)
                    reply.settle(None, RuntimeError(str(lost)))
                    return  # run() starts another one
                except BaseException as failure:
                    reply.settle(None, failure)
                del job, work, reply  # an idle thread keeps no request alive


class Grouped(Generic[T]):
    """One thread that takes all requests that queued up while it was busy, and does them as one.

    work: gets the requests in order of arrival, returns one outcome for each: None = done, else what to raise.
    """

    def __init__(self, name: str, work: Callable[[list[T]], list[BaseException | None]]) -> None:
        self._name = name
        self._work = work
        self._queue: queue.SimpleQueue[tuple[T, _Reply] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def submit(self, request: T) -> None:
        """Returns when the request is done."""
        if self._closed:
            raise Closed("the kernel is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        reply = _Reply()
        self._queue.put((request, reply))
        await reply.future

    def close(self) -> None:
        self._closed = True
        self._queue.put(None)

    def _serve(self) -> None:
        while (first := self._queue.get()) is not None:
            group = [first]
            last = False
            while not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    last = True
                    break
                group.append(more)
            self._do(group)
            if last:
                return
            del first, group

    def _do(self, group: list[tuple[T, _Reply]]) -> None:
        outcomes: list[BaseException | None]
        try:
            outcomes = self._work([request for request, _ in group])
        except BaseException as failure:
            outcomes = [failure] * len(group)
        for (_, reply), outcome in zip(group, outcomes, strict=True):
            reply.settle(None, outcome)
