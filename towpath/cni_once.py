"""Serve one CNI call without an agent: `python -m towpath.cni_once`, called by the executables when nobody answers.

Slow (a whole start per call) and correct: the same code under the same lock of state_dir. Where an agent has come up
meanwhile, the lock is its own and the call goes to it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from pathlib import Path

from towpath.api.cni import server
from towpath.config import Config, load
from towpath.errors import TowpathError, Unavailable
from towpath.store.contract import StoreInUse

DEFAULT = "/etc/towpath/towpath.yaml"
PATIENCE = 30.0  # seconds that others who serve one call each, at boot, may take before it is our turn
PAUSE = 0.05


def read_config() -> Config:
    """$TOWPATH_CONFIG, else the default file if it is there, else the defaults."""
    path = os.environ.get("TOWPATH_CONFIG", "")
    if path or Path(DEFAULT).exists():
        return load(path or DEFAULT)
    return Config()


def body_of_call(stdin: bytes) -> bytes:
    """The call as the executable would have sent it (see towpath.api.cni.env.split_body)."""
    wanted = {name: value for name, value in os.environb.items() if name.startswith(b"CNI_") or name == b"PATH"}
    return b"".join(b"%s=%s\0" % pair for pair in wanted.items()) + b"\0" + stdin


async def serve(config: Config, body: bytes, plugin: str, caller: str) -> tuple[int, bytes]:
    """(exit status, stdout): done here, or by the agent that holds the lock. Raises TowpathError where neither can."""
    # Imported here: the roof imports half the house, which VERSION and malformed calls need not wait for.
    from towpath.agent import build

    place = os.environ.get("TOWPATH_SOCKET") or config.socket
    last = asyncio.get_running_loop().time() + PATIENCE
    while True:
        try:
            async with build(config) as agent:
                return await server.serve_cni(agent.attacher, agent.kernel, body, plugin, caller)
        except StoreInUse as held:
            answer = await ask_agent(place, body, plugin)
            if answer is not None:
                return answer
            if asyncio.get_running_loop().time() > last:
                raise Unavailable(held.what, hint=held.hint) from held
            await asyncio.sleep(PAUSE)


async def ask_agent(place: str, body: bytes, plugin: str) -> tuple[int, bytes] | None:
    """The agent's answer; None where none answers at `place`."""
    try:
        reader, writer = await asyncio.open_unix_connection(place)
    except OSError:
        return None
    try:
        head = f"POST /cni HTTP/1.0\r\nHost: towpath\r\nX-Plugin: {plugin}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        reply = await reader.read()
    except OSError:
        return None
    finally:
        writer.close()
    return parse_reply(reply)


def parse_reply(reply: bytes) -> tuple[int, bytes] | None:
    """(X-Exit, body) of an HTTP reply; None for one that is no answer to a CNI call."""
    head, end, body = reply.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if end and name.lower() == b"x-exit" and value.strip().isdigit():
            return int(value), body
    return None


def main() -> int:
    plugin = os.environ.get("TOWPATH_PLUGIN", "")
    body = body_of_call(sys.stdin.buffer.read())
    caller = server.executable(os.getppid())
    try:
        status, stdout = asyncio.run(serve(read_config(), body, plugin, caller))
    except Exception as exc:  # whatever it is, the runtime wants JSON
        if not isinstance(exc, TowpathError):
            traceback.print_exc()
        status, stdout = 1, server.failure(plugin, exc, os.environ.get("CNI_COMMAND", ""))
    sys.stdout.buffer.write(stdout)
    sys.stdout.buffer.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
