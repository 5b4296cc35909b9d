"""The command line against a control API: what it prints for people and programs, its errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.cli.conftest import Towpath
from tests.fakes import FakeKernel
from tests.serving import FakeAgent
from towpath.cli.__main__ import VERBS, towpath
from towpath.cli.client import Client

HEAVY = {"aiohttp", "asyncio", "yaml", "pyroute2", "docker", "http", "ssl", "sqlite3", "logging", "towpath.config"}


def attach(agent: FakeAgent, name: str = "c1") -> None:
    client = Client(agent.config.socket)
    client.post("networks", body={"name": "web", "subnet": "10.1.0.0/24"})
    body = {"network": "web", "container": name, "netns": "/run/netns/a", "ports": ["8080:80"], "name": name}
    client.post("run", body=body)


# --- start-up --------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    code = "import sys\nfrom towpath.cli.__main__ import towpath\ntowpath(['--help'], standalone_mode=False)\n"
    code += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stderr.split()) & HEAVY == set()
    assert "Run a command on a network" in done.stdout


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_a_help_page(verb: str) -> None:
    done = CliRunner().invoke(towpath, [verb, "--help"])
    assert (done.exit_code, done.stdout.startswith("Usage: ")) == (0, True)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_no_verb_that_talks_to_the_agent_imports_its_server(verb: str) -> None:
    code = f"import sys\nfrom towpath.cli.__main__ import towpath\ntowpath(['{verb}', '-h'], standalone_mode=False)\n"
    code += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stderr.split()) & {"aiohttp", "pyroute2", "docker", "sqlite3"} == set()


# --- what is printed -------------------------------------------------------------------------------------------------


def test_version_is_one_line(call: Towpath) -> None:
    assert call("version").stdout == "towpath 0.1.0\n"
    assert json.loads(call("version", "--json").stdout) == {"version": "0.1.0"}


def test_networks_are_made_listed_and_removed(agent: FakeAgent, call: Towpath) -> None:
    made = call("network", "create", "web", "--subnet", "10.1.0.0/24", "--subnet", "fd00::/64", "--no-masquerade")
    assert made.stdout == "network web made (10.1.0.0/24, fd00::/64)\n"
    assert call("network", "ls").stdout == (
        "NAME  MODE    DEVICE  SUBNETS                ISOLATION  SOURCE\n"
        "web   bridge  br-web  10.1.0.0/24,fd00::/64  open       cli\n"
    )
    assert "masquerade             no\n" in call("network", "show", "web").stdout
    assert call("network", "rm", "web").stdout == "network web removed\n"
    assert json.loads(call("network", "ls", "--json").stdout) == []


def test_attachments_are_listed_checked_and_removed(agent: FakeAgent, call: Towpath) -> None:
    attach(agent)
    assert call("attach", "ls").stdout == (
        "ID               ADDRESSES    PORTS           PHASE     NAME\n"
        "run/web/c1/eth0  10.1.0.2/24  *:8080->80/tcp  attached  c1\n"
    )
    shown = call("attach", "show", "run/web/c1/eth0").stdout.splitlines()
    assert "addresses   10.1.0.2/24" in shown
    assert call("attach", "check").stdout == "1 checked: all as they should be\n"
    assert call("attach", "rm", "run/web/c1/eth0").stdout == "run/web/c1/eth0 detached\n"
    assert json.loads(call("--json", "attach", "ls").stdout) == []


def test_check_says_what_differs_and_exits_with_1(
    agent: FakeAgent, call: Towpath, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(agent)

    async def differs(*_: object) -> tuple[str, ...]:
        return ("eth0 has no address 10.1.0.2/24",)

    monkeypatch.setattr(agent.attacher, "check", differs)
    done = call("attach", "check")
    assert (done.exit_code, done.stdout) == (1, "run/web/c1/eth0: eth0 has no address 10.1.0.2/24\n")


def test_pools_show_how_full_they_are(agent: FakeAgent, call: Towpath) -> None:
    attach(agent)
    assert call("ipam", "ls").stdout == (
        "NETWORK  POOL                 SIZE  USED  FREE\nweb      10.1.0.1-10.1.0.254   253     1   252\n"
    )


def test_status_tells_the_node_and_its_timings(agent: FakeAgent, call: Towpath) -> None:
    attach(agent)
    lines = call("status").stdout.splitlines()
    assert lines[0] == "node         n1"
    assert "attachments  1 attached" in lines
    assert any(line.startswith("claim") for line in lines)


def test_config_check_names_the_networks_or_the_mistake(tmp_path: Path, call: Towpath) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("networks:\n- {name: web, subnet: 10.1.0.0/24}\n")
    bad.write_text("firewal: auto\n")
    assert call("config", "check", str(good)).stdout == f"{good}: all right (networks web)\n"
    done = call("config", "check", str(bad))
    assert done.exit_code == 1
    assert done.stderr == f"error: {bad}:1: unknown key 'firewal'. Did you mean 'firewall'?\n"


def test_config_show_prints_what_is_in_force(tmp_path: Path, call: Towpath) -> None:
    file = tmp_path / "towpath.yaml"
    file.write_text("firewall: iptables\nnetworks:\n- {name: web, subnet: 10.1.0.0/24}\n")
    body = json.loads(call("config", "show", "--config", str(file), "--json").stdout)
    assert (body["firewall"], body["networks"], body["state_dir"]) == ("iptables", ["web"], "/var/lib/towpath")


def test_cni_executables_are_installed_and_removed(tmp_path: Path, call: Towpath) -> None:
    done = json.loads(call("cni", "install", str(tmp_path), "--compiler", "never", "--json").stdout)
    assert (done["kind"], done["socket"]) == ("python", str(tmp_path / "agent.sock"))
    assert (tmp_path / "towpath-bridge").exists()
    removed = json.loads(call("cni", "uninstall", str(tmp_path), "--json").stdout)["removed"]
    assert sorted(removed) == sorted(done["names"])
    assert not (tmp_path / "towpath-bridge").exists()


# --- how it fails ----------------------------------------------------------------------------------------------------


def test_no_agent_is_said_with_the_way_to_start_one(tmp_path: Path, call: Towpath) -> None:
    done = call("status")
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: cannot reach the agent at {tmp_path}/agent.sock: No such file. "
        "Start it with: systemctl start towpath (or: towpath agent)\n"
    )


def test_programs_get_errors_as_json(tmp_path: Path, call: Towpath) -> None:
    done = call("status", "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    assert set(json.loads(done.stderr)) == {"error", "hint"}


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        pytest.param(
            ["network", "show", "none"],
            1,
            "error: network 'none' does not exist. Networks: none. Make one: towpath network create\n",
            id="the agent's words and hint",
        ),
        pytest.param(["netwrk"], 2, "Error: no such command 'netwrk': did you mean 'network'?\n", id="a verb mistyped"),
        pytest.param(["network", "lst"], 2, "Error: No such command 'lst'.", id="a second verb mistyped"),
        pytest.param(["status", "--jsn"], 2, "Error: No such option '--jsn'.", id="an option mistyped"),
        pytest.param(
            ["attach", "show", "c1"],
            2,
            "'c1' is not ORIGIN/NETWORK/CONTAINER/IFNAME: see towpath attach ls\n",
            id="no id",
        ),
        pytest.param(
            ["run", "--network", "web", "-p", "80", "--", "true"],
            2,
            "port '80' is not [ADDRESS:]HOST:CONTAINER[/PROTOCOL]. For example 8080:80 or 127.0.0.1:53:53/udp\n",
            id="malformed port",
        ),
        pytest.param(
            ["run", "--network", "web", "--label", "x", "--", "true"],
            2,
            "label 'x' is not KEY=VALUE\n",
            id="malformed label",
        ),
        pytest.param(
            ["run", "--network", "web", "--ip", "1.2", "--", "true"],
            2,
            "'1.2' is not an IP address.",
            id="malformed address",
        ),
        pytest.param(
            ["run", "--network", "web", "--name", "a.json", "--", "true"],
            2,
            "may not end in .json\n",
            id="name of a state file",
        ),
        pytest.param(
            ["run", "--network", "web", "--name", "../a", "--", "true"],
            2,
            "name '../a' is not a valid name",
            id="a path as name",
        ),
        pytest.param(["run", "--", "true"], 2, "Missing option '--network'.", id="run without a network"),
        pytest.param(["run", "--network", "web"], 2, "Missing argument 'COMMAND...'.", id="run without a command"),
        pytest.param(
            ["run", "--network", "web", "--output", "f", "--", "true"],
            2,
            "--output goes with --detach",
            id="output alone",
        ),
        pytest.param(
            ["stop", "none"], 1, "error: nothing runs under the name 'none'. See: towpath ps\n", id="stop nobody"
        ),
    ],
)
def test_mistakes_are_named(agent: FakeAgent, call: Towpath, args: list[str], code: int, said: str) -> None:
    done = call(*args)
    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr


def test_what_is_no_agent_is_not_believed(tmp_path: Path, call: Towpath) -> None:
    import socket
    import threading

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "agent.sock"))
    listener.listen(1)

    def answer() -> None:
        peer, _ = listener.accept()
        peer.recv(65536)
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        peer.close()

    threading.Thread(target=answer, daemon=True).start()
    done = call("status")
    listener.close()
    assert (done.exit_code, "is no towpath agent" in done.stderr) == (1, True)


# --- several at once, and programs that call it wrongly ---------------------------------------------------------------


def test_one_name_that_fails_does_not_keep_the_others_from_their_turn(agent: FakeAgent, call: Towpath) -> None:
    for name, subnet in (("a", "10.1.0.0/24"), ("b", "10.2.0.0/24")):
        assert call("network", "create", name, "--subnet", subnet).exit_code == 0
    done = call("network", "rm", "a", "nope", "never", "b")
    assert (done.exit_code, done.stdout) == (1, "network a removed\nnetwork b removed\n")
    assert "network 'nope' does not exist" in done.stderr
    assert "network 'never' does not exist" in done.stderr
    assert call("network", "ls", "--json").stdout == "[]\n"


def test_as_json_what_was_removed_is_on_stdout_though_another_failed(agent: FakeAgent, call: Towpath) -> None:
    call("network", "create", "a", "--subnet", "10.1.0.0/24")
    done = call("network", "rm", "--json", "a", "nope")
    assert (done.exit_code, json.loads(done.stdout)) == (1, {"removed": ["a"]})
    assert json.loads(done.stderr)["error"] == "network 'nope' does not exist"


@pytest.mark.parametrize(
    "argv",
    [
        "--json network create",
        "network --json create",
        "network create --json",
        "--json netwrk ls",
        "network create x --mtu abc --json",
        "run --json --network web",
        "attach show nonsense --json",
        "--json --nonsense",
    ],
)
def test_a_program_reads_its_misuse_as_json(call: Towpath, argv: str) -> None:
    done = call(*argv.split())
    assert (done.exit_code, done.stdout) == (2, "")
    assert set(json.loads(done.stderr)) == {"error", "hint"}


def test_a_person_reads_misuse_with_the_usage_line(call: Towpath) -> None:
    done = call("network", "create")
    assert (done.exit_code, done.stderr.splitlines()[0]) == (2, "Usage: towpath network create [OPTIONS] NAME")


def test_a_hint_that_begins_with_a_command_is_not_written_as_a_sentence(call: Towpath, tmp_path: Path) -> None:
    done = call("cni", "install", str(tmp_path / "nope"))
    assert done.stderr.strip().endswith(f"is not a directory. Make it: mkdir -p {tmp_path / 'nope'}")


def test_checking_goes_on_past_a_container_whose_namespace_is_gone(agent: FakeAgent, call: Towpath) -> None:
    attach(agent)
    assert isinstance(agent.kernel, FakeKernel)
    agent.kernel.drop_netns("/run/netns/a")
    done = call("attach", "check")
    assert (done.exit_code, done.stdout.startswith("run/web/c1/eth0: ")) == (1, True)
    assert "/run/netns/a" in done.stdout


def test_a_network_without_a_subnet_is_made_and_says_what_that_means(agent: FakeAgent, call: Towpath) -> None:
    assert call("network", "create", "l2").stdout == "network l2 made (no --subnet: containers get no address)\n"


def test_executables_go_where_the_configuration_says_and_ask_the_agent_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, file = tmp_path / "bin", tmp_path / "towpath.yaml"
    place.mkdir()
    file.write_text(f"socket: {tmp_path}/other.sock\ncni: {{bin_dir: {place}}}\n")
    monkeypatch.setattr("towpath.cli.config.DEFAULT", str(file))
    monkeypatch.delenv("TOWPATH_SOCKET", raising=False)
    done = CliRunner().invoke(towpath, ["cni", "install", "--compiler", "never", "--json"])
    assert {"directory": str(place), "socket": f"{tmp_path}/other.sock"}.items() <= json.loads(done.stdout).items()


def test_the_keys_of_a_network_are_shown_with_those_of_the_file(call: Towpath) -> None:
    shown = call("config", "show").stdout
    assert "KEY OF A NETWORK" in shown
    assert "preserve_default_vlan" in shown
