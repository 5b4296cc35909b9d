"""One watch on everything under the store's prefix, for as long as the store is open; local watches read what it heard.

The stream breaks and begins again where it was: at another member, after a loss of quorum, after a compaction. Problems
met in real life, and what is done:
- a member that is cut off keeps the stream open and silent: the hasleader header (gateway.py) makes it end in 3–4 s;
- a member that is stopped, or a connection through a dead middle box, is silent too: after `ping` seconds of silence
  the member is asked for its state, and left where it does not answer;
- a place that was compacted away: watches that still had to read it hear Reset, the others nothing.
"""

from __future__ import annotations

import asyncio
import logging

from towpath.store.contract import StoreError, StoreUnavailable
from towpath.store.etcd.gateway import STATUS, Gateway, Limits
from towpath.store.etcd.stream import Compacted, Ended, Happened, Said, WatchReader, watch_request
from towpath.store.etcd.verdict import Refused
from towpath.store.etcd.wire import Scope
from towpath.store.history import EventLog
from towpath.store.watch import Watches

WATCH = "/v3/watch"
LONGEST_PAUSE = 1.0

log = logging.getLogger(__name__)


class Follower:
    def __init__(self, gateway: Gateway, scope: Scope, history: EventLog, watches: Watches, limits: Limits) -> None:
        self._gateway = gateway
        self._scope = scope
        self._history = history
        self._watches = watches
        self._limits = limits
        self._task: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="etcd watch")

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def rewind(self, first: int) -> None:
        """Read again from `first` on, which lies before what the history holds."""
        self._history.begin(first - 1)
        if self._task:
            self._task.cancel()  # it says nothing more: it waits for the stream, and wakes only to end
        self.start()

    async def _run(self) -> None:
        pause = self._limits.pause
        while True:
            member = self._gateway.member
            began = asyncio.get_running_loop().time()
            try:
                await self._read(member)
                continue
            except StoreUnavailable as exc:
                reason = exc.what
            except (StoreError, ValueError, KeyError):
                log.exception("etcd watch cannot be read, trying again", extra={"member": member})
                reason = "it cannot be read"
            finally:
                self._connected.clear()
            self._gateway.pass_over(member)
            log.info("etcd watch broke", extra={"member": member, "reason": reason})
            lived = asyncio.get_running_loop().time() - began
            pause = self._limits.pause if lived > LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _read(self, member: str) -> None:
        """Read one stream; returns where it is to begin anew at once. Raises StoreUnavailable when it broke."""
        reader = WatchReader(self._scope)
        body = watch_request(self._scope, self._history.revision)
        async with self._gateway.stream(member, WATCH, body) as pieces:
            async for piece in pieces:
                if not piece:
                    await self._check_alive(member)
                    continue
                self._connected.set()
                for said in reader.feed(piece):
                    if self._heed(said):
                        return

    async def _check_alive(self, member: str) -> None:
        try:
            await self._gateway.ask(member, STATUS, {})
        except Refused as exc:
            raise StoreUnavailable(exc.what) from None

    def _heed(self, said: Said) -> bool:
        """Take it into the history; True: the stream is to begin anew."""
        if isinstance(said, Ended):
            raise StoreUnavailable(f"etcd ended the watch: {said.why}")
        if isinstance(said, Compacted):
            self._history.forget(said.revision)
            self._watches.wake()
            return True
        before = self._history.revision
        if said.revision > before:  # the stream began one revision early
            events = said.events if isinstance(said, Happened) else ()
            self._history.add(said.revision, events)
            self._watches.notice(said.revision, events, before)
        return False
