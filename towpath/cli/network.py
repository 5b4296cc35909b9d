"""`towpath network`: the networks of this node."""

from __future__ import annotations

from typing import Any

import click

from towpath.cli.options import Settings, common, one_by_one, progress
from towpath.cli.table import details, table


@click.group()
@common
def network() -> None:
    """Networks of this node."""


@network.command("ls")
@common
@click.pass_obj
def ls(settings: Settings) -> None:
    """List them."""
    rows = settings.client().get("networks")
    cells = [(n["name"], n["mode"], n["device"], ",".join(n["subnets"]), n["isolation"], n["source"]) for n in rows]
    settings.show(rows, lambda: table(("name", "mode", "device", "subnets", "isolation", "source"), cells))


@network.command("create")
@click.argument("name")
@click.option("--mode", help="bridge (the default) or host.")
@click.option("--subnet", "subnets", multiple=True, metavar="CIDR", help="One per address family.")
@click.option("--bridge", metavar="DEVICE", help="Name of the bridge [br-NAME].")
@click.option("--isolation", help="open (the default), same-network or isolated.")
@click.option("--mtu", type=int)
@click.option("--masquerade/--no-masquerade", default=None, help="Outside, containers show the node's address.")
@click.option("--hairpin/--no-hairpin", default=None, help="A container reaches itself at its published port.")
@click.option("--dns", "nameservers", multiple=True, metavar="ADDRESS", help="Nameserver that containers get.")
@common
@click.pass_obj
def create(settings: Settings, /, name: str, **options: Any) -> None:
    """Make a network: towpath network create web --subnet 10.1.0.0/24 --subnet fd00:1::/64"""
    body = {"name": name, **body_of(options)}
    with progress(f"making network {name}"):
        made = settings.client().post("networks", body=body)
    settings.show(made, f"network {made['name']} made ({described(made)})")


def described(row: dict[str, Any]) -> str:
    if row["mode"] == "host":
        return "the host's own addresses"
    return ", ".join(row["subnets"]) or "no --subnet: containers get no address"


def body_of(options: dict[str, Any]) -> dict[str, Any]:
    """The options as keys of the YAML form; what was not given is left to its default."""
    body = {key: value for key, value in options.items() if value is not None and value != ()}
    if nameservers := body.pop("nameservers", ()):
        body["dns"] = {"nameservers": list(nameservers)}
    if "subnets" in body:
        body["subnets"] = list(body["subnets"])
    return body


@network.command("show")
@click.argument("name")
@common
@click.pass_obj
def show(settings: Settings, name: str) -> None:
    """Everything about one."""
    row = settings.client().get("networks", name)
    settings.show(row, lambda: details(shown(row)))


def shown(row: dict[str, Any]) -> list[tuple[str, object]]:
    """The row for people: pools and routes as text, the format's version left out."""
    special: dict[str, object] = {
        "pools": [f"{s['start']}-{s['end']} of {s['subnet']}" for pool in row["pools"] for s in pool["ranges"]],
        "routes": [f"{r['dst']} via {r['gw'] or 'the gateway'}" for r in row["routes"]],
    }
    return [(key, special.get(key, value)) for key, value in row.items() if key not in ("v", "subnets")]


@network.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@common
@click.pass_obj
def rm(settings: Settings, names: tuple[str, ...]) -> None:
    """Remove networks that nothing is attached to."""
    client = settings.client()

    def remove(name: str) -> None:
        with progress(f"removing network {name}"):
            client.delete("networks", name)

    one_by_one(settings, "removed", names, remove, "network {} removed")
