"""`towpath run`, `ps`, `stop` and `exec`: commands on a network without a container runtime."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from towpath.cli.options import PATIENCE, Settings, common, one_by_one, progress, sentence
from towpath.errors import BadRequest, TowpathError

if TYPE_CHECKING:
    from towpath.cli.client import Client
    from towpath.cli.runs import Place, State
    from towpath.cli.supervise import Wanted

COMMAND = {"allow_interspersed_args": False}  # what follows the command's name is the command's


Taker = Callable[[click.Context, click.Parameter, Any], Any]


def each(read: Callable[[str], Any]) -> Taker:
    """A click callback that gives every value of an option to `read`; a mistake is one of usage (exit code 2)."""

    def take(ctx: click.Context, param: click.Parameter, given: Any) -> Any:
        try:
            return tuple(map(read, given)) if isinstance(given, tuple) else read(given) if given else given
        except TowpathError as error:
            raise click.BadParameter(sentence(error.what, error.hint), ctx, param) from error

    return take


def name_text(text: str) -> str:
    """A name as CNI allows it for networks and containers."""
    from towpath.model import check_name

    return check_name("name", text)


def run_name(text: str) -> str:
    """As name_text; not what the run's neighbour in the folder is called (see runs.py)."""
    if text.endswith(".json"):
        raise BadRequest(f"name {text!r} may not end in .json")
    return name_text(text)


def port_text(text: str) -> str:
    from towpath.api.run import parse_port

    parse_port(text)
    return text


def address_text(text: str) -> str:
    from towpath.api.run import parse_address

    return str(parse_address(text))


def label_of(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise BadRequest(f"label {text!r} is not KEY=VALUE")
    return key, value


@click.command(context_settings=COMMAND)
@click.option(
    "--network", required=True, callback=each(name_text), metavar="NAME", help="A network of this node, or host."
)
@click.option("--name", callback=each(run_name), metavar="NAME", help="For ps, stop, exec and DNS [COMMAND-xxxx].")
@click.option(
    "-p",
    "--publish",
    "ports",
    multiple=True,
    callback=each(port_text),
    metavar="[ADDR:]HOST:PORT[/udp]",
    help="Publish a port.",
)
@click.option(
    "--ip",
    "ips",
    multiple=True,
    callback=each(address_text),
    metavar="ADDRESS",
    help="This address, not the next free one.",
)
@click.option("--label", "labels", multiple=True, callback=each(label_of), metavar="KEY=VALUE")
@click.option("--alias", "aliases", multiple=True, callback=each(name_text), metavar="NAME", help="Another name of it.")
@click.option(
    "--dns", "nameservers", multiple=True, callback=each(address_text), metavar="ADDRESS", help="Nameserver it uses."
)
@click.option("-d", "--detach", is_flag=True, help="Print the name and return when it is attached and started.")
@click.option("--output", metavar="FILE", help="With -d: append what it prints to FILE [dropped].")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@common
@click.pass_context
def run(ctx: click.Context, /, command: tuple[str, ...], **options: Any) -> None:
    """Run COMMAND in a network and mount namespace of its own, on a network.

    It sees its own /etc/resolv.conf and /etc/hosts; its exit status is ours; signals go to it. When it ends, what it
    left running is ended too, and everything is detached.

      towpath run --network web -p 8080:80 -- busybox httpd -f -p 80
    """
    settings: Settings = ctx.obj
    if options["output"] and not options["detach"]:
        raise click.UsageError("--output goes with --detach", ctx)
    need_root("towpath run", "it makes namespaces")
    from towpath.cli import runs

    client = settings.client()
    runs.sweep(runs.Place.of(settings.socket), client)
    host = shares_host(client, options["network"])
    ctx.exit(supervised(wanted_of(command, options, host=host), settings))


def shares_host(client: Client, network: str) -> bool:
    """Whether the network is the host's own; `host` is, also before anybody made a row of that name."""
    from towpath.cli.client import Refused

    try:
        return bool(client.get("networks", network)["mode"] == "host")
    except Refused as refused:
        if refused.status == 404 and network == "host":
            return True
        raise


def need_root(who: str, why: str) -> None:
    if os.geteuid() != 0:
        raise TowpathError(f"{who} needs root: {why}", hint="run it with sudo")


def wanted_of(command: tuple[str, ...], options: dict[str, Any], *, host: bool) -> Wanted:
    from towpath.api.run import IFNAME
    from towpath.cli.supervise import Wanted

    name = options["name"] or free_name(command[0])
    body = {
        "network": options["network"],
        "container": name,
        "ifname": IFNAME,
        "ports": list(options["ports"]),
        "ip": list(options["ips"]),
        "labels": dict(options["labels"]),
        "name": name,
        "aliases": list(options["aliases"]),
        "dns": {"nameservers": list(options["nameservers"])},
    }
    group = 0 if options["detach"] else os.getpgrp()
    output = str(Path(options["output"]).absolute()) if options["output"] else ""
    return Wanted(name, body, command, host=host, detach=options["detach"], output=output, group=group)


def free_name(program: str) -> str:
    """`httpd-1f3a` for /usr/sbin/httpd: a name that tells what it is and that nobody has."""
    import re
    import secrets

    stem = re.sub(r"[^a-zA-Z0-9]+", "-", program.rpartition("/")[2]).strip("-") or "run"
    return f"{stem}-{secrets.token_hex(2)}"


def supervised(wanted: Wanted, settings: Settings) -> int:
    """Start the supervisor and stay with it; returns the exit code."""
    import signal

    from towpath.cli import supervise

    signal.pthread_sigmask(signal.SIG_BLOCK, supervise.BLOCKED)
    pid, report = supervise.launch(wanted, settings.socket)
    told = await_report(report, pid, f"attaching {wanted.name} to {wanted.body['network']}")
    if "error" in told:
        os.waitpid(pid, 0)
        return failed(told, settings)
    if wanted.detach and told:
        settings.show(told, wanted.name)
        return 0
    return stay(pid)


def failed(told: dict[str, Any], settings: Settings) -> int:
    from towpath.cli.options import Failed

    error = Failed(TowpathError(told["error"], hint=told["hint"]), as_json=settings.json)
    error.show()
    return int(told["status"])


def await_report(report: int, pid: int, doing: str) -> dict[str, Any]:
    """What the supervisor has to say, {} where it ends without a word; a signal meanwhile is handed on to it."""
    import json
    import select
    import signal

    from towpath.cli.supervise import FORWARDED

    before = {n: signal.signal(n, lambda number, _: os.kill(pid, number)) for n in FORWARDED}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    try:
        if not select.select([report], [], [], PATIENCE)[0]:
            click.echo(f"{doing} …", err=True)
        with os.fdopen(report, "rb") as pipe:
            raw = pipe.read()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        for number, handler in before.items():
            signal.signal(number, handler)
    told: dict[str, Any] = json.loads(raw) if raw else {}
    return told


def stay(pid: int) -> int:
    """Hand signals on until the supervisor ends; returns its exit code, which is the command's.

    The terminal sends its own (^C) to the command as well, which is in our process group: those are not sent twice.
    """
    import signal

    from towpath.cli.supervise import BLOCKED, exit_code

    from_kernel = 0x80  # SI_KERNEL, asm-generic/siginfo.h
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return exit_code(status)
        caught = signal.sigwaitinfo(BLOCKED)
        if caught.si_signo != signal.SIGCHLD and caught.si_code != from_kernel:
            os.kill(pid, caught.si_signo)


@click.command()
@common
@click.pass_obj
def ps(settings: Settings) -> None:
    """List what `towpath run` started, dead ones that are not tidied up yet too."""
    import time
    from dataclasses import asdict

    from towpath.cli import runs
    from towpath.cli.table import span, table

    place = runs.Place.of(settings.socket)
    found = [(state, status_of(place, state)) for state in runs.every(place)]
    now = time.time()
    rows = [
        (s.name, s.network, ",".join(s.addresses), ",".join(s.ports), s.pid, status, span(now - s.started), _line(s))
        for s, status in found
    ]
    headers = ("name", "network", "addresses", "ports", "pid", "status", "age", "command")
    body = [{**asdict(s), "labels": dict(s.labels), "status": status} for s, status in found]
    settings.show(body, lambda: table(headers, rows))


def status_of(place: Place, state: State) -> str:
    """running, starting, or dead: the supervisor was killed, or could not reach the agent at the end."""
    from towpath.cli import runs

    if not runs.alive(place, state.name):
        return "dead"
    return "running" if state.pid else "starting"


def _line(state: State) -> str:
    import shlex

    text = shlex.join(state.command)
    return text if len(text) <= 40 else text[:39] + "…"


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@click.option("--time", "seconds", type=click.FloatRange(0, 3600), default=10.0, help="Until it is killed [10].")
@common
@click.pass_obj
def stop(settings: Settings, names: tuple[str, ...], seconds: float) -> None:
    """Ask them to end (SIGTERM), kill those that do not, and tidy up after dead ones."""
    from towpath.cli import runs

    need_root("towpath stop", "it ends root's processes")
    place = runs.Place.of(settings.socket)

    def stop_one(name: str) -> None:
        state = runs.load(place, name)
        with progress(f"waiting for {name} to end"):
            if runs.alive(place, name):
                end(place, state, seconds)
            if place.state(name).exists():  # nobody was left to tidy up, or it could not
                with runs.claimed(place, name):
                    runs.tidy(place, state, settings.client())

    one_by_one(settings, "stopped", names, stop_one, "{}")


TIDY_TIME = 70.0  # seconds that a supervisor may need after the command's end: an agent that hangs, and its retries


def end(place: Place, state: State, seconds: float) -> None:
    """SIGTERM to the supervisor, which hands it on; SIGKILL to the command after `seconds`. Returns when both ended."""
    import select
    import signal

    from towpath.cli import runs

    try:
        supervisor = os.pidfd_open(state.supervisor)
    except ProcessLookupError:
        return
    try:
        if not runs.alive(place, state.name):  # asked after the descriptor was there: the id was not reused before
            return
        signal.pidfd_send_signal(supervisor, signal.SIGTERM)
        if select.select([supervisor], [], [], seconds)[0]:
            return
        kill_child(state)
        if not select.select([supervisor], [], [], TIDY_TIME)[0]:
            raise TowpathError(f"{state.name} does not end: process {state.supervisor} still tidies up after it")
    finally:
        os.close(supervisor)


def kill_child(state: State) -> None:
    """SIGKILL to the command, if that process id is still the supervisor's child."""
    import signal
    from contextlib import suppress

    from towpath.cli.supervise import parent_of

    with suppress(ProcessLookupError):
        command = os.pidfd_open(state.pid) if state.pid else -1
        if command >= 0:
            if parent_of(state.pid) == state.supervisor:
                signal.pidfd_send_signal(command, signal.SIGKILL)
            os.close(command)


@click.command("exec", context_settings=COMMAND)
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@common
@click.pass_obj
def exec_(settings: Settings, name: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in the network and mount namespaces of NAME: towpath exec web -- ip addr"""
    from towpath.cli import namespaces, runs
    from towpath.cli.supervise import parent_of

    need_root("towpath exec", "it enters namespaces")
    place = runs.Place.of(settings.socket)
    state = runs.load(place, name)
    status = status_of(place, state)
    if status != "running" or parent_of(state.pid) != state.supervisor:
        raise TowpathError(f"{name} is not running: it is {status}", hint=f"tidy up with: towpath stop {name}")
    try:
        namespaces.join(state.pid, net=bool(state.netns))
    except OSError as exc:
        raise TowpathError(f"cannot enter the namespaces of {name}: {exc}") from exc
    replace_with(command[1:] if command[0] == "--" and len(command) > 1 else command)


def replace_with(command: tuple[str, ...]) -> NoReturn:
    """Become `command`; exit code 127 or 126, as in a shell, where that fails."""
    from towpath.cli.supervise import NOT_FOUND, NOT_RUNNABLE, plain_signals

    plain_signals()
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as exc:
        click.echo(f"error: cannot run {command[0]!r}: {exc.strerror}", err=True)
        raise SystemExit(NOT_FOUND if isinstance(exc, FileNotFoundError) else NOT_RUNNABLE) from None
