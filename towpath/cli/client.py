"""The agent's control API as the command line sees it: http.client over the unix socket, no other library."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Mapping
from errno import EACCES, ENOENT, EPERM
from typing import Any
from urllib.parse import quote

from towpath.errors import TowpathError

TIMEOUT = 60.0  # seconds; the agent itself gives up sooner


class Unreachable(TowpathError):
    """There is no agent, or it does not answer."""


class Refused(TowpathError):
    """The agent said no, in its own words; `status` is the HTTP status."""

    def __init__(self, what: str, *, status: int, hint: str = "") -> None:
        super().__init__(what, hint=hint)
        self.status = status


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def path_of(*parts: str) -> str:
    """A path of the API; each part is quoted, so that a name is never read as two."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


class Client:
    """One connection per request: a command makes one or two. Methods raise Unreachable or Refused."""

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        self.path = path
        self.timeout = timeout

    def get(self, *parts: str, **query: str) -> Any:
        asked = "?" + "&".join(f"{k}={quote(v, safe='')}" for k, v in query.items() if v)
        return self._ask("GET", path_of(*parts) + asked.rstrip("?"))

    def post(self, *parts: str, body: Mapping[str, Any]) -> Any:
        return self._ask("POST", path_of(*parts), json.dumps(body).encode())

    def delete(self, *parts: str) -> None:
        self._ask("DELETE", path_of(*parts))

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        connection = _Connection(self.path, self.timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            reply = connection.getresponse()
            raw = reply.read()
        except TimeoutError:
            raise Unreachable(
                f"the agent at {self.path} did not answer within {self.timeout:g} s",
                hint="see its log: journalctl -u towpath",
            ) from None
        except OSError as exc:
            raise _unreachable(self.path, exc) from None
        except http.client.HTTPException as exc:
            raise Unreachable(f"the agent at {self.path} broke off its answer: {exc or type(exc).__name__}") from None
        finally:
            connection.close()
        return self._read(reply.status, raw)

    def _read(self, status: int, raw: bytes) -> Any:
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            raise Unreachable(
                f"what answers at {self.path} is no towpath agent: HTTP status {status}, no JSON"
            ) from None
        if status < 400:
            return body
        told = body if isinstance(body, dict) else {}
        raise Refused(str(told.get("error", f"HTTP status {status}")), status=status, hint=str(told.get("hint", "")))


def _unreachable(path: str, exc: OSError) -> Unreachable:
    start = "start it with: systemctl start towpath (or: towpath agent)"
    if exc.errno in (EACCES, EPERM):
        return Unreachable(
            f"cannot reach the agent at {path}: Permission denied", hint="only root may: run it with sudo"
        )
    if exc.errno == ENOENT:
        return Unreachable(f"cannot reach the agent at {path}: No such file", hint=start)
    why = os.strerror(exc.errno) if exc.errno else str(exc)  # "AF_UNIX path too long" comes without a number
    return Unreachable(f"cannot reach the agent at {path}: {why}", hint=start)
