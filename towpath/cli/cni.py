"""`towpath cni`: put the CNI executables where a runtime looks for them, or take them away."""

from __future__ import annotations

import os

import click

from towpath.cli.options import Settings, common, progress


@click.group()
@common
def cni() -> None:
    """CNI executables."""


@cni.command("install")
@click.argument("directory", metavar="[DIR]", required=False)
@click.option(
    "--compiler",
    type=click.Choice(["auto", "never", "require"]),
    default="auto",
    help="Whether to build the C executable, which starts ten times faster [auto: where there is a compiler].",
)
@common
@click.pass_obj
def install(settings: Settings, directory: str | None, compiler: str) -> None:
    """Install the executables into DIR [cni.bin_dir of the configuration: /opt/cni/bin]; replaced by rename.

    They will ask the agent at --socket or $TOWPATH_SOCKET, else at the configuration's socket.
    """
    from typing import cast

    from towpath import install as setup
    from towpath.cli.config import read

    config = read(os.environ.get("TOWPATH_CONFIG"))
    place = directory or config.cni.bin_dir
    socket = settings.socket if settings.socket_given else config.socket
    with progress(f"building and trying the executables for {place}"):
        done = setup.install(place, socket, compiler=cast(setup.Compiler, compiler))
    kind = "C" if done.kind == "c" else "Python"
    body = {
        "directory": str(done.directory),
        "kind": done.kind,
        "names": list(done.names),
        "socket": done.socket,
        "note": done.note,
    }
    said = f"{kind} executables installed in {done.directory}: {', '.join(done.names)}"
    settings.show(body, said + (f"\n{done.note}" if done.note else ""))


@cni.command("uninstall")
@click.argument("directory", metavar="DIR")
@common
@click.pass_obj
def uninstall(settings: Settings, directory: str) -> None:
    """Take our executables out of DIR; other files stay."""
    from towpath import install as setup

    names = setup.uninstall(directory)
    said = f"removed from {directory}: {', '.join(names)}" if names else f"nothing of ours in {directory}"
    settings.show({"directory": directory, "removed": list(names)}, said)
