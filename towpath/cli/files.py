"""The /etc/hosts and /etc/resolv.conf that a command started by `towpath run` sees: texts, made by pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

LOCAL = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def hosts(addresses: Iterable[str], names: Iterable[str]) -> str:
    """localhost, and a line per own address (its prefix length may stand behind it) with every name."""
    known = " ".join(dict.fromkeys(name for name in names if name))
    own = [f"{address.partition('/')[0]}\t{known}\n" for address in addresses] if known else []
    return LOCAL + "".join(own)


def resolv_conf(dns: Mapping[str, Any], host: str) -> str:
    """resolv.conf(5) from the attachment's dns; what it leaves open comes from the host's text.

    Loopback nameservers of the host are left out: in another network namespace nobody answers there.
    """
    lines = [line.split() for line in host.splitlines() if line.strip() and line[0] not in "#;"]
    own = [f"nameserver {server}" for server in dns.get("nameservers", ())]
    search = [*([dns["domain"]] if dns.get("domain") else []), *dns.get("search", ())]
    options = list(dns.get("options", ()))
    kept = [] if own else [f"nameserver {words[1]}" for words in lines if _reachable_server(words)]
    text = own + kept
    if search:
        text.append("search " + " ".join(dict.fromkeys(search)))
    elif not own:
        text += [" ".join(words) for words in lines if words[0] in ("search", "domain")]
    if options:
        text.append("options " + " ".join(options))
    return "".join(f"{line}\n" for line in text) or "# no nameserver: the network names none, the host's are its own\n"


def _reachable_server(words: list[str]) -> bool:
    return len(words) > 1 and words[0] == "nameserver" and not words[1].startswith("127.") and words[1] != "::1"
