"""`towpath status` and `towpath version`."""

from __future__ import annotations

from typing import Any

import click

from towpath.cli.options import Settings, common
from towpath.cli.table import details, span, table


def status_text(body: dict[str, Any]) -> str:
    store = body["store"]
    phases = ", ".join(f"{n} {phase}" for phase, n in sorted(body["attachments"].items())) or "none"
    top = details(
        [
            ("node", body["node"]),
            ("agent", f"{body['version']}, pid {body['pid']}, up {span(body['uptime'])}"),
            ("socket", body["socket"]),
            ("state", f"{body['state_dir']} ({store['backend']}, {store['keys']} rows, revision {store['revision']})"),
            ("firewall", body["firewall"]),
            ("networks", str(body["networks"])),
            ("attachments", phases),
        ]
    )
    steps = [
        (step, f"{t['count']:.0f}", f"{t['median_ms']:.2f}", f"{t['max_ms']:.2f}")
        for step, t in body["timings"].items()
    ]
    if not steps:
        return top
    headers = ("step", "times", "median ms", "max ms")
    return f"{top}\n\n{table(headers, steps, right=frozenset(headers[1:]))}"


@click.command()
@common
@click.pass_obj
def status(settings: Settings) -> None:
    """How the agent is doing: what it serves, and how long its steps take."""
    body = settings.client().get("status")
    settings.show(body, lambda: status_text(body))


@click.command()
@common
@click.pass_obj
def version(settings: Settings) -> None:
    """The version of this command."""
    from towpath import __version__

    settings.show({"version": __version__}, f"towpath {__version__}")
