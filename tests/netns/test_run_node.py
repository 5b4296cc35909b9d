"""`towpath run` on a true node: the agent in a network namespace of its own, packets between real processes."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")]

TOWPATH = [sys.executable, "-m", "towpath.cli"]
CONFIG = """
node: n1
state_dir: {folder}/state
socket: {folder}/agent.sock
networks:
- {{name: web, subnet: 10.99.7.0/24, dns: {{nameservers: [10.99.7.1], search: [lan]}}}}
"""


@dataclass(frozen=True)
class Node:
    """One agent in namespace `netns`; its socket lies in `folder`."""

    netns: str
    folder: Path

    def inside(self, *command: str) -> str:
        """What a process of the node sees."""
        return _output("nsenter", f"--net=/run/netns/{self.netns}", *command)

    def towpath(self, *args: str) -> str:
        return _output(*TOWPATH, "--socket", str(self.folder / "agent.sock"), *args)

    def links(self) -> set[str]:
        return {link["ifname"] for link in json.loads(self.inside("ip", "-j", "link"))}


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.delenv("TOWPATH_SOCKET", raising=False)  # it would go before the configuration's
    netns = f"tpt-{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", netns], check=True)
    node = Node(netns, tmp_path)
    config = tmp_path / "towpath.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    command = ["nsenter", f"--net=/run/netns/{netns}", *TOWPATH, "agent", "--config", str(config)]
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(command, stderr=log)
    try:
        node.inside("ip", "link", "set", "lo", "up")
        end = time.monotonic() + 15
        while not (tmp_path / "agent.sock").exists():
            assert agent.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()  # noqa: PT018
            time.sleep(0.05)
        yield node
    finally:
        agent.terminate()
        agent.wait(20)
        subprocess.run(["ip", "netns", "del", netns], check=True)


def test_a_published_command_is_reached_from_node_and_sibling_and_leaves_nothing(node: Node, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("hello\n")
    before = node.links()
    server = ("busybox", "httpd", "-f", "-p", "80", "-h", str(tmp_path))
    assert node.towpath("run", "-d", "--network", "web", "--name", "a", "-p", "8080:80", "--", *server) == "a\n"
    (seen,) = json.loads(node.towpath("ps", "--json"))
    address = seen["addresses"][0].partition("/")[0]
    curl = ("curl", "-s", "--retry-connrefused", "--retry", "20", "--retry-delay", "0", "--max-time", "10")
    assert node.inside(*curl, f"http://{address}/") == "hello\n"
    assert node.inside(*curl, "http://10.99.7.1:8080/") == "hello\n"
    assert node.towpath("run", "--network", "web", "--", *curl, f"http://{address}/") == "hello\n"
    assert node.towpath("run", "--network", "web", "--", *curl, "http://10.99.7.1:8080/") == "hello\n"
    inside = node.towpath("exec", "a", "--", "sh", "-c", "cat /etc/resolv.conf; hostname -i 2>/dev/null; ip -br link")
    assert inside.startswith("nameserver 10.99.7.1\nsearch lan\n")
    assert "eth0" in inside
    assert node.towpath("attach", "check") == "1 checked: all as they should be\n"
    node.towpath("stop", "a")
    assert node.links() - before == {"br-web"}
    assert address not in node.inside("nft", "list", "ruleset")
    assert json.loads(node.towpath("attach", "ls", "--json")) == []


def test_two_runs_cannot_publish_one_port(node: Node) -> None:
    node.towpath("run", "-d", "--network", "web", "--name", "a", "-p", "8080:80", "--", "sleep", "60")
    socket = ("--socket", str(node.folder / "agent.sock"))
    second = ("run", "--network", "web", "--name", "b", "-p", "8080:81", "--", "true")
    done = subprocess.run([*TOWPATH, *socket, *second], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "8080/tcp" in done.stderr
    assert "run/web/a/eth0" in done.stderr
    assert [s["name"] for s in json.loads(node.towpath("ps", "--json"))] == ["a"]
    node.towpath("stop", "a")
