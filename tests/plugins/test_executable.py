"""One suite that both twins of the CNI executable pass: what they send and copy, what they say without an agent."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.plugins.stage import Agent, call, reply, say

VERSIONS = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
CONFIG = b'{"cniVersion":"1.0.0","name":"n","type":"towpath-bridge"}'


# --- what goes to the agent and what comes back ----------------------------------------------------------------------


def test_the_agent_gets_environment_and_stdin_as_they_are(executable: Path, sock: Path) -> None:
    env = {
        b"CNI_CONTAINERID": b"c1",
        b"CNI_ARGS": b"A=\xff\xfe;B=2",
        b"PATH": b"/bin",
        b"HOME": b"/root",
        b"CNI_X": b"",
    }
    with Agent(sock, say(reply(b"{}"))) as agent:
        call(executable, "ADD", CONFIG + b"\0\xff", env)
    (got,) = agent.calls
    assert got.head.startswith(b"POST /cni HTTP/1.1\r\n")
    assert got.fields["x-plugin"] == "towpath-bridge"
    assert got.fields["connection"] == "close"
    assert sorted(got.env) == [
        b"CNI_ARGS=A=\xff\xfe;B=2",
        b"CNI_COMMAND=ADD",
        b"CNI_CONTAINERID=c1",
        b"CNI_X=",
        b"PATH=/bin",
    ]
    assert got.stdin == CONFIG + b"\0\xff"


@pytest.mark.parametrize(
    ("stdout", "status"),
    [
        pytest.param(b'{"ips":[]}\n', 0, id="a result"),
        pytest.param(b"", 0, id="nothing, as DEL answers"),
        pytest.param(b'{"code":7,"msg":"\xc3\xa9\r\n\r\n"}', 1, id="an error that looks like the end of a head"),
        pytest.param(b"\0\xff" * 3_000_000, 255, id="six megabytes of any bytes"),
    ],
)
def test_the_answer_is_copied(executable: Path, sock: Path, stdout: bytes, status: int) -> None:
    with Agent(sock, say(reply(stdout, status))):
        got = call(executable)
    assert (got.stdout, got.returncode, got.stderr) == (stdout, status, b"")


def test_an_answer_in_single_bytes_is_put_together(executable: Path, sock: Path) -> None:
    whole = reply(b'{"ips":[]}', 4)
    with Agent(sock, say(*(whole[i : i + 1] for i in range(len(whole))))):
        got = call(executable)
    assert (got.stdout, got.returncode) == (b'{"ips":[]}', 4)


def test_the_end_of_the_body_is_enough_where_the_agent_keeps_the_connection(executable: Path, sock: Path) -> None:
    done = threading.Event()

    def answer(peer: socket.socket) -> None:
        peer.sendall(reply(b"{}"))
        done.wait(20)

    with Agent(sock, answer):
        got = call(executable)
        done.set()
    assert got.returncode == 0


def test_ten_megabytes_of_stdin_arrive(executable: Path, sock: Path) -> None:
    config = b'{"pad":"' + b"x" * 10_000_000 + b'"}'
    with Agent(sock, say(reply(b""))) as agent:
        assert call(executable, stdin=config).returncode == 0
    assert agent.calls[0].stdin == config


@pytest.mark.parametrize("command", ["DEL", "CHECK", "GC", "STATUS", "add", "BOGUS", "VERSION "])
def test_every_other_command_is_the_agents_to_judge(executable: Path, sock: Path, command: str) -> None:
    with Agent(sock, say(reply(b"", 1))) as agent:
        call(executable, command)
    assert f"CNI_COMMAND={command}".encode() in agent.calls[0].env


def test_the_name_that_was_executed_is_sent_whatever_the_first_argument_says(executable: Path, sock: Path) -> None:
    with Agent(sock, say(reply(b""))) as agent:
        for name in ("towpath-portmap", "mesos-cni-port-mapper"):
            path = executable.with_name(name)
            subprocess.run(["x"], executable=path, env={"CNI_COMMAND": "DEL"}, stdin=subprocess.DEVNULL, check=True)
    assert [got.fields["x-plugin"] for got in agent.calls] == ["towpath-portmap", "mesos-cni-port-mapper"]


def test_the_socket_of_the_environment_is_preferred(executable: Path, folder: Path) -> None:
    path = folder / "other.sock"
    with Agent(path, say(reply(b"here"))):
        assert call(executable, env={b"TOWPATH_SOCKET": os.fsencode(path)}).stdout == b"here"
    path.unlink()


def test_closed_standard_files_are_not_mistaken_for_the_socket(executable: Path, sock: Path) -> None:
    with Agent(sock, say(reply(b"result"))) as agent:
        command = f"exec {executable} <&- >&- 2>&-"
        assert (
            subprocess.run(["sh", "-c", command], env={"CNI_COMMAND": "DEL"}, timeout=20, check=False).returncode == 0
        )
    assert agent.calls[0].stdin == b""


def test_standard_files_that_do_not_block_are_waited_for(executable: Path, sock: Path) -> None:
    stdin, feed = os.pipe()
    drain, stdout = os.pipe()
    os.set_blocking(stdin, False)
    os.set_blocking(stdout, False)
    with Agent(sock, say(reply(b"y" * 300_000))) as agent:
        process = subprocess.Popen([executable], env={"CNI_COMMAND": "ADD"}, stdin=stdin, stdout=stdout)
        os.close(stdin)
        os.close(stdout)
        time.sleep(0.05)
        os.write(feed, b"late")
        os.close(feed)
        with open(drain, "rb") as file:
            assert len(file.read()) == 300_000
        assert process.wait(20) == 0
    assert agent.calls[0].stdin == b"late"


def test_signals_that_stop_and_continue_do_no_harm(executable: Path, sock: Path) -> None:
    process = subprocess.Popen([executable], env={"CNI_COMMAND": "ADD"}, stdin=-1, stdout=-1)
    with Agent(sock, say(reply(b"ok"))):
        for stop in (signal.SIGSTOP, signal.SIGCONT):
            time.sleep(0.02)
            process.send_signal(stop)
        assert process.communicate(b"{}", 20)[0] == b"ok"


def test_nobody_reading_the_answer_is_a_failure(executable: Path, sock: Path) -> None:
    drain, stdout = os.pipe()
    os.close(drain)
    with Agent(sock, say(reply(b"result"))):
        got = subprocess.run(
            [executable], env={"CNI_COMMAND": "ADD"}, stdin=subprocess.DEVNULL, stdout=stdout, stderr=-1, check=False
        )
    os.close(stdout)
    assert (got.returncode, got.stderr) == (1, b"")


# --- VERSION and no command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdin", "echoed"),
    [
        pytest.param(b'{"cniVersion":"0.4.0"}', "0.4.0", id="a version of ours comes back"),
        pytest.param(b'{ "name": "n",\n  "cniVersion" :\t"1.0.0" }', "1.0.0", id="spaces do not matter"),
        pytest.param(b'{"cniVersion":"0.9.0"}', "1.1.0", id="an unknown one becomes the newest"),
        pytest.param(b'{"cniVersion":"0, 1."}', "1.1.0", id="a piece of the list is no version"),
        pytest.param(b'{"cniVersion":["1.0.0"]}', "1.1.0", id="a list is no version"),
        pytest.param(b'{"x":"\\"cniVersion\\":\\"1.0.0\\""}', "1.1.0", id="a version inside a string is none"),
        pytest.param(b'{"cniVersion', "1.1.0", id="cut off"),
        pytest.param(b"", "1.1.0", id="nothing given"),
    ],
)
def test_version_is_answered_alone(executable: Path, stdin: bytes, echoed: str) -> None:
    dummy = {b"CNI_CONTAINERID": b"dummy", b"CNI_NETNS": b"dummy", b"CNI_IFNAME": b"dummy", b"CNI_PATH": b"dummy"}
    got = call(executable, "VERSION", stdin, dummy)
    assert json.loads(got.stdout) == {"cniVersion": echoed, "supportedVersions": VERSIONS}
    assert (got.returncode, got.stderr) == (0, b"")


@pytest.mark.parametrize("first", [b"", b'{"cniVersion":"0.3.1"}', b'{"na'], ids=["silent", "told all", "told a piece"])
def test_version_does_not_wait_for_a_pipe_that_stays_open(executable: Path, first: bytes) -> None:
    stdin, feed = os.pipe()
    os.write(feed, first)
    got = subprocess.run([executable], env={"CNI_COMMAND": "VERSION"}, stdin=stdin, stdout=-1, timeout=10, check=False)
    os.close(stdin)
    os.close(feed)
    assert json.loads(got.stdout)["cniVersion"] == ("0.3.1" if b"0.3.1" in first else "1.1.0")


def test_version_does_not_wait_for_a_terminal(executable: Path) -> None:
    master, terminal = pty.openpty()
    got = subprocess.run(
        [executable], env={"CNI_COMMAND": "VERSION"}, stdin=terminal, stdout=-1, timeout=10, check=False
    )
    os.close(terminal)
    os.close(master)
    assert json.loads(got.stdout)["supportedVersions"] == VERSIONS


@pytest.mark.parametrize("env", [{}, {"CNI_COMMAND": ""}], ids=["missing", "empty"])
def test_without_a_command_it_says_what_it_is(executable: Path, env: dict[str, str]) -> None:
    got = subprocess.run([executable], env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
    about, versions = got.stderr.decode().splitlines()
    assert about.startswith("Towpath CNI plugin towpath-bridge")
    assert versions == f"CNI protocol versions supported: {', '.join(VERSIONS)}"
    assert (got.returncode, got.stdout) == (0, b"")


# --- without an agent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last_words",
    [
        pytest.param(b"", id="without a word"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX-Ex", id="in the head"),
        pytest.param(reply(b'{"ips":[]}')[:-1], id="one byte before the end"),
    ],
)
def test_an_agent_that_dies_twice_is_stood_in_for(executable: Path, sock: Path, last_words: bytes) -> None:
    config = CONFIG + b"x" * 1_000_000
    with Agent(sock, say(last_words)) as agent:
        got = call(executable, "DEL", config)
    assert len(agent.calls) == 2
    assert got.stdout == b"towpath-bridge DEL -I -m towpath.cni_once\n"
    assert got.stderr == config


def test_an_agent_that_died_once_is_asked_again(executable: Path, sock: Path) -> None:
    with Agent(sock, say(b"HTTP/1.1 2"), say(reply(b"second"))):
        assert call(executable).stdout == b"second"


def test_an_agent_that_comes_back_is_waited_for(executable: Path, sock: Path) -> None:
    process = subprocess.Popen([executable], env={"CNI_COMMAND": "ADD"}, stdin=subprocess.DEVNULL, stdout=-1)
    time.sleep(0.15)
    with Agent(sock, say(reply(b"back"))):
        assert process.communicate(timeout=20)[0] == b"back"


def test_an_agent_that_closes_before_it_has_read_may_still_answer(executable: Path, sock: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(sock))
    listener.listen()

    def refuse() -> None:
        peer, _ = listener.accept()
        peer.sendall(reply(b"too long", 1))
        peer.close()

    thread = threading.Thread(target=refuse)
    thread.start()
    got = call(executable, stdin=b"x" * 5_000_000)
    thread.join()
    listener.close()
    assert (got.stdout, got.returncode) == (b"too long", 1)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param('HTTP/1.1 404 "No\\t here"', id="no X-Exit"),
        pytest.param("HTTP/1.1 200 OK\r\nX-Exit: 256", id="X-Exit is no exit status"),
        pytest.param("HTTP/1.1 200 OK\r\nX-Exit: -1", id="X-Exit is negative"),
        pytest.param("HTTP/1.1 200 OK\r\nX-Exit: 1 or so", id="X-Exit is no number"),
        pytest.param("HTTP/1.1 200 OK\r\nX-Exit:", id="X-Exit is empty"),
    ],
)
def test_somebody_else_on_the_socket_is_an_error_in_words(executable: Path, sock: Path, head: str) -> None:
    with Agent(sock, say(f"{head}\r\nContent-Length: 2\r\n\r\n{{}}".encode())):
        got = call(executable, stdin=CONFIG)
    error = json.loads(got.stdout)
    assert (error["cniVersion"], error["code"], got.returncode) == ("1.0.0", 999, 1)
    assert str(sock) in error["msg"]
    assert error["details"].startswith("HTTP/1.1 ")


def test_a_stdin_that_cannot_be_read_is_code_5(executable: Path) -> None:
    unreadable = os.open("/dev/null", os.O_WRONLY)
    got = subprocess.run([executable], env={"CNI_COMMAND": "ADD"}, stdin=unreadable, stdout=-1, timeout=10, check=False)
    os.close(unreadable)
    error = json.loads(got.stdout)
    assert (error["code"], error["details"], got.returncode) == (5, "Bad file descriptor", 1)


def test_without_agent_and_interpreter_the_error_says_how_to_start_one(twins: dict[str, Path], tmp_path: Path) -> None:
    """Each waits 2 s for an agent, so all of them at once."""
    sockets = {"ADD": "/nonexistent/agent.sock", "DEL": '/nonexistent/"\\\xe9.sock', "GC": "/" + "x" * 200}
    sockets["STATUS"] = "/nonexistent"
    running = {}
    config = tmp_path / "config"
    config.write_bytes(CONFIG)
    with contextlib.ExitStack() as hidden:
        for kind, executable in twins.items():
            stand_in = executable.parent.with_suffix(".stand-in")
            stand_in.rename(stand_in.with_suffix(".hidden"))
            hidden.callback(stand_in.with_suffix(".hidden").rename, stand_in)
            for verb, sock in sockets.items():
                env = {"CNI_COMMAND": verb, "TOWPATH_SOCKET": sock}
                running[kind, verb] = subprocess.Popen([executable], env=env, stdin=config.open(), stdout=-1)
        answers = {key: process.communicate(timeout=30)[0] for key, process in running.items()}
    assert {process.returncode for process in running.values()} == {1}
    for (kind, verb), stdout in answers.items():
        error = json.loads(stdout)
        assert (error["cniVersion"], error["code"]) == ("1.0.0", 50 if verb == "STATUS" else 11)
        assert "is not running at /" in error["msg"]
        assert "systemctl start towpath or: towpath agent" in error["details"]
        assert error["details"].endswith("stand-in: No such file or directory")
        assert answers["python", verb].replace(b"/python.", b"/c.") == stdout.replace(b"/python.", b"/c."), kind


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_the_python_executable_loads_nothing_but_what_the_interpreter_holds(
    twins: dict[str, Path], folder: Path
) -> None:
    """A module more is a millisecond more for each container: `-X importtime` names every import."""

    def imports(*command: str | Path, env: dict[str, str]) -> set[str]:
        got = subprocess.run(
            ["/usr/bin/python3", "-IS", "-X", "importtime", *command],
            env=env,
            input=b"",
            capture_output=True,
            check=True,
        )
        lines = [line for line in got.stderr.decode().splitlines() if line.startswith("import time:")]
        return {line.rpartition("|")[2].strip() for line in lines}

    path = folder / "python.sock"
    bare = imports("-c", "pass", env={})
    with Agent(path, say(reply(b""))):
        assert imports(twins["python"], env={"CNI_COMMAND": "ADD"}) - bare == {"_socket"}
    path.unlink()
    assert imports(twins["python"], env={"CNI_COMMAND": "VERSION"}) - bare == {"_socket", "select"}
