"""The agent's route, the caller's name, and the call without an agent."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from tests.api.cni_calls import NETNS, Desk, bridge, make_desk, pack
from towpath import cni_once
from towpath.api.cni import routes, server
from towpath.config import Config
from towpath.errors import Unavailable
from towpath.model import Key
from towpath.store.lock import hold_lock

ENV = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": NETNS,
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/nowhere",
}


@pytest.fixture
async def desk() -> Desk:
    return await make_desk()


@pytest.fixture
async def agent(desk: Desk, tmp_path: Path) -> AsyncIterator[str]:
    """The socket of an agent that serves `desk`."""
    app = web.Application()
    app.add_routes(routes(desk.attacher, desk.kernel))
    runner = web.AppRunner(app)
    await runner.setup()
    place = str(tmp_path / "agent.sock")
    await web.UnixSite(runner, place).start()
    yield place
    await runner.cleanup()


async def test_the_route_answers_with_stdout_and_status(desk: Desk, agent: str) -> None:
    body = pack(ENV, json.dumps(bridge()).encode())
    answer = await cni_once.ask_agent(agent, body, "towpath-bridge")
    assert answer is not None
    status, stdout = answer
    assert (status, json.loads(stdout)["ips"][0]["address"]) == (0, "10.9.0.2/24")
    refused = await cni_once.ask_agent(agent, pack({}, b""), "towpath-bridge")
    assert refused is not None
    assert (refused[0], json.loads(refused[1])["code"]) == (1, 4)


async def test_the_caller_is_the_parent_of_the_process_that_called(desk: Desk, agent: str) -> None:
    await cni_once.ask_agent(agent, pack(ENV, json.dumps(bridge()).encode()), "towpath-bridge")
    assert desk.attacher.records[Key("cni", "blue", "c1", "eth0")].caller == os.readlink(f"/proc/{os.getppid()}/exe")


def test_processes_that_are_gone_have_no_name() -> None:
    assert server.parent_of(os.getpid()) == os.getppid()
    assert server.parent_of(2**22 + 1) == 0
    assert server.executable(os.getpid()) == os.readlink("/proc/self/exe")
    assert server.executable(2**22 + 1) == ""
    assert server.executable(0) == ""


@pytest.mark.parametrize(
    ("reply", "want"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nX-Exit: 1\r\n\r\n{}", (1, b"{}"), id="an answer"),
        pytest.param(b"HTTP/1.1 200 OK\r\nx-exit:0\r\n\r\n", (0, b""), id="header in lower case, no body"),
        pytest.param(b"HTTP/1.1 404 Not Found\r\n\r\nno", None, id="somebody else's"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX-Exit: 0\r\n", None, id="cut short"),
        pytest.param(b"", None, id="nothing"),
    ],
)
def test_replies_are_read(reply: bytes, want: tuple[int, bytes] | None) -> None:
    assert cni_once.parse_reply(reply) == want


def test_the_body_is_what_the_executable_would_send(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CNI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CNI_COMMAND", "DEL")
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("SECRET", "x")
    head, stdin = cni_once.body_of_call(b"{}").split(b"\0\0")
    assert (set(head.split(b"\0")), stdin) == ({b"CNI_COMMAND=DEL", b"PATH=/bin"}, b"{}")


async def test_where_an_agent_holds_the_lock_the_call_goes_to_it(
    desk: Desk, agent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOWPATH_SOCKET", agent)
    body = pack(ENV, json.dumps(bridge()).encode())
    with hold_lock(tmp_path):
        status, stdout = await cni_once.serve(Config(state_dir=str(tmp_path)), body, "towpath-bridge", "")
    assert (status, "ips" in json.loads(stdout)) == (0, True)
    assert len(desk.attacher.records) == 1


async def test_where_the_lock_is_never_given_up_the_call_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOWPATH_SOCKET", str(tmp_path / "none.sock"))
    monkeypatch.setattr(cni_once, "PATIENCE", 0.1)
    with hold_lock(tmp_path), pytest.raises(Unavailable, match="in use by process"):
        await cni_once.serve(Config(state_dir=str(tmp_path)), b"\0", "towpath-bridge", "")


async def once(tmp_path: Path, config: str, env: dict[str, str], conf: object, netns: str = "") -> tuple[int, bytes]:
    """Run the module as the executable does, inside the network namespace `netns`."""
    place = tmp_path / "towpath.yaml"
    place.write_text(config)
    variables = {**env, "TOWPATH_CONFIG": str(place), "TOWPATH_PLUGIN": "towpath-bridge", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-I", "-m", "towpath.cni_once"]
    if netns:
        command = ["nsenter", f"--net=/run/netns/{netns}", *command]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=variables
    )
    stdout, _ = await process.communicate(json.dumps(conf).encode())
    return process.returncode or 0, stdout


async def test_a_broken_configuration_is_told_as_a_cni_error(tmp_path: Path) -> None:
    status, stdout = await once(tmp_path, "nonsense: 1\n", ENV, bridge())
    body = json.loads(stdout)
    assert (status, body["code"], "nonsense" in body["msg"]) == (1, 7, True)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """(node, container): two empty network namespaces, gone when the test is."""
    names = [f"tpt-{secrets.token_hex(4)}" for _ in range(2)]
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=True)


def links(netns: str) -> set[str]:
    told = subprocess.run(["ip", "-n", netns, "-j", "link"], check=True, capture_output=True).stdout
    return {link["ifname"] for link in json.loads(told)}


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_add_and_del_work_without_an_agent(tmp_path: Path, namespaces: tuple[str, str]) -> None:
    node, container = namespaces
    config = f"state_dir: {tmp_path / 'state'}\nsocket: {tmp_path / 'none.sock'}\nfirewall: nftables\n"
    env = {**ENV, "CNI_NETNS": f"/run/netns/{container}"}
    before = links(node)
    ports = {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}
    conf = bridge(ipMasq=True, runtimeConfig=ports)
    status, stdout = await once(tmp_path, config, env, conf, node)
    assert status == 0, stdout
    result = json.loads(stdout)
    assert result["ips"] == [{"interface": 2, "address": "10.9.0.2/24", "gateway": "10.9.0.1"}]
    assert "eth0" in links(container)
    status, stdout = await once(tmp_path, config, {**env, "CNI_COMMAND": "CHECK"}, {**conf, "prevResult": result}, node)
    assert (status, stdout) == (0, b"")
    status, stdout = await once(tmp_path, config, {**env, "CNI_COMMAND": "DEL", "CNI_NETNS": ""}, conf, node)
    assert (status, stdout) == (0, b"")
    assert links(node) == before | {"blue0"}
    assert "eth0" not in links(container)
