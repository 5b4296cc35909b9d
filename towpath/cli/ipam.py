"""`towpath ipam`: the address pools of this node's networks."""

from __future__ import annotations

import click

from towpath.cli.options import Settings, common
from towpath.cli.table import table

HEADERS = ("network", "pool", "size", "used", "free")


def count(number: int) -> str:
    """A /64 has 20 digits of addresses: beyond six, three digits tell enough."""
    return str(number) if number < 10**6 else f"{number:.2e}"


@click.group()
@common
def ipam() -> None:
    """Address pools."""


@ipam.command("ls")
@common
@click.pass_obj
def ls(settings: Settings) -> None:
    """How full each pool is."""
    pools = settings.client().get("ipam")
    rows = [(p["network"], p["pool"], count(p["size"]), count(p["used"]), count(p["free"])) for p in pools]
    settings.show(pools, lambda: table(HEADERS, rows, right=frozenset(HEADERS[2:])))
