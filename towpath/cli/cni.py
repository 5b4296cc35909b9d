"""`towpath cni`: put the CNI executables where a runtime looks for them, or take them away."""

from __future__ import annotations

import click

from towpath.cli.options import Settings, common, progress


@click.group()
@common
def cni() -> None:
    """CNI executables."""


@cni.command("install")
@click.argument("directory", metavar="DIR")
@click.option(
    "--compiler",
    type=click.Choice(["auto", "never", "require"]),
    default="auto",
    help="Whether to build the C executable, which starts ten times faster [auto: where there is a compiler].",
)
@common
@click.pass_obj
def install(settings: Settings, directory: str, compiler: str) -> None:
    """Install the executables into DIR, for example /opt/cni/bin; what is there is replaced by rename."""
    from typing import cast

    from towpath import install as setup

    with progress(f"building and trying the executables for {directory}"):
        done = setup.install(directory, settings.socket, compiler=cast(setup.Compiler, compiler))
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
