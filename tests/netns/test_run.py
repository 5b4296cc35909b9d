"""`towpath run` for true: namespaces, files, signals and what is left behind. Only the wire is the fake kernel's."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes import FakeKernel
from tests.serving import FakeAgent, served
from towpath.cli.client import Client

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")]

TOWPATH = [sys.executable, "-m", "towpath.cli"]


class SeeingKernel(FakeKernel):
    """Makes its links in memory, but sees the namespaces that are really there."""

    def netns_id(self, path: str) -> int:
        if Path(path).is_file() and path not in self.netns:
            self.add_netns(path)
        if not Path(path).is_file() and path in self.netns:
            self.drop_netns(path)
        return super().netns_id(path)


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAgent]:
    monkeypatch.setenv("TOWPATH_SOCKET", str(tmp_path / "agent.sock"))
    with served(tmp_path / "agent.sock", SeeingKernel()) as agent:
        Client(agent.config.socket).post("networks", body={"name": "web", "subnet": "10.1.0.0/24"})
        yield agent
        assert leftovers(tmp_path) == [], "a test left something behind"


def leftovers(folder: Path) -> list[str]:
    """Files of runs, and mounts below the folder."""
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {folder}/" in line]
    return [str(path) for kind in ("run", "netns") for path in (folder / kind).glob("*")] + mounts


def towpath(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOWPATH, *args], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*TOWPATH, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def state(folder: Path, name: str) -> dict[str, int]:
    """The state file once the command has started."""
    path = folder / "run" / f"{name}.json"
    until(lambda: path.exists() and json.loads(path.read_text())["pid"] > 0)
    found: dict[str, int] = json.loads(path.read_text())
    return found


def lives(pid: int) -> bool:
    """Not gone, and not a zombie that whoever inherited it has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ids(agent: FakeAgent) -> list[str]:
    return [str(record.key) for record in agent.attacher.attachments()]


def test_a_command_has_its_own_namespace_and_files(agent: FakeAgent) -> None:
    script = "readlink /proc/self/ns/net; cat /sys/class/net/lo/flags; cat /etc/hosts /etc/resolv.conf; ping -c1 127.1"
    before = Path("/etc/hosts").read_text(), Path("/etc/resolv.conf").read_text()
    done = towpath(
        "run", "--network", "web", "--name", "a", "--alias", "www", "--dns", "10.1.0.1", "--", "sh", "-c", script
    )
    assert os.readlink("/proc/self/ns/net") not in done.stdout
    assert "10.1.0.2\ta www\n" in done.stdout
    assert "nameserver 10.1.0.1\n" in done.stdout
    assert (Path("/etc/hosts").read_text(), Path("/etc/resolv.conf").read_text()) == before
    assert ids(agent) == []


def test_a_command_on_the_host_network_stays_in_its_namespace(agent: FakeAgent) -> None:
    done = towpath("run", "--network", "host", "--", "sh", "-c", "readlink /proc/self/ns/net; cat /etc/hosts")
    assert done.stdout == os.readlink("/proc/self/ns/net") + "\n" + Path("/etc/hosts").read_text()
    assert (done.returncode, ids(agent)) == (0, [])


@pytest.mark.parametrize(
    ("command", "code"),
    [
        pytest.param(["true"], 0, id="success"),
        pytest.param(["sh", "-c", "exit 7"], 7, id="its own code"),
        pytest.param(["sh", "-c", "kill -9 $$"], 137, id="128 + the signal"),
        pytest.param(["no-such-program"], 127, id="no such program"),
        pytest.param(["/etc"], 126, id="not a program"),
    ],
)
def test_the_exit_status_is_the_commands(agent: FakeAgent, command: list[str], code: int) -> None:
    done = towpath("run", "--network", "web", "--", *command)
    assert done.returncode == code
    assert ids(agent) == []


def test_what_the_agent_refuses_is_said_and_nothing_stays(agent: FakeAgent) -> None:
    done = towpath("run", "--network", "web", "--name", "a", "--ip", "10.9.9.9", "--", "true")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: failed to allocate all requested IPs: 10.9.9.9")
    assert ids(agent) == []


def test_a_detached_command_is_listed_entered_and_stopped(agent: FakeAgent, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["-d", "--network", "web", "--name", "a", "-p", "8080:80", "--label", "tier=front", "--output", str(out)]
    done = towpath("run", *args, "--", "sh", "-c", "echo hello; sleep 60")
    assert (done.returncode, done.stdout) == (0, "a\n")
    assert ids(agent) == ["run/web/a/eth0"]
    (seen,) = json.loads(towpath("ps", "--json").stdout)
    assert (seen["name"], seen["status"], seen["ports"], seen["labels"]) == (
        "a",
        "running",
        ["8080:80"],
        {"tier": "front"},
    )
    inside = towpath("exec", "a", "--", "sh", "-c", "readlink /proc/self/ns/net; grep -c 10.1.0.2 /etc/hosts; exit 3")
    assert inside.stdout == os.readlink(f"/proc/{seen['pid']}/ns/net") + "\n1\n"
    assert inside.returncode == 3
    until(lambda: out.read_text() == "hello\n")
    assert towpath("stop", "a").stdout == "a\n"
    assert json.loads(towpath("ps", "--json").stdout) == []
    assert ids(agent) == []


def test_a_name_in_use_is_refused(agent: FakeAgent) -> None:
    towpath("run", "-d", "--network", "web", "--name", "a", "--", "sleep", "60")
    done = towpath("run", "--network", "web", "--name", "a", "--", "true")
    assert (done.returncode, done.stderr) == (
        1,
        "error: the name 'a' is in use by another run. Choose another --name, or: towpath stop a\n",
    )
    assert ids(agent) == ["run/web/a/eth0"]
    towpath("stop", "a")


def test_one_that_does_not_listen_is_killed(agent: FakeAgent) -> None:
    towpath("run", "-d", "--network", "web", "--name", "a", "--", "sh", "-c", "trap '' TERM; while :; do sleep 1; done")
    begun = time.monotonic()
    assert towpath("stop", "--time", "0.2", "a").returncode == 0
    assert time.monotonic() - begun < 5
    assert ids(agent) == []


def test_signals_reach_the_command(agent: FakeAgent, tmp_path: Path) -> None:
    script = "trap 'echo ended; exit 9' TERM; echo up; while :; do sleep 0.05; done"
    run = start("run", "--network", "web", "--name", "a", "--", "sh", "-c", script)
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    run.send_signal(signal.SIGTERM)
    assert (run.wait(10), run.stdout.read()) == (9, "ended\n")
    assert ids(agent) == []
    run.communicate()


def test_the_terminals_interrupt_comes_once(agent: FakeAgent) -> None:
    script = "n=0; trap 'n=$((n+1))' INT; echo up; sleep 0.6; sleep 0.2; exit $n"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*TOWPATH, "run", "--network", "web", "--", "sh", "-c", script])
    try:
        while b"up" not in os.read(terminal, 1000):
            pass
        time.sleep(0.1)
        os.write(terminal, b"\x03")
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 1


def test_nothing_that_the_command_started_outlives_it(agent: FakeAgent, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 61 & echo $! >{pids}; setsid sh -c 'sleep 62 & echo $! >>{pids}; wait' & sleep 0.2; exit 4"
    assert towpath("run", "--network", "web", "--", "sh", "-c", script).returncode == 4
    assert [pid for pid in pids.read_text().split() if lives(int(pid))] == []


def test_killing_the_command_line_leaves_the_command_and_its_end_tidy(agent: FakeAgent, tmp_path: Path) -> None:
    run = start("run", "--network", "web", "--name", "a", "--", "sleep", "0.6")
    command = state(tmp_path, "a")["pid"]
    run.kill()
    run.wait()
    assert lives(command)
    until(lambda: ids(agent) == [] and leftovers(tmp_path) == [])
    run.communicate()


@pytest.mark.parametrize("by", ["stop", "the next run"])
def test_killing_the_supervisor_kills_the_command_and_is_tidied_up_later(
    agent: FakeAgent, tmp_path: Path, by: str
) -> None:
    towpath("run", "-d", "--network", "web", "--name", "a", "--", "sleep", "60")
    seen = state(tmp_path, "a")
    os.kill(seen["supervisor"], signal.SIGKILL)
    until(lambda: not lives(seen["pid"]))
    assert [(s["name"], s["status"]) for s in json.loads(towpath("ps", "--json").stdout)] == [("a", "dead")]
    assert "is not running: it is dead" in towpath("exec", "a", "--", "true").stderr
    if by == "stop":
        assert towpath("stop", "a").returncode == 0
    else:
        assert towpath("run", "--network", "web", "--name", "a", "--", "true").returncode == 0
    assert ids(agent) == []


def test_a_run_does_not_hold_the_namespace_of_one_that_ended(agent: FakeAgent, tmp_path: Path) -> None:
    towpath("run", "-d", "--network", "web", "--name", "a", "--", "sleep", "60")
    netns = os.readlink(f"/proc/{state(tmp_path, 'a')['pid']}/ns/net")
    towpath("run", "-d", "--network", "web", "--name", "b", "--", "sleep", "60")
    mounts = Path(f"/proc/{state(tmp_path, 'b')['pid']}/mountinfo").read_text()
    assert netns not in mounts
    towpath("stop", "a", "b")
