"""Decide who gets which address of a network, never one twice; pure memory, built from the leases that rows hold.

The order is round robin: addresses in sequence from behind the last one that was given, once around each pool; then
the ones that came back meanwhile, the longest free first. So an address just released is the last to be given again,
and stale neighbour entries and connections die before it is. Nothing is ever searched for: a pool keeps the spans that
are still ahead of it and a queue of what came back, so a /64 costs what a /24 does. What is passed over (taken by
value, or still leased when the round began) is passed over once per round.

An attachment takes addresses in two steps, because the row in the store lies between them:
choose → (transaction) → commit, or abandon where the transaction failed. Between the two nobody else is offered them.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address
from typing import NamedTuple

from towpath.errors import BadConfig, Conflict, PoolEmpty, TowpathError, Unavailable
from towpath.model import Address, Interface, Lease, Network, Pool, Range, Take
from towpath.ranges import CNI, YAML, Keys, parse_pool, parse_pools, parse_range, refuse_overlap
from towpath.schema import Misfit

__all__ = ["CNI", "YAML", "Allocator", "Keys", "Usage", "parse_pool", "parse_pools", "parse_range"]

EXTRA_KEPT = 64  # runtimes repeat the same few ranges; the round of one that was forgotten begins anew
PENDING = "an attachment that is being made now"


class Usage(NamedTuple):
    """How full one pool is, in addresses; `size` counts what can be leased at all."""

    pool: str
    size: int
    used: int
    free: int


class _Round:
    """The order in which the addresses of one pool are given. Addresses are plain integers here."""

    def __init__(self, index: int, pool: Pool, owners: dict[int, str], last: int | None) -> None:
        self.index = index
        self.pool = pool
        self.owners = owners  # of the pool's family, shared with the allocator
        self.bounds = [(int(r.start), int(r.end)) for r in pool.ranges]
        self.never = {n for r in pool.ranges for n in _never(r) if n in self}
        self.size = sum(end - start + 1 for start, end in self.bounds) - len(self.never)
        mine = [n for n in owners if n in self]
        self.used = sum(n not in self.never for n in mine)
        self.last = last if last is not None and last in self else max(mine, default=None)
        self.ahead = deque(self._spans())
        self.back: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, number: int) -> bool:
        return any(start <= number <= end for start, end in self.bounds)

    def _spans(self) -> list[tuple[int, int]]:
        """One round over the pool that begins behind `last`."""
        for i, (start, end) in enumerate(self.bounds):
            if self.last is not None and start <= self.last <= end:
                return [(self.last + 1, end), *self.bounds[i + 1 :], *self.bounds[:i], (start, self.last)]
        return list(self.bounds)

    def peek(self) -> int | None:
        """The next free address; it stays the next one until somebody takes it."""
        while self.ahead:
            number, end = self.ahead[0]
            while number <= end and (number in self.owners or number in self.never or number in self.back):
                number += 1
            if number <= end:
                self.ahead[0] = (number, end)
                return number
            self.ahead.popleft()
        return next(iter(self.back), None)

    def taken(self, number: int) -> None:
        self.back.pop(number, None)
        self.used += number not in self.never

    def returned(self, number: int) -> None:
        if number not in self.never:
            self.back[number] = None
            self.used -= 1

    def interface(self, number: int) -> tuple[Interface, Range]:
        span = next(r for r, (start, end) in zip(self.pool.ranges, self.bounds, strict=True) if start <= number <= end)
        if span.subnet.version == 4:
            return IPv4Interface((number, span.subnet.prefixlen)), span
        return IPv6Interface((number, span.subnet.prefixlen)), span


def _never(span: Range) -> set[int]:
    """Gateway; network address (IPv6: the routers' anycast address, RFC 4291 2.6.1); IPv4 broadcast address."""
    found = {int(span.subnet.network_address)}
    if span.gateway is not None and span.gateway.version == span.subnet.version:
        found.add(int(span.gateway))
    if span.subnet.version == 4:
        found.add(int(span.subnet.broadcast_address))
    return found


class Allocator:
    """The leases of one network. Not for several threads.

    leases: (address, owner) pairs; an address outside of every pool is remembered too. last: the addresses given last,
    one for each pool that has one; without it a pool goes on behind its highest lease.
    """

    def __init__(
        self,
        name: str,
        pools: tuple[Pool, ...] = (),
        leases: Iterable[tuple[Address, str]] = (),
        last: Iterable[Address] = (),
    ) -> None:
        self.name = name
        self._owners: dict[int, dict[int, str]] = {4: {}, 6: {}}
        for address, owner in leases:
            self._owners[address.version][int(address)] = owner
        self._last = tuple(last)
        self._pools = pools
        self._own = [self._round(i, pool) for i, pool in enumerate(pools)]
        self._extra: OrderedDict[Pool, _Round] = OrderedDict()
        self._pending: dict[Address, bool] = {}  # chosen, not committed → whether it was our choice (not by value)

    @classmethod
    def load(cls, network: Network, leases: Iterable[tuple[str, str]], cursor: bytes = b"") -> Allocator:
        """From rows: (address, owner) as text, and what `cursor` returned once (b"" = nothing known)."""
        try:
            pairs = [(ip_address(address), owner) for address, owner in leases]
            last = [ip_address(text) for text in json.loads(cursor or b"[]")]
        except (ValueError, TypeError) as exc:
            raise TowpathError(f"broken lease rows of network {network.name!r}: {exc}") from None
        return cls(network.name, network.pools, pairs, last)

    def _round(self, index: int, pool: Pool) -> _Round:
        version = pool.ranges[0].subnet.version
        last = next((int(a) for a in self._last if a.version == version and a in pool), None)
        return _Round(index, pool, self._owners[version], last)

    def _rounds(self, address: Address) -> list[_Round]:
        """Every pool that the address belongs to."""
        owners, number = self._owners[address.version], int(address)
        return [r for r in (*self._own, *self._extra.values()) if r.owners is owners and number in r]

    # --- one address ---------------------------------------------------------------------------------------------

    def candidate(self, pool: int) -> Interface | None:
        """The address that pool number `pool` gives next; None = the pool is empty. Nothing is taken yet."""
        number = self._own[pool].peek()
        return None if number is None else self._own[pool].interface(number)[0]

    def owner(self, address: Address) -> str | None:
        return self._owners[address.version].get(int(address))

    def claim(self, address: Address, owner: str) -> None:
        """`address` belongs to `owner` from now on. Raises Conflict naming the owner it has."""
        known = self.owner(address)
        if known not in (None, owner):
            raise Conflict(f"address {address} of network {self.name!r} is in use by {known}")
        if known is None:
            self._owners[address.version][int(address)] = owner
            for one in self._rounds(address):
                one.taken(int(address))

    def give_back(self, address: Address) -> None:
        """`address` is free and goes to the end of the queue; one that is free already is no error."""
        if self._owners[address.version].pop(int(address), None) is not None:
            self._pending.pop(address, None)
            for one in self._rounds(address):
                one.returned(int(address))

    # --- the addresses of one attachment -------------------------------------------------------------------------

    def choose(self, take: Take) -> tuple[Lease, ...]:
        """One lease per pool: `take.extra` pools first, then the network's own; nothing is kept where one pool fails.

        Lease.pool counts the network's pools from 0, extra pools go on behind them. Raises PoolEmpty naming the pool;
        BadConfig for an address asked for that cannot be leased; Conflict naming the owner where it is taken.
        """
        rounds = [*self._extra_rounds(take.extra), *self._own]
        wanted = self._place(take, rounds)
        leases: list[Lease] = []
        try:
            for one in rounds:
                leases.append(self._pick(one, wanted.get(one.index)))
        except TowpathError:
            for lease in leases:
                self._forget_choice(lease)
            raise
        return tuple(leases)

    def _pick(self, one: _Round, static: Address | None) -> Lease:
        number = one.peek() if static is None else int(static)
        if number is None:
            raise PoolEmpty(f"{_empty(one)} of network {self.name!r}", hint="see who has them: towpath ipam ls")
        interface, span = one.interface(number)
        if static is not None and (owner := self.owner(static)):
            raise Conflict(f"requested address {static} of network {self.name!r} is in use by {owner}")
        self.claim(interface.ip, PENDING)
        self._pending[interface.ip] = static is None
        return Lease(interface, span.gateway, one.index)

    def _forget_choice(self, lease: Lease) -> None:
        """As if it had never been chosen: it is next again, not last."""
        address, number = lease.address.ip, int(lease.address.ip)
        dynamic = self._pending.get(address, False)
        self.give_back(address)
        for one in self._rounds(address):
            if dynamic and one.ahead and one.ahead[0][0] == number:
                one.back.pop(number, None)  # the round has not gone past it
            elif number in one.back:
                one.back.move_to_end(number, last=False)

    def _place(self, take: Take, rounds: list[_Round]) -> dict[int, Address]:
        """Which pool serves which address that was asked for by value; two sources may ask for the same one."""
        left = list(dict.fromkeys(take.static))
        for address in left:
            self._refuse_unleasable(address, rounds)
        placed = {}
        for one in rounds:
            found = next((a for a in left if a in one.pool), None)
            if found is not None:
                placed[one.index] = found
                left.remove(found)
        if left:
            spans = ", ".join(str(one.pool) for one in rounds) or "none"
            raise BadConfig(
                f"failed to allocate all requested IPs: {', '.join(map(str, left))}",
                hint=f"network {self.name!r} gives one address from each of its pools: {spans}",
            )
        return placed

    def _refuse_unleasable(self, address: Address, rounds: list[_Round]) -> None:
        for span in (span for one in rounds for span in one.pool.ranges):
            if address == span.gateway:
                raise BadConfig(f"requested address {address} is the gateway of subnet {span.subnet}")
            if address.version == span.subnet.version and address in span and int(address) in _never(span):
                raise BadConfig(f"requested address {address} is the network or broadcast address of {span.subnet}")

    def _extra_rounds(self, pools: tuple[Pool, ...]) -> list[_Round]:
        """The rounds of pools that only this call has; runtimes repeat them, so the latest are kept."""
        try:
            refuse_overlap(pools)
        except Misfit as misfit:
            raise misfit.as_error("ipRanges") from None
        found = []
        for i, pool in enumerate(pools):
            one = self._extra.get(pool)
            if one is None:
                self._refuse_overlap(pool)
                one = self._extra[pool] = self._round(0, pool)
            self._extra.move_to_end(pool)
            one.index = len(self._own) + i
            found.append(one)
        while len(self._extra) > max(EXTRA_KEPT, len(found)):
            self._extra.popitem(last=False)
        return found

    def _refuse_overlap(self, pool: Pool) -> None:
        for mine in (span for own in self._pools for span in own.ranges):
            for span in pool.ranges:
                if span.start in mine or mine.start in span:
                    raise BadConfig(f"range {span} overlaps {mine}, which network {self.name!r} has already")

    def commit(self, leases: Iterable[Lease], owner: str) -> None:
        """What was chosen belongs to `owner`. Raises Conflict where it is somebody else's by now."""
        for lease in leases:
            address = lease.address.ip
            chosen = self._pending.pop(address, None)
            if chosen is None:
                self.claim(address, owner)  # the allocator was built anew since it was chosen
                continue
            self._owners[address.version][int(address)] = owner
            if chosen:
                for one in self._rounds(address):
                    one.last = int(address)

    def abandon(self, leases: Iterable[Lease]) -> None:
        """What was chosen is free. It goes to the end: a row that nobody here knows may hold it."""
        for lease in leases:
            if lease.address.ip in self._pending:
                self.give_back(lease.address.ip)

    def release(self, leases: Iterable[Lease]) -> None:
        """The attachment is gone. Leases of somebody else's address management (pool -1) are passed over."""
        for lease in leases:
            if lease.pool >= 0:
                self.give_back(lease.address.ip)

    # --- what others want to know --------------------------------------------------------------------------------

    def cursor(self, leases: Iterable[Lease] = ()) -> bytes:
        """Where each pool stands once `leases` are committed, as JSON: `load` goes on from there after a restart."""
        last = {one: _address(one, one.last) for one in self._all() if one.last is not None}
        for lease in leases:
            if self._pending.get(lease.address.ip):
                last |= dict.fromkeys(self._rounds(lease.address.ip), lease.address.ip)
        return json.dumps([str(address) for address in last.values()]).encode()

    def _all(self) -> list[_Round]:
        return [*self._own, *self._extra.values()]

    def usage(self) -> tuple[Usage, ...]:
        """How full each pool is: the network's own, then those that runtimes brought."""
        return tuple(Usage(str(one.pool), one.size, one.used, one.size - one.used) for one in self._all())

    def check_room(self) -> None:
        """Raise Unavailable (CNI STATUS) where the next attachment would find a pool empty."""
        for one in self._own:
            if one.peek() is None:
                raise Unavailable(f"{_empty(one)} of network {self.name!r}", hint="see who has them: towpath ipam ls")


def _empty(one: _Round) -> str:
    return f"no IP addresses available in range set: {one.pool}"


def _address(one: _Round, number: int) -> Address:
    return IPv4Address(number) if one.pool.ranges[0].subnet.version == 4 else IPv6Address(number)
