"""What every command shares: --socket, --json, how it prints, how it fails, and a word when something takes long."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from towpath.errors import TowpathError

if TYPE_CHECKING:
    from towpath.cli.client import Client

DEFAULT_SOCKET = "/run/towpath/agent.sock"
PATIENCE = 2.0  # seconds of silence after which a person wants to know what goes on

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Settings:
    """How this call was made. `socket_given`: --socket or $TOWPATH_SOCKET named it."""

    socket: str = field(default_factory=lambda: os.environ.get("TOWPATH_SOCKET") or DEFAULT_SOCKET)
    socket_given: bool = field(default_factory=lambda: bool(os.environ.get("TOWPATH_SOCKET")))
    json: bool = False

    def client(self) -> Client:
        from towpath.cli.client import Client

        return Client(self.socket)

    def show(self, data: object, text: str | Callable[[], str]) -> None:
        """Print `data` as JSON where --json was given, else the text."""
        if self.json:
            click.echo(json.dumps(data, indent=2, ensure_ascii=False))
        else:
            said = text() if callable(text) else text
            if said:
                click.echo(said)


def _settings(ctx: click.Context) -> Settings:
    return ctx.ensure_object(Settings)


def _take_socket(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value:
        settings = _settings(ctx)
        settings.socket, settings.socket_given = str(Path(value).absolute()), True


def _take_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        _settings(ctx).json = True


def common(command: F) -> F:
    """--socket and --json, accepted before the verb and after it."""
    socket = click.option(
        "--socket",
        metavar="PATH",
        expose_value=False,
        callback=_take_socket,
        help="The agent's socket [$TOWPATH_SOCKET].",
    )
    as_json = click.option(
        "--json", is_flag=True, expose_value=False, callback=_take_json, help="Answer in JSON, for programs."
    )
    return socket(as_json(command))


class Failed(click.ClickException):
    """What a command says when it failed: "error: what: why. hint" on stderr, exit code 1."""

    def __init__(self, error: TowpathError, *, as_json: bool) -> None:
        super().__init__(error.what)
        self.hint = error.hint
        self.as_json = as_json

    def format_message(self) -> str:
        return sentence(self.message, self.hint)

    def show(self, file: Any = None) -> None:
        if self.as_json:
            text = json.dumps({"error": self.message, "hint": self.hint}, ensure_ascii=False)
        else:
            text = f"error: {self.format_message()}"
        click.echo(text, file=file or sys.stderr)


class Misused(click.UsageError):
    """A usage error as a program reads it: exit code 2 as ever, but JSON on stderr in place of the usage line."""

    def __init__(self, error: click.UsageError) -> None:
        super().__init__(error.format_message(), error.ctx)

    def show(self, file: Any = None) -> None:
        hint = f"see: {self.ctx.command_path} --help" if self.ctx else ""
        click.echo(json.dumps({"error": self.message, "hint": hint}, ensure_ascii=False), file=file or sys.stderr)


@contextmanager
def misuse_in_json(args: Iterable[str]) -> Iterator[None]:
    """Usage errors of a call with these arguments leave as Misused where --json is one of them."""
    as_json = "--json" in args
    try:
        yield
    except click.UsageError as error:
        if as_json and not isinstance(error, Misused):
            raise Misused(error) from error
        raise


def sentence(what: str, hint: str) -> str:
    """ "what: why" and "try this" → "what: why. Try this"."""
    if not hint:
        return what
    return f"{what.rstrip('.')}. {hint[:1].upper()}{hint[1:]}"


@contextmanager
def explained(ctx: click.Context) -> Iterator[None]:
    """TowpathError leaves as Failed: the one place where the command line translates errors."""
    try:
        yield
    except TowpathError as error:
        raise Failed(error, as_json=_settings(ctx).json) from error


def one_by_one(settings: Settings, key: str, names: Iterable[str], act: Callable[[str], None], said: str) -> None:
    """Do it for every name and print `said` (with {} for the name) for each that is done; as JSON, {key: those}.

    One that fails does not keep the others from their turn: all failures are told, the last one by the exception.
    """
    done: list[str] = []
    failed: TowpathError | None = None
    for name in names:
        try:
            act(name)
        except TowpathError as error:
            if failed:
                Failed(failed, as_json=settings.json).show()
            failed = error
            continue
        done.append(name)
        if not settings.json:
            click.echo(said.format(name))
    settings.show({key: done}, "")
    if failed:
        raise failed


@contextmanager
def progress(doing: str, patience: float = PATIENCE) -> Iterator[None]:
    """Say on stderr what is being done when it takes longer than `patience` seconds."""
    import threading

    timer = threading.Timer(patience, lambda: click.echo(f"{doing} …", err=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
