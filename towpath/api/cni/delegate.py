"""Run another CNI plug-in as part of ours: found in CNI_PATH, given the same environment and a configuration on stdin.

CNI spec 1.1.0 section 4 "Plugin Delegation".
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from towpath.errors import BadConfig, DelegateFailed

from .env import Env
from .results import Result, decode
from .section import shown

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delegate:
    """A plug-in executable and what it is to work on."""

    kind: str
    path: Path
    env: Env
    conf: Mapping[str, Any]

    async def add(self) -> tuple[Result, dict[str, Any]]:
        """Its result, read and as it was printed."""
        body = _read(self.kind, await self.call("ADD"))
        return decode(body, f"result of {self.kind}"), body

    async def call(self, command: str) -> bytes:
        """Run one verb; returns stdout. Raises DelegateFailed with the plug-in's own code and words."""
        # The caller's PATH, if it sent one, is the plug-in's: it may need programs that the agent does not.
        variables = {"PATH": os.environ.get("PATH", ""), **self.env.variables, "CNI_COMMAND": command}
        try:
            process = await asyncio.create_subprocess_exec(
                self.path,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=variables,
            )
        except OSError as exc:
            raise DelegateFailed(f"plugin {self.kind} ({self.path}) cannot be run: {exc.strerror}") from exc
        try:
            stdout, stderr = await process.communicate(json.dumps(self.conf).encode())
        except BaseException:
            if process.returncode is None:
                process.kill()
                await asyncio.shield(process.wait())
            raise
        if process.returncode:
            raise _failure(self.kind, command, process.returncode, stdout, stderr)
        return stdout

    async def undo(self) -> None:
        """DEL after something later failed. A second failure is logged: the caller hears the first."""
        try:
            await self.call("DEL")
        except DelegateFailed as exc:
            log.error("delegate could not undo", extra={"plugin": self.kind, "error": exc.what})


def find(where: str, kind: str, env: Env, conf: Mapping[str, Any]) -> Delegate:
    """Look `kind` up in CNI_PATH. Raises BadConfig naming both."""
    for directory in env.path:
        path = Path(directory, kind)
        if path.is_file() and os.access(path, os.X_OK):
            return Delegate(kind, path, env, conf)
    raise BadConfig(f"{where}: failed to find plugin {kind!r} in CNI_PATH {':'.join(env.path)}")


def _read(kind: str, stdout: bytes) -> dict[str, Any]:
    try:
        body = json.loads(stdout)
    except (ValueError, RecursionError) as exc:
        raise DelegateFailed(f"plugin {kind} printed no JSON: {stdout[:120]!r}") from exc
    if not isinstance(body, dict):
        raise DelegateFailed(f"plugin {kind} printed {shown(body)}, not a result")
    return body


def _failure(kind: str, command: str, status: int, stdout: bytes, stderr: bytes) -> DelegateFailed:
    """The error that the plug-in printed, else what it left on stdout and stderr."""
    try:
        body = _read(kind, stdout)
        message, code, details = str(body["msg"]), int(body["code"]), str(body.get("details") or "")
    except (DelegateFailed, KeyError, TypeError, ValueError):
        text = (stdout + stderr).decode(errors="replace").strip()
        return DelegateFailed(f"plugin {kind} failed at {command} with status {status}: {text[:500] or 'no message'}")
    return DelegateFailed(f"plugin {kind}: {message}", code=code if 0 < code < 2**31 else 999, hint=details)
