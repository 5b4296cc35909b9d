"""`towpath attach`: the attachments of this node, whoever made them."""

from __future__ import annotations

from typing import Any

import click

from towpath.cli.options import Settings, common, one_by_one, progress
from towpath.cli.table import details, table

Ident = tuple[str, ...]


def read_id(text: str) -> Ident:
    """ORIGIN/NETWORK/CONTAINER/IFNAME, as `attach ls` prints it."""
    parts = tuple(text.split("/"))
    if len(parts) != 4 or not all(parts):
        raise click.BadParameter(f"{text!r} is not ORIGIN/NETWORK/CONTAINER/IFNAME: see towpath attach ls")
    return parts


def one_id(ctx: click.Context, param: click.Parameter, text: str) -> Ident:
    return read_id(text)


def many_ids(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[Ident, ...]:
    return tuple(map(read_id, texts))


@click.group()
@common
def attach() -> None:
    """Attachments: one container's interface on one network each."""


@attach.command("ls")
@click.argument("prefix", default="")
@common
@click.pass_obj
def ls(settings: Settings, prefix: str) -> None:
    """List them, or those whose id starts with PREFIX (towpath attach ls cni/)."""
    records = settings.client().get("attachments", prefix=prefix)
    rows = [(r["id"], ",".join(r["addresses"]), ports_text(r["ports"]), r["phase"], r["name"]) for r in records]
    settings.show(records, lambda: table(("id", "addresses", "ports", "phase", "name"), rows))


def ports_text(ports: list[dict[str, Any]]) -> str:
    return ",".join(f"{p['host_ip'] or '*'}:{p['host_port']}->{p['container_port']}/{p['proto']}" for p in ports)


@attach.command("show")
@click.argument("ident", callback=one_id, metavar="ID")
@common
@click.pass_obj
def show(settings: Settings, ident: Ident) -> None:
    """Everything that one claims on this node."""
    record = settings.client().get("attachments", *ident)
    settings.show(record, lambda: details(shown(record)))


def shown(record: dict[str, Any]) -> list[tuple[str, object]]:
    """The record for people: ports and routes as text, times as dates, what is in other lines left out."""
    from datetime import datetime

    special: dict[str, object] = {
        "parts": ", ".join(record["parts"]),
        "ports": ports_text(record["ports"]).split(",") if record["ports"] else [],
        "routes": [f"{r['dst']} via {r['gw'] or 'the gateway'}" for r in record["routes"]],
        "created": datetime.fromtimestamp(record["created"]).astimezone().isoformat(timespec="seconds"),
    }
    hidden = {"v", "leases", "origin", "container", "port_rules", *(() if record["tuning"]["sysctl"] else ("tuning",))}
    return [(key, special.get(key, value)) for key, value in record.items() if key not in hidden and value != 0]


@attach.command("rm")
@click.argument("idents", callback=many_ids, nargs=-1, required=True, metavar="ID…")
@common
@click.pass_obj
def rm(settings: Settings, idents: tuple[Ident, ...]) -> None:
    """Take everything away that these claim: interface, addresses, ports, rules."""
    client = settings.client()

    def detach(name: str) -> None:
        with progress(f"detaching {name}"):
            client.delete("attachments", *name.split("/"))

    one_by_one(settings, "removed", map("/".join, idents), detach, "{} detached")


@attach.command("check")
@click.argument("idents", callback=many_ids, nargs=-1, metavar="[ID…]")
@common
@click.pass_context
def check(ctx: click.Context, idents: tuple[Ident, ...]) -> None:
    """Compare the kernel with what these (or all) claim; exit code 1 where it differs."""
    settings: Settings = ctx.obj
    client = settings.client()
    wanted = idents or tuple(tuple(r["id"].split("/")) for r in client.get("attachments"))
    with progress(f"checking {len(wanted)} attachments"):
        found = [client.get("attachments", *ident, "check") for ident in wanted]
    lines = [f"{f['id']}: {problem}" for f in found for problem in f["problems"]]
    settings.show(found, "\n".join(lines) or f"{len(found)} checked: all as they should be")
    if lines:
        ctx.exit(1)
