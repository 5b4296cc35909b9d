"""Lets members through where the host's iptables forward nothing: the one thing that a table of our own cannot do.

An accept in our table ends our table only; a policy of DROP in `ip filter FORWARD` (Docker sets it, perhaps long after
we started) drops the packet all the same. So the nftables back end puts one chain there that accepts what comes from
and goes to the interfaces of members: two lines for each bridge, none for each container. Whether the policy is DROP is
one netlink question; the iptables programs run only when something is to be changed. Legacy iptables are not seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from towpath.kernel import xtables
from towpath.kernel.nftbatch import Tables
from towpath.kernel.xtables import PREFIX

CHAIN = "TOWPATH-FORWARD"
DROP = 0  # NF_DROP
FILTER = {4: "ip filter", 6: "ip6 filter"}
MEMBER = re.compile(rf"-A {CHAIN} -[io] (\S+) -j ACCEPT\Z")


class Forwarding:
    """Keeps the chain in step with the interfaces; remembers what it wrote so that nothing is asked twice."""

    def __init__(self) -> None:
        self._open: dict[int, frozenset[str]] = {4: frozenset(), 6: frozenset()}

    def admit(self, kernel: Tables, homes: Iterable[str]) -> bool:
        """Members appeared behind `homes`: accept them where the host would not. Returns whether it wrote."""
        new, wrote = frozenset(homes), False
        for version in PREFIX:
            if not new <= self._open[version] and kernel.policy(FILTER[version], "FORWARD") == DROP:
                saved = xtables.save(version, "filter")
                self._write(version, members(saved) | new, saved)
                wrote = True
        return wrote

    @property
    def used(self) -> bool:
        return any(self._open.values())

    def heal(self, kernel: Tables, homes: Iterable[str]) -> int:
        """Accept exactly `homes` where the policy is DROP, and none where it is not; returns how much changed."""
        changed = 0
        for version in PREFIX:
            dropping = kernel.policy(FILTER[version], "FORWARD") == DROP
            wanted = frozenset(homes) if dropping else frozenset()
            if not wanted and kernel.policy(FILTER[version], CHAIN) is None:
                self._open[version] = frozenset()
                continue
            changed += self._write(version, wanted, xtables.save(version, "filter"))
        return changed

    def _write(self, version: int, homes: frozenset[str], saved: str) -> int:
        text = difference(saved, homes)
        if text:
            xtables.restore(version, text, f"accepting {', '.join(sorted(homes)) or 'nothing'} in the host's FORWARD")
        self._open[version] = homes
        return int(bool(text))


def members(saved: str) -> frozenset[str]:
    """The interfaces that are accepted by both lines, as iptables-save prints them."""
    found = [match[1] for line in saved.splitlines() if (match := MEMBER.match(line))]
    return frozenset(name for name in found if found.count(name) == 2)


def difference(saved: str, homes: frozenset[str]) -> str:
    """Input of iptables-restore that makes the chain accept exactly `homes`; "" = it does. No homes, no chain."""
    lines = saved.splitlines()
    exists = any(line.startswith(f":{CHAIN} ") for line in lines)
    jumps = [line for line in lines if line == f"-A FORWARD -j {CHAIN}"]
    if members(saved) == homes and len(jumps) == exists == bool(homes):
        return ""
    # Naming the chain empties it where it exists.
    words = [f":{CHAIN} - [0:0]", *(f"-D{line[2:]}" for line in jumps)]
    words += [f"-A {CHAIN} -{side} {home} -j ACCEPT" for home in sorted(homes) for side in "io"]
    words += [f"-I FORWARD -j {CHAIN}"] if homes else [f"-X {CHAIN}"]
    return "\n".join(("*filter", *words, "COMMIT", ""))
