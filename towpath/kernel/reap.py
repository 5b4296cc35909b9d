"""Deletes links, several at the price of one: the kernel waits out a grace period (16-20 ms) for each delete request.

RTM_DELLINK by IFLA_GROUP removes every link of a group in one period, foreign ones too. So: a random group number,
proved to be nobody's by a dump, then only links that carry our alias are put into it, then the group goes. What is not
ours, or is a kind that we never make, is deleted alone.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterable

from towpath.errors import PhaseFailed
from towpath.kernel import links
from towpath.kernel.netlink import Netlink, u32
from towpath.plan import DropLink

KINDS = frozenset({"veth", "ifb", "bridge"})


class Reaper:
    """Deletes links by name in the namespace where it is first used; for one thread."""

    def __init__(self) -> None:
        self._netlink: Netlink | None = None

    def reap(self, names: list[str]) -> list[BaseException | None]:
        """One outcome per name: None where the link is gone (or never was), else PhaseFailed."""
        if self._netlink is None:
            self._netlink = Netlink()
        failed: dict[str, PhaseFailed] = {}
        together, alone = sort(self._netlink, dict.fromkeys(names))
        if len(together) > 1 and drop_together(self._netlink, together):
            together = {}
        for name in (*together, *alone):
            answer = self._netlink.ask(links.drop_link(name))
            if answer.errno not in (0, errno.ENODEV):
                failed[name] = PhaseFailed("host", DropLink(name), answer.errno, answer.text)
        return [failed.get(name) for name in names]


def sort(netlink: Netlink, names: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """Which links may go as a group (name → index) and which alone; missing ones are in neither."""
    asked = list(names)
    if len(asked) == 1:
        return {}, asked  # no need to know: one request does it, and a missing link is fine
    together: dict[str, int] = {}
    alone: list[str] = []
    for name, answer in zip(asked, netlink.send([links.get_link(n) for n in asked]), strict=True):
        if answer.errno:
            if answer.errno != errno.ENODEV:
                alone.append(name)
            continue
        link, _ = links.read_link(answer.data[0])
        if link.alias == links.ALIAS and link.kind in KINDS:
            together[name] = link.index
        else:
            alone.append(name)
    return together, alone


def drop_together(netlink: Netlink, doomed: dict[str, int]) -> bool:
    """Delete links as one group. False where the kernel refused: then nothing is known and each is asked alone."""
    group = free_group(netlink)
    marked = netlink.send([links.set_group(index, group) for index in doomed.values()])
    if any(answer.errno not in (0, errno.ENODEV) for answer in marked):
        return False
    return netlink.ask(links.drop_group(group)).errno in (0, errno.ENODEV)


def free_group(netlink: Netlink) -> int:
    """A group number, never 0 (every link's birth group), that no link of this namespace has."""
    seen = netlink.dump_raw(links.list_links())
    while True:
        group = secrets.randbelow(0x7FFFFFFF) + 1
        # A search for the packed attribute may find it by chance elsewhere in the dump: then another number is as good.
        if u32(links.IFLA_GROUP, group) not in seen:
            return group
