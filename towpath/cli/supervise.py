"""The supervisor of one `towpath run`: makes the namespaces, has them attached, starts the command, tidies up.

It is a process of its own, so that killing the command line (even with -9) leaves nobody unattended:

    towpath run ── fork ── supervisor ── fork ── the command
         │   report (pipe)     │    up, down (pipes)   │ unshare, "ready"
         │                     │ bind-mount netns      │
         │                     │ POST /v1/run → agent  │
         │                     │ "go" ───────────────► │ cover /etc files, exec
         │ ◄─── {"name": …}    │ ◄─── end of file ──── │
         │ signals ──────────► │ signals ────────────► │
         │ ◄─── exit status    │ ◄─── exit status      │

The command is killed when its supervisor is (PR_SET_PDEATHSIG), and its orphans become the supervisor's children
(PR_SET_CHILD_SUBREAPER), who ends them: nothing outlives the run in a namespace without a network.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from towpath.cli import files, namespaces, runs
from towpath.cli.client import Client, Unreachable
from towpath.cli.runs import Place, State
from towpath.errors import TowpathError

FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
BLOCKED = FORWARDED | {signal.SIGCHLD}
RETRIES = (0.2, 0.5, 1.0, 2.0)  # seconds between tries to detach while the agent is away (it may be restarting)
NOT_FOUND, NOT_RUNNABLE = 127, 126  # exit codes as shells give them (POSIX XCU 2.8.2)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to run. `body`: see towpath.api.run; host: share the host's network; group: join this process group."""

    name: str
    body: Mapping[str, Any]
    command: tuple[str, ...]
    host: bool = False
    detach: bool = False
    output: str = ""
    group: int = 0
    labels: tuple[tuple[str, str], ...] = field(default=())


class CannotRun(TowpathError):
    """The command itself could not be started; `status` is the exit code."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(what)
        self.status = status


class Stopped(Exception):
    """A signal came before the command had started."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def launch(wanted: Wanted, socket: str) -> tuple[int, int]:
    """Fork the supervisor: (its pid, the pipe on which it reports). The caller has BLOCKED blocked and one thread."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _live(wanted, socket, writing)
    os.close(writing)
    return pid, reading


def _live(wanted: Wanted, socket: str, report: int) -> NoReturn:
    """The supervisor's life; never returns into the command line that it was forked from."""
    status = 1
    try:
        _settle_in(wanted)
        status = Supervisor(wanted, Place.of(socket), Client(socket), report).run()
    except Stopped as stopped:
        status = 128 + stopped.number
    except CannotRun as error:
        status = error.status
        _tell(report, {"error": error.what, "hint": error.hint, "status": status})
    except TowpathError as error:
        _tell(report, {"error": error.what, "hint": error.hint, "status": 1})
    except OSError as error:
        _tell(report, {"error": f"cannot run {wanted.name}: {error}", "hint": "", "status": 1})
    except BaseException as bug:
        _tell(report, {"error": f"internal error: {type(bug).__name__}: {bug}", "hint": "", "status": 1})
    finally:
        os._exit(status)


def _tell(report: int, said: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):  # the command line was killed: nobody wants to know
        os.write(report, json.dumps(said).encode())
    os.close(report)


def _settle_in(wanted: Wanted) -> None:
    """Out of the terminal's reach: its signals go to the command line and the command, not to us."""
    if wanted.detach:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        out = _open_output(wanted.output or os.devnull)
        os.dup2(out, 1)
        os.dup2(out, 2)
    else:
        os.setpgid(0, 0)
    namespaces.prctl(namespaces.PR_SET_CHILD_SUBREAPER, 1)


def _open_output(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as exc:
        raise TowpathError(f"cannot write to {path}: {exc.strerror}") from None


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a signal to end raises Stopped; outside all are blocked."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    ending = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
    before = {number: signal.signal(number, stop) for number in ending}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, ending)
        for number, handler in before.items():
            signal.signal(number, handler)


class Supervisor:
    """One run from claim to tidy."""

    def __init__(self, wanted: Wanted, place: Place, client: Client, report: int) -> None:
        self.wanted = wanted
        self.place = place
        self.client = client
        self.report = report
        self.child = 0
        netns = "" if wanted.host else str(place.netns / wanted.name)
        self.state = State(
            wanted.name,
            wanted.body["network"],
            wanted.body["ifname"],
            netns,
            os.getpid(),
            wanted.command,
            ports=tuple(wanted.body.get("ports", ())),
            labels=tuple(sorted(wanted.body.get("labels", {}).items())),
            started=time.time(),
        )

    def run(self) -> int:
        """The exit status of the command, 128 + N where signal N ended it."""
        name = self.wanted.name
        with runs.claimed(self.place, name):
            if self.place.state(name).exists():  # its supervisor was killed
                runs.tidy(self.place, runs.load(self.place, name), self.client)
            runs.save(self.place, self.state)
            try:
                return self._run()
            finally:
                end_children()
                self._tidy()

    def _run(self) -> int:
        up, down = self._spawn()
        _expect_ready(up)
        if self.state.netns:
            namespaces.hold_netns(self.child, Path(self.state.netns))
        with interruptible():
            record = self.client.post("run", body={**self.wanted.body, "netns": self.state.netns})
        self._furnish(record)
        self.state = replace(self.state, pid=self.child, addresses=tuple(record["addresses"]))
        runs.save(self.place, self.state)
        os.write(down, b"g")
        _expect_started(up, self.wanted.command[0])
        _tell(self.report, {"name": self.wanted.name, "pid": self.child, "addresses": record["addresses"]})
        return wait_for(self.child)

    def _spawn(self) -> tuple[int, int]:
        """Fork the process that becomes the command; returns our ends of its pipes."""
        up_reading, up_writing = os.pipe()
        down_reading, down_writing = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            os.close(down_writing)  # else the end of the supervisor would not be seen here
            become(self.wanted, self.place, up_writing, down_reading)
        os.close(up_writing)
        os.close(down_reading)
        return up_reading, down_writing

    def _furnish(self, record: Mapping[str, Any]) -> None:
        """Write the files that the command is to see in /etc; on the host's network only what was asked for."""
        folder = self.place.files(self.wanted.name)
        dns = record["dns"]
        if not self.wanted.host or any(dns.values()):
            (folder / "resolv.conf").write_text(files.resolv_conf(dns, _host_resolv_conf()))
        if not self.wanted.host:
            names = (self.wanted.name, *record["aliases"])
            (folder / "hosts").write_text(files.hosts(record["addresses"], names))
        for name in ("resolv.conf", "hosts"):
            with suppress(FileNotFoundError):
                (folder / name).chmod(0o644)  # the command may run as any user

    def _tidy(self) -> None:
        """As runs.tidy, with patience; where even that is in vain the state file says so, and `stop` tries again."""
        for pause in (*RETRIES, 0.0):
            try:
                return runs.tidy(self.place, self.state, self.client)
            except Unreachable as error:
                trouble = error.what
                time.sleep(pause)
            except TowpathError as error:
                trouble = error.what
                break
        runs.save(self.place, replace(self.state, problem=trouble))
        warning = f"towpath: {self.wanted.name} is not detached: {trouble}. Try: towpath stop {self.wanted.name}\n"
        with suppress(OSError):  # stderr may be gone by now
            os.write(2, warning.encode())
        return None


def _host_resolv_conf() -> str:
    """The host's own; systemd-resolved's list of real servers where the host asks its stub only."""
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        with suppress(OSError):
            text = Path(path).read_text()
            if "nameserver" in files.resolv_conf({}, text):
                return text
    return ""


def _expect_ready(up: int) -> None:
    told = os.read(up, 4096)
    if told != b"ready":
        raise TowpathError(f"cannot make namespaces: {told.decode() or 'the process died'}", hint="it takes root")


def _expect_started(up: int, program: str) -> None:
    """Exec closes the pipe; what comes before its end is why exec failed: "errno text"."""
    told = os.read(up, 4096).decode()
    if told:
        number, _, text = told.partition(" ")
        status = NOT_FOUND if int(number) == 2 else NOT_RUNNABLE
        raise CannotRun(f"cannot run {program!r}: {text}", status)


def become(wanted: Wanted, place: Place, up: int, down: int) -> NoReturn:
    """In the child: namespaces, "ready", wait for "g", files, exec. Never returns."""
    try:
        namespaces.prctl(namespaces.PR_SET_PDEATHSIG, signal.SIGKILL)
        namespaces.private_mounts(place.netns)
        if not wanted.host:
            namespaces.unshare(namespaces.CLONE_NEWNET)
            namespaces.loopback_up()
        os.write(up, b"ready")
        if os.read(down, 1) != b"g":
            os._exit(1)
        for name in ("resolv.conf", "hosts"):
            source = place.files(wanted.name) / name
            if source.exists():
                namespaces.cover(f"/etc/{name}", source)
        if wanted.group:
            with suppress(PermissionError, ProcessLookupError):  # the command line and its group are gone
                os.setpgid(0, wanted.group)
        plain_signals()
        os.execvp(wanted.command[0], wanted.command)  # noqa: S606
    except OSError as exc:
        os.write(up, f"{exc.errno} {exc.strerror}".encode())
    finally:
        os._exit(NOT_FOUND)


def plain_signals() -> None:
    """What Python changed (SIGPIPE ignored) and we blocked is as a program expects it after exec."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())


def exit_code(status: int) -> int:
    """A wait status as a shell gives it: the exit code, or 128 + the signal's number."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def wait_for(child: int) -> int:
    """Hand every signal on until `child` ends; orphans that became ours are reaped on the way."""
    while True:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return 1  # cannot be while `child` is ours to reap
            if pid == child:
                return exit_code(status)
            if pid == 0:
                break
        number = signal.sigwaitinfo(BLOCKED).si_signo
        if number != signal.SIGCHLD:
            os.kill(child, number)


def children_of(pid: int) -> list[int]:
    """From its own file (proc_tid_children(5)); where the kernel lacks it, by asking every process for its parent."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        every = (int(entry) for entry in os.listdir("/proc") if entry.isdecimal())  # noqa: PTH208
        return [other for other in every if parent_of(other) == pid]


def parent_of(pid: int) -> int:
    """0 where there is no such process (proc_pid_stat(5), field 4; the name before it may hold anything)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def end_children() -> None:
    """Kill what is left of the command, orphans of orphans too, until there is no child of ours."""
    while True:
        for pid in children_of(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
