"""Picks the firewall back end: a pure decision on what the host's own tools print."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from towpath.errors import BadConfig, Unavailable
from towpath.kernel.contract import Firewall

NAMES = ("nftables", "iptables")
PROGRAMS = {"nftables": ("nft",), "iptables": ("iptables-save", "iptables-restore")}
PATIENCE = 30.0  # seconds
# Chains that say who manages the filter table: Docker, ufw, firewalld, kube-proxy, Calico, libvirt, Shorewall.
MANAGERS = re.compile(r":(DOCKER|ufw6?-|FWD[IO]_|FORWARD_(?:direct|IN_ZONES|POLICIES)|KUBE-|cali-|LIBVIRT_|shorewall)")


@dataclass(frozen=True, slots=True)
class Host:
    """What was found. filter: the output of `iptables-save -t filter`, None = no such program; nft: there is one."""

    filter: str | None
    nft: bool


def decide(setting: str, host: Host) -> str:
    """The name of the back end. Raises BadConfig for an unknown setting, Unavailable naming what to install.

    "auto" is iptables where somebody else's iptables rules decide about forwarding: an accept in a table of ours does
    not override a drop in theirs.
    """
    if setting not in ("auto", *NAMES):
        raise BadConfig(f"firewall {setting!r} is not one of auto, {', '.join(NAMES)}")
    present = {"nftables": host.nft, "iptables": host.filter is not None}
    if setting != "auto":
        if not present[setting]:
            raise missing(setting)
        return setting
    if host.filter is not None and (managed(host.filter) or not host.nft):
        return "iptables"
    if not host.nft:
        raise Unavailable("there is neither nft nor iptables", hint="install one: apt-get install nftables")
    return "nftables"


def managed(filter_table: str) -> bool:
    """Whether the filter table, as iptables-save prints it, belongs to a manager or refuses to forward."""
    for line in filter_table.splitlines():
        if MANAGERS.match(line) or line.startswith(":FORWARD DROP"):
            return True
        if (
            line.startswith("-A FORWARD ")
            and '--comment "towpath ' not in line
            and re.search(r" -j (DROP|REJECT)\b", line)
        ):
            return True
    return False


def missing(name: str) -> Unavailable:
    programs = " and ".join(PROGRAMS[name])
    return Unavailable(f"{programs} cannot be run on this host", hint=f"install it: apt-get install {name}")


def inspect() -> Host:
    """Ask the calling thread's network namespace."""
    return Host(_output("iptables-save", "-t", "filter"), _output("nft", "--version") is not None)


def pick(setting: str) -> str:
    return decide(setting, inspect())


def make(name: str, *, netns_is_current: bool = False) -> Firewall:
    """The back end of that name. Raises Unavailable where the host lacks it, BadConfig for a name there is not.

    netns_is_current: all callers are in one network namespace, so which it is need not be looked at again.
    """
    from towpath.kernel.iptables import Iptables
    from towpath.kernel.nft import Nftables

    if name not in NAMES:
        raise BadConfig(f"firewall {name!r} is not one of {', '.join(NAMES)}")
    for program in PROGRAMS[name]:
        if _output(program, "--version") is None:
            raise missing(name)
    backend = Nftables if name == "nftables" else Iptables
    return backend(netns_is_current=netns_is_current)


def _output(*command: str) -> str | None:
    """None where the program is missing or cannot work here (no permission, no kernel support)."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
