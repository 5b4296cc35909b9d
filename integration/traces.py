"""What a host holds in kernel and state, in comparable lines: two pictures tell what was left behind."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.lab import Host
from integration.namespaces import Netns

# Counts and moments differ from look to look; a handle only says how often a rule was made.
VOLATILE = {"handle", "packets", "bytes", "expires", "used"}


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything that could leak, one line each."""

    lines: Counter[str]

    def __sub__(self, other: Picture) -> list[str]:
        """Lines with + are here and not in `other`; with - the other way round. Empty = the same."""
        more = [f"+ {line}" for line in (self.lines - other.lines).elements()]
        return sorted(more + [f"- {line}" for line in (other.lines - self.lines).elements()])


def picture(host: Host) -> Picture:
    """Links, addresses, routes, rules of both firewalls, and the agent's own rows (where one runs)."""
    lines = [*links(host.netns), *routes(host.netns), *nft(host.netns), *iptables(host.netns), *rows(host)]
    return Picture(Counter(lines))


def links(netns: Netns) -> list[str]:
    found = []
    for link in json.loads(netns.run("ip", "-d", "-j", "addr", "show") or "[]"):
        kind = link.get("linkinfo", {}).get("info_kind", "")
        found.append(f"link {link['ifname']} {kind} master={link.get('master', '')} mtu={link['mtu']}")
        found += [
            f"address {link['ifname']} {a['local']}/{a['prefixlen']}"
            for a in link["addr_info"]
            if a["scope"] == "global"
        ]
    return found


def routes(netns: Netns) -> list[str]:
    text = netns.run("ip", "route", "show", "table", "main") + netns.run("ip", "-6", "route", "show", "table", "main")
    clean = (line.replace(" linkdown", "").replace(" dead", "").strip() for line in text.splitlines())
    return [f"route {line}" for line in clean if not line.startswith("fe80::")]


def nft(netns: Netns) -> list[str]:
    """The ruleset of every nftables user (iptables-nft is one), without counters and handles; elements singly."""
    lines = []
    for entry in json.loads(netns.run("nft", "-j", "list", "ruleset"))["nftables"]:
        ((kind, body),) = entry.items()
        if kind == "metainfo":
            continue
        owner = body.get("table", body.get("name"))
        where = f"nft {body.get('family')} {owner} {kind} {body.get('name', body.get('chain'))}"
        lines += [f"{where} element {json.dumps(steady(e), sort_keys=True)}" for e in body.pop("elem", ())]
        lines.append(f"{where} {json.dumps(steady(body), sort_keys=True)}")
    return lines


def iptables(netns: Netns) -> list[str]:
    """iptables-save of both families, where it is installed: matches that `nft -j` cannot print are words here."""
    lines = []
    for tool in filter(shutil.which, ("iptables-save", "ip6tables-save")):
        table = ""
        for line in netns.run(tool).splitlines():
            if line.startswith("*"):
                table = line
            elif line.startswith(("-A", ":")):
                lines.append(f"{tool} {table} {line.split(' [')[0]}")
    return lines


def rows(host: Host) -> list[str]:
    """Attachments and used addresses as the agent tells them."""
    if host.agent.process is None:
        return []
    found = [f"attachment {json.dumps(row.get('key', row))}" for row in host.agent.get("/v1/attachments")]
    return found + [
        f"pool {row.get('network')} {row.get('pool')} used={row.get('used')}" for row in host.agent.get("/v1/ipam")
    ]


def files(folder: Path) -> list[str]:
    """Names below a folder: for plugins that keep their state as files."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: steady(inner) for key, inner in value.items() if key not in VOLATILE}
    return [steady(inner) for inner in value] if isinstance(value, list) else value
