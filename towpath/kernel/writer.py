"""The one writer of the firewall: it commits what queued up as one transaction, and heals in turn with commits.

The kernel counts the transactions of nf_tables in each network namespace (its generation). As long as the count is what
our own transactions made it, nobody else wrote, and there is nothing to heal: a burst of ADDs reads nothing back.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

from towpath.kernel.contract import Firewall, Wanted
from towpath.kernel.crew import Grouped
from towpath.kernel.netlink import NETLINK_NETFILTER, Message, Netlink, attributes
from towpath.plan import Op, Rule

GETGEN = 10 << 8 | 16  # linux/netfilter/nf_tables.h NFT_MSG_GETGEN in NFNL_SUBSYS_NFTABLES
GEN_ID = 1
MOST = 8  # transactions of one commit of a back end that does not count them: one per family and table


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules of one phase; they are one transaction, perhaps with those of other plans."""

    changes: tuple[Op, ...]
    firewall: str = ""


@dataclass(slots=True)
class Heal:
    """Bring one back end to what is wanted when the writer's turn has come; `changed` is then the count."""

    firewall: str
    wanted: Callable[[], Wanted]
    changed: int = 0


@dataclass(slots=True)
class Ask:
    """Whether somebody else wrote since the last heal of this back end: `touched`, when the turn has come."""

    firewall: str
    touched: bool = True


class Generation:
    """Whether nf_tables of this thread's namespace holds only what we wrote since a back end was brought to date."""

    def __init__(self) -> None:
        self._netlink: Netlink | None = None  # kept: closing one waits for a grace period
        self._known: dict[str, int] = {}  # by back end

    def now(self) -> int:
        """The count; -1 where the kernel has no nf_tables."""
        self._netlink = self._netlink or Netlink(NETLINK_NETFILTER)
        answer = self._netlink.ask(Message(GETGEN, 0, struct.pack(">BBH", 0, 0, 0)))
        if answer.errno or not answer.data:
            return -1
        return int.from_bytes(attributes(answer.data[0], 4)[GEN_ID], "big")

    def settle(self, name: str, before: int) -> None:
        """What was read since `before` was all as it should be. Somebody wrote meanwhile: then nobody knows."""
        if self.now() == before:
            self._known[name] = before

    def untouched(self, name: str) -> bool:
        return self._known.get(name, -1) == self.now() >= 0

    def counted(self, transactions: int) -> None:
        """So many transactions of ours were made: who knew the count before them knows it now."""
        self._known = {name: known + transactions for name, known in self._known.items()}

    def wrote(self, before: int) -> None:
        """A few transactions of ours, at most MOST, came after `before` was read: who knew that knows the count now.

        More than that, and somebody else wrote at the same moment: then nobody knows.
        """
        after = self.now()
        if after - before > MOST:
            return
        self._known = {name: after if known == before else known for name, known in self._known.items()}


class Writer:
    """firewall: gives the back end of a name. default: names the one for phases that name none."""

    def __init__(self, firewall: Callable[[str], Firewall], default: Callable[[], str]) -> None:
        self._firewall = firewall
        self._default = default
        self._generation = Generation()
        self._lock = threading.Lock()  # one at a time writes, whichever thread it is
        self._line: Grouped[Rules | Heal | Ask] = Grouped("towpath-rules", self._work)

    async def commit(self, rules: Rules) -> None:
        """In the queue: what waits there is done as one."""
        await self._line.submit(rules)

    def is_quick(self, rules: Rules) -> bool:
        """Whether the calling thread may as well commit it itself, with `commit_now`."""
        return self._firewall(rules.firewall or self._default()).quick

    def commit_now(self, rules: Rules) -> None:
        """In the calling thread, which has to be in the agent's namespace."""
        with self._lock:
            outcome = self._commit(rules.firewall or self._default(), [rules.changes])[0]
        if outcome is not None:
            raise outcome

    async def heal(self, firewall: str, wanted: Callable[[], Wanted]) -> int:
        turn = Heal(firewall, wanted)
        await self._line.submit(turn)
        return turn.changed

    async def touched(self, firewall: str) -> bool:
        turn = Ask(firewall)
        await self._line.submit(turn)
        return turn.touched

    def close(self) -> None:
        self._line.close()

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _work(self, requests: list[Rules | Heal | Ask]) -> list[BaseException | None]:
        """Commits first, as one transaction per back end; then whoever wants to heal, one after the other."""
        with self._lock:
            return self._work_alone(requests)

    def _work_alone(self, requests: list[Rules | Heal | Ask]) -> list[BaseException | None]:
        outcomes: dict[int, BaseException | None] = {}
        by_name: dict[str, list[int]] = {}
        rules = {place: request for place, request in enumerate(requests) if isinstance(request, Rules)}
        for place, request in rules.items():
            by_name.setdefault(request.firewall or self._default(), []).append(place)
        for name, places in by_name.items():
            outcomes.update(zip(places, self._commit(name, [rules[p].changes for p in places]), strict=True))
        for place, turn in enumerate(requests):
            if isinstance(turn, Heal):
                outcomes[place] = self._heal(turn)
            elif isinstance(turn, Ask):
                turn.touched = not self._generation.untouched(turn.firewall)
                outcomes[place] = None
        return [outcomes[place] for place in range(len(requests))]

    def _commit(self, name: str, requests: list[tuple[Op, ...]]) -> list[BaseException | None]:
        """One transaction for all; where it fails each request gets its own, so that none fails for another's."""
        together = tuple(change for changes in requests for change in changes)
        try:
            self._write(self._firewall(name), together)
        except Exception as failure:
            if len(requests) == 1:
                return [failure]
            return [self._commit(name, [changes])[0] for changes in requests]
        return [None] * len(requests)

    def _write(self, firewall: Firewall, changes: tuple[Op, ...]) -> None:
        before = -1 if firewall.quick else self._generation.now()
        transactions = firewall.commit(changes)
        if transactions >= 0:
            self._generation.counted(transactions)
        elif not firewall.quick:
            self._generation.wrote(before)

    def _heal(self, turn: Heal) -> BaseException | None:
        try:
            before = self._generation.now()
            firewall, wanted = self._firewall(turn.firewall), turn.wanted()
            moving = self._seen(firewall, wanted.moving)
            turn.changed = firewall.heal((*wanted.settled, *moving))
            # After a change the kernel's word of it brings the next look, which settles. A rule under way that is
            # not there may have been there: that too is looked at again.
            if len(moving) == len(wanted.moving):
                self._generation.settle(turn.firewall, before)
        except Exception as failure:
            return failure
        return None

    @staticmethod
    def _seen(firewall: Firewall, rules: tuple[Rule, ...]) -> list[Rule]:
        """Those of the rules that are installed."""
        seen = firewall.seen() if rules else frozenset()
        return [rule for rule in rules if firewall.fingerprints([rule]) <= seen]
