"""Requests to a cluster of etcd members over HTTP: fail-over, time limits, and what a failure means.

aiohttp is imported when the first store is opened: whoever never opens one does not pay for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from towpath.store.contract import OutcomeUnknown, StoreError, StoreUnavailable
from towpath.store.etcd.verdict import Effect, Failure, Fate, Refused, fault_of, judge_answer
from towpath.store.etcd.wire import Json

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

# A member without a leader answers at once, instead of after 7 s, and ends watches, which otherwise stay open in
# silence for ever (etcd api/v3rpc/interceptor.go). With it not even serializable reads are answered: these go without.
NEEDS_LEADER = {"Grpc-Metadata-hasleader": "true"}

STATUS = "/v3/maintenance/status"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. connect: to a member; attempt: for one member's answer; total: for a request, all members together;
    pause: before all members are asked again; ping: a watch that says nothing for so long is looked after.
    """

    connect: float = 1.0
    attempt: float = 2.0
    total: float = 5.0
    pause: float = 0.1
    ping: float = 5.0


@dataclass(frozen=True, slots=True)
class Reply:
    """said: the answer. again: an earlier sending of the same request may have been applied."""

    said: Json
    again: bool = False


class Attempted(Exception):
    """One member did not do it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.words)
        self.failure = failure


class Gateway:
    """`endpoints`: host:port of each member. tls: None = plain HTTP."""

    def __init__(self, endpoints: tuple[str, ...], tls: ssl.SSLContext | None, limits: Limits) -> None:
        if not endpoints:
            raise ValueError("an etcd store needs at least one endpoint")
        scheme = "https" if tls else "http"
        self._members = [f"{scheme}://{endpoint}" for endpoint in endpoints]
        self._tls = tls
        self._limits = limits
        self._session: ClientSession | None = None
        self.cluster = ""  # the engine's own id of it; "" before the first answer

    async def start(self) -> None:
        import aiohttp

        connector = aiohttp.TCPConnector(ssl=self._tls or True, limit=0, ttl_dns_cache=10)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def stop(self) -> None:
        session, self._session = self._session, None
        if session:
            await session.close()

    @property
    def member(self) -> str:
        """Whom to ask next."""
        return self._members[0]

    def pass_over(self, member: str) -> None:
        """Ask `member` last from now on."""
        if self._members[0] == member:
            self._members.append(self._members.pop(0))

    async def call(self, path: str, body: Json, effect: Effect) -> Reply:
        """POST `body` to whichever member does it.

        Raises Refused; StoreUnavailable where nothing was applied, OutcomeUnknown where that is not sure.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.total
        doubtful, asked, last = False, 0, "nobody was asked"
        while (left := deadline - loop.time()) > 0:
            member = self.member
            try:
                said = await self._post(member, path, body, effect, min(left, self._limits.attempt))
                return Reply(said, doubtful)
            except Attempted as attempted:
                failure = attempted.failure
            if failure.fate is Fate.REFUSED:
                raise Refused(failure.rpc, failure.words)
            last = f"{member}: {failure.words}"
            doubtful = doubtful or (failure.fate is Fate.UNKNOWN and effect in (Effect.AGAIN, Effect.ONCE))
            if doubtful and effect is Effect.ONCE:
                break
            self.pass_over(member)
            asked += 1
            if asked % len(self._members) == 0:
                await asyncio.sleep(min(self._limits.pause, left))
        if doubtful:
            raise OutcomeUnknown(f"etcd may or may not have done it ({last})")
        raise StoreUnavailable(f"etcd is away ({last})", hint=f"members: {', '.join(self._members)}")

    async def ask(self, member: str, path: str, body: Json) -> Json:
        """POST to this member alone what it can answer alone. Raises StoreUnavailable, Refused."""
        try:
            return await self._post(member, path, body, Effect.LOCAL, self._limits.attempt)
        except Attempted as attempted:
            failure = attempted.failure
            if failure.fate is Fate.REFUSED:
                raise Refused(failure.rpc, failure.words) from None
            raise StoreUnavailable(f"etcd member {member}: {failure.words}") from None

    @contextlib.asynccontextmanager
    async def stream(self, member: str, path: str, body: Json) -> AsyncIterator[AsyncIterator[bytes]]:
        """POST to `member`; inside, the answer's pieces as they come. b"" = the `ping` limit passed in silence.

        Raises StoreUnavailable when it cannot begin, or breaks.
        """
        try:
            async with asyncio.timeout(self._limits.attempt):
                response = await self._open().post(f"{member}{path}", data=json.dumps(body), headers=NEEDS_LEADER)
        except _transport_errors() as exc:
            raise StoreUnavailable(f"etcd member {member}: {_words(exc)}") from None
        try:
            if response.status != 200:
                raise StoreUnavailable(
                    f"etcd member {member}: {judge_answer(response.status, await response.read()).words}"
                )
            _keep_alive(response)
            yield self._pieces(member, response)
        finally:
            response.close()

    async def _pieces(self, member: str, response: ClientResponse) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(self._limits.ping):
                    piece = await response.content.readany()
            except TimeoutError:
                yield b""
                continue
            except _transport_errors() as exc:
                raise StoreUnavailable(f"etcd member {member}: {_words(exc)}") from None
            if not piece:
                raise StoreUnavailable(f"etcd member {member} ended the stream")
            yield piece

    async def check_members(self) -> None:
        """Ask each member for its version and cluster.

        Raises StoreUnavailable where none answers, StoreError where one is not fit for use.
        """
        members = list(self._members)
        found = await asyncio.gather(*(self._version(member) for member in members))
        if not any(version for version, _ in found):
            reasons = "; ".join(f"{member}: {words}" for member, (_, words) in zip(members, found, strict=True))
            raise StoreUnavailable(f"no etcd member answers ({reasons})")
        for member, (version, words) in zip(members, found, strict=True):
            if not version:
                log.warning("etcd member is away", extra={"member": member, "reason": words})
                self.pass_over(member)
                continue
            fault, forbids = fault_of(version)
            if forbids:
                raise StoreError(f"etcd {version} at {member} is not fit for use: {fault}")
            if fault:
                log.warning(
                    "etcd member has a known fault", extra={"member": member, "version": version, "fault": fault}
                )

    async def _version(self, member: str) -> tuple[str, str]:
        """(version, ""), or ("", why it is not known)."""
        try:
            async with asyncio.timeout(self._limits.attempt):
                async with self._open().get(f"{member}/version") as response:
                    said = json.loads(await response.read())
            # Is it of our cluster, and does it have a gateway at all?
            await self._post(member, STATUS, {}, Effect.LOCAL, self._limits.attempt)
            return str(said["etcdserver"]), ""
        except Attempted as attempted:
            return "", attempted.failure.words
        except _transport_errors() as exc:
            return "", _words(exc)
        except (ValueError, KeyError, TypeError):
            return "", "what answers there is no etcd"

    async def _post(self, member: str, path: str, body: Json, effect: Effect, seconds: float) -> Json:
        """One request to one member. Raises Attempted."""
        headers = {} if effect is Effect.LOCAL else NEEDS_LEADER
        try:
            async with asyncio.timeout(seconds):
                async with self._open().post(f"{member}{path}", data=json.dumps(body), headers=headers) as response:
                    status, answer = response.status, await response.read()
        except _transport_errors() as exc:
            raise Attempted(Failure(_fate(exc), _words(exc))) from None
        if status == 200:
            return self._checked(member, answer)
        if status == 404 and not answer.startswith(b"{"):
            raise StoreError(
                f"etcd at {member} does not serve {path}",
                hint="start it without --enable-grpc-gateway=false, version 3.4+",
            )
        raise Attempted(judge_answer(status, answer))

    def _checked(self, member: str, answer: bytes) -> Json:
        """The answer, which is the first line where the method streams (keepalive). Raises Attempted, StoreError."""
        try:
            said: Json = json.loads(answer.partition(b"\n")[0])
        except ValueError:
            raise Attempted(Failure(Fate.UNKNOWN, "its answer cannot be read")) from None
        if error := said.get("error"):
            raise Attempted(judge_answer(200, json.dumps(error).encode()))
        cluster = str(said.get("result", said).get("header", {}).get("cluster_id", ""))
        if cluster and self.cluster and cluster != self.cluster:
            raise StoreError(f"etcd at {member} is of another cluster than the other members")
        self.cluster = self.cluster or cluster
        return said

    def _open(self) -> ClientSession:
        if self._session is None:
            raise StoreUnavailable("the store is not open")
        return self._session


def _transport_errors() -> tuple[type[Exception], ...]:
    import aiohttp

    return (aiohttp.ClientError, OSError, TimeoutError)


def _fate(exc: Exception) -> Fate:
    import aiohttp

    if isinstance(exc, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        return Fate.NOT_APPLIED  # no connection, or none that was trusted: the request was not sent
    cause = exc.__cause__ or exc
    if isinstance(cause, ssl.SSLError) and "ALERT" in (cause.reason or ""):
        return Fate.NOT_APPLIED  # the member did not trust us: TLS 1.3 tells so after the first bytes
    return Fate.UNKNOWN


def _words(exc: Exception) -> str:
    return "no answer in time" if isinstance(exc, TimeoutError) else str(exc) or type(exc).__name__


def _keep_alive(response: ClientResponse) -> None:
    """A host that died says nothing: after 10 s of silence and 3 unanswered probes the connection breaks."""
    transport = response.connection.transport if response.connection else None
    sock = transport.get_extra_info("socket") if transport else None
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 3), (socket.TCP_KEEPCNT, 3)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
