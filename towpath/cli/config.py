"""`towpath config`: check a configuration file, or show what is in force."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from towpath.cli.options import Settings, common
from towpath.cli.table import table

if TYPE_CHECKING:
    from towpath.config import Config

DEFAULT = "/etc/towpath/towpath.yaml"


def read(path: str | None) -> Config:
    """The file's configuration; without one the default file's where it exists, else every key's default."""
    from towpath import config, mode

    if path is None and not Path(DEFAULT).exists():
        return config.Config()
    return config.load(path or DEFAULT, modes=tuple(mode.installed()))


def plain(value: Any) -> Any:
    """A setting as JSON takes it: networks by name, everything else is text or a number already."""
    return [network.name for network in value] if isinstance(value, tuple) else value


def text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


@click.group()
@common
def config() -> None:
    """The agent's configuration."""


@config.command("check")
@click.argument("file")
@common
@click.pass_obj
def check(settings: Settings, file: str) -> None:
    """Read FILE as the agent would; a mistake names the file and the key."""
    found = read(file)
    names = [network.name for network in found.networks]
    networks = f"networks {', '.join(names)}" if names else "no networks"
    settings.show({"file": file, "ok": True, "networks": names}, f"{file}: all right ({networks})")


@config.command("show")
@click.option(
    "--config", "path", metavar="FILE", envvar="TOWPATH_CONFIG", help=f"[$TOWPATH_CONFIG; {DEFAULT} if there]"
)
@common
@click.pass_obj
def show(settings: Settings, path: str | None) -> None:
    """Every key with its value, its default and what it means."""
    from towpath import config as configuration

    found = read(path)
    rows = configuration.describe()
    body = {row.key: plain(configuration.value(found, row.key)) for row in rows}
    cells = [(row.key, text(body[row.key]), row.default, row.meaning) for row in rows]
    of_network = [(row.key, row.type, row.default, row.meaning) for row in configuration.describe_network()]
    tables = (
        table(("key", "value", "default", "meaning"), cells),
        table(("key of a network", "type", "default", "meaning"), of_network),
    )
    settings.show(body, "\n\n".join(tables))
