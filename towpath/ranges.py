"""Read address ranges and pools as people and runtimes write them, by the rules of the reference's host-local plug-in.

The same rules serve two spellings: a CNI configuration says rangeStart, our YAML range_start. The `parse_*` functions
raise BadConfig with `where` in front; the `read_*` functions raise schema.Misfit with the path of the key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from itertools import combinations
from typing import Any, TypeVar

from towpath.model import Address, Pool, Range, Subnet
from towpath.schema import Misfit, reader, unknown_key

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Keys:
    """What the four keys of a range are called; strict: others are mistakes."""

    subnet: str
    start: str
    end: str
    gateway: str
    strict: bool = True


CNI = Keys("subnet", "rangeStart", "rangeEnd", "gateway", strict=False)
YAML = Keys("subnet", "range_start", "range_end", "gateway")

read_subnet = reader(Subnet)
read_address = reader(Address)


def parse_range(raw: object, where: str = "", keys: Keys = CNI) -> Range:
    """{"subnet": "10.0.0.0/24", "rangeStart"?, "rangeEnd"?, "gateway"?} → Range.

    Defaults as in host-local: gateway and start are the subnet's first address, end the last one before the broadcast
    address (IPv6: the last one). Raises BadConfig naming the value that cannot work.
    """
    return _parse(where, lambda: read_range(raw, keys))


def parse_pool(raw: object, where: str = "", keys: Keys = CNI) -> Pool:
    """A list of ranges of one family → Pool (host-local's "range set"): an attachment gets one address out of it."""
    return _parse(where, lambda: read_pool(raw, keys))


def parse_pools(raw: object, where: str = "", keys: Keys = CNI) -> tuple[Pool, ...]:
    """A list of lists of ranges → the pools of a network."""
    return _parse(where, lambda: read_pools(raw, keys))


def _parse(where: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except Misfit as misfit:
        raise misfit.as_error(where) from None


def read_range(raw: object, keys: Keys) -> Range:
    """As parse_range, raising Misfit."""
    if not isinstance(raw, Mapping):
        raise Misfit(f"{raw!r} is not a range", hint=f'such as {{{keys.subnet}: "10.0.0.0/24"}}')
    known = astuple(keys)[:4]
    if keys.strict:
        for key in raw:
            if key not in known:
                raise unknown_key(key, known)
    if raw.get(keys.subnet) is None:
        raise Misfit(f"key {keys.subnet!r} is missing")
    subnet: Subnet = at(keys.subnet, read_subnet, raw[keys.subnet])
    _refuse_small(subnet, keys)
    first = subnet.network_address + 1
    last = subnet.broadcast_address - (1 if subnet.version == 4 else 0)
    start = _inside(raw, keys.start, subnet) or first
    end = _inside(raw, keys.end, subnet) or last
    if int(start) > int(end):
        raise Misfit(f"{start} comes after {keys.end} {end}").below(keys.start)
    return Range(subnet, start, end, _gateway(raw, keys.gateway, subnet) or first)


def at(key: str | int, read: Callable[[Any], Any], value: object) -> Any:
    """read(value), whose mistake is found below `key`."""
    try:
        return read(value)
    except Misfit as misfit:
        raise misfit.below(key) from None


def _refuse_small(subnet: Subnet, keys: Keys) -> None:
    # A /31 or /32 has no address left besides network, gateway and broadcast.
    if subnet.prefixlen > subnet.max_prefixlen - 2:
        least = subnet.max_prefixlen - 2
        raise Misfit(f"{subnet} is too small to lease addresses from: /{least} at least").below(keys.subnet)


def _inside(raw: Mapping[str, Any], key: str, subnet: Subnet) -> Address | None:
    if raw.get(key) is None:
        return None
    address: Address = at(key, read_address, raw[key])
    if address not in subnet:
        raise Misfit(f"{address} is not in {subnet}").below(key)
    return address


def _gateway(raw: Mapping[str, Any], key: str, subnet: Subnet) -> Address | None:
    """The reference takes a gateway outside of the subnet (an on-link one), so do we; the family must be the same."""
    if raw.get(key) in (None, ""):
        return None
    address: Address = at(key, read_address, raw[key])
    if address.version != subnet.version:
        raise Misfit(f"{address} is not of the family of {subnet}").below(key)
    return address


def read_pool(raw: object, keys: Keys) -> Pool:
    """As parse_pool, raising Misfit."""
    if not isinstance(raw, (list, tuple)) or not raw:
        raise Misfit(f"{raw!r} is not a list of ranges", hint="one range at least")
    ranges = tuple(at(i, lambda one: read_range(one, keys), one) for i, one in enumerate(raw))
    for i, span in enumerate(ranges):
        if span.subnet.version != ranges[0].subnet.version:
            raise Misfit(f"{span} and {ranges[0]} are of different address families", hint="one list each").below(i)
    _refuse_overlap(enumerate(ranges))
    return Pool(ranges)


def read_pools(raw: object, keys: Keys) -> tuple[Pool, ...]:
    """As parse_pools, raising Misfit."""
    if not isinstance(raw, (list, tuple)):
        raise Misfit(f"{raw!r} is not a list of lists of ranges")
    pools = tuple(at(i, lambda one: read_pool(one, keys), one) for i, one in enumerate(raw))
    refuse_overlap(pools)
    return pools


def refuse_overlap(pools: tuple[Pool, ...]) -> None:
    """Raise Misfit where an address belongs to two pools."""
    _refuse_overlap((i, span) for i, pool in enumerate(pools) for span in pool.ranges)


def _refuse_overlap(numbered: Iterable[tuple[int, Range]]) -> None:
    for (_, one), (index, other) in combinations(numbered, 2):
        if one.start in other or other.start in one:
            raise Misfit(f"{other} overlaps {one}").below(index)
