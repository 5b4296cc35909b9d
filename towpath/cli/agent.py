"""`towpath agent`: read the configuration and run this node's agent until SIGTERM."""

from __future__ import annotations

import click

from towpath.cli.config import DEFAULT, read
from towpath.cli.options import Settings, common


@click.command()
@click.option(
    "--config", "path", metavar="FILE", envvar="TOWPATH_CONFIG", help=f"[$TOWPATH_CONFIG; {DEFAULT} if there]"
)
@common
@click.pass_obj
def agent(settings: Settings, path: str | None) -> None:
    """Run the agent of this node in the foreground.

    It serves the network namespace that it is started in. Several agents on one machine need a state_dir and a socket
    each; --socket and $TOWPATH_SOCKET go before the file's.
    """
    import asyncio
    from dataclasses import replace

    from towpath import agent as roof
    from towpath import logs

    config = read(path)
    if settings.socket_given:
        config = replace(config, socket=settings.socket)
    logs.setup(config.log_level, config.log_format)
    asyncio.run(roof.run(config))
