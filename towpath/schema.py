"""Turn frozen records into plain data (JSON, YAML) and back, naming the exact place of a mistake.

One reader and one writer is built per class, at its first use, from its type hints; afterwards a record costs a dict
lookup per field. Understood: str, int, float, bool, None, dict[str, str], tuples, nested records, the `ipaddress`
classes, and unions of these with None or of the two families. A hint outside of that is our own mistake: TypeError.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import ipaddress
import json
import operator
import types
import typing
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Any, ParamSpec, TypeVar

from towpath.errors import BadConfig, TowpathError

T = TypeVar("T")
P = ParamSpec("P")
Reader = Callable[[Any], Any]
Writer = Callable[[Any], Any]

_SCALARS: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class Misfit(ValueError):
    """A value that does not fit; `path` leads to it from the outside in: ("networks", 0, "mtu").

    key: the key itself where it is the mistake, None = its value is.
    """

    def __init__(self, what: str, *, hint: str = "", key: object = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.key = key
        self.path: tuple[str | int, ...] = ()

    def below(self, *path: str | int) -> Misfit:
        """The same mistake, seen from further outside."""
        self.path = (*path, *self.path)
        return self

    def as_error(self, where: str = "") -> BadConfig:
        return BadConfig(": ".join(filter(None, (where, path_text(self.path), self.what))), hint=self.hint)


def path_text(path: Iterable[str | int]) -> str:
    """("networks", 0, "dns", "search") → "networks[0].dns.search"."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def unknown_key(key: object, known: Iterable[str]) -> Misfit:
    """The mistake of a key that nobody reads, with the nearest one that is read."""
    names = sorted(known)
    near = difflib.get_close_matches(str(key), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
    return Misfit(f"unknown key {key!r}", hint=hint, key=key)


def encode(record: Any) -> dict[str, Any]:
    """The record as plain data fit for json.dumps; fields that equal their default are left out."""
    written: dict[str, Any] = _record_writer(type(record))(record)
    return written


def decode(cls: type[T], data: object, where: str = "") -> T:
    """Build a `cls` from plain data.

    Raises BadConfig "<where>: <path of the key>: <value and what would be right>", for unknown keys too.
    """
    try:
        return read_strictly(cls, data)
    except Misfit as misfit:
        raise misfit.as_error(where) from None


def read_strictly(cls: type[T], data: object) -> T:
    """As `decode`, but raises Misfit, to which the caller can add where the data came from."""
    record: T = _record_reader(cls, strict=True)(data)
    return record


def read(cls: type[T], row: bytes) -> T:
    """Read a store row. Fields that this version does not know are ignored: a newer one wrote them.

    Raises TowpathError naming the type where the row is broken.
    """
    try:
        record: T = _record_reader(cls, strict=False)(json.loads(row))
    except Misfit as misfit:
        raise TowpathError(f"broken {cls.__name__} row: {misfit.as_error().what}", hint=misfit.hint) from None
    except ValueError as exc:  # JSONDecodeError, UnicodeDecodeError
        raise TowpathError(f"broken {cls.__name__} row: it is no JSON: {exc}") from None
    return record


def rewrite(old: bytes | None, record: Any) -> bytes:
    """The JSON bytes of a row that replaces `old` (None = new row); fields of `old` that we do not know are kept.

    Unknown fields are kept in nested records too, but not inside lists, whose elements have no identity.
    Raises TowpathError naming the type where `old` is no JSON object.
    """
    data = encode(record)
    if old is not None:
        cls = type(record)
        try:
            before = json.loads(old)
        except ValueError as exc:
            raise TowpathError(f"broken {cls.__name__} row: it is no JSON: {exc}") from None
        if not isinstance(before, dict):
            raise TowpathError(f"broken {cls.__name__} row: {before!r} is not a mapping of fields")
        _keep_unknown(cls, before, data)
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()


def _keep_unknown(cls: type, before: dict[str, Any], data: dict[str, Any]) -> None:
    known = _nested(cls)
    for key, old in before.items():
        if key not in known:
            data[key] = old
        elif isinstance(old, dict) and (nested := known[key]):
            kept = data.get(key, {})
            if kept is not None:  # the record itself is gone
                _keep_unknown(nested, old, kept)
            if kept:
                data[key] = kept


def _once(build: Callable[P, T]) -> Callable[P, T]:
    """functools.cache, whose stub loses the arguments' types and does not take type[X] as hashable."""
    return typing.cast(Callable[P, T], functools.cache(typing.cast(Callable[..., T], build)))


@_once
def _nested(cls: type) -> dict[str, type | None]:
    """Each field with the record class that it holds, as `X` or `X | None`; None = it holds no record."""
    return {name: next(filter(_is_record, _arms(hint)), None) for name, hint in _hints(cls).items()}


def _arms(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


@_once
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


_REQUIRED = object()


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return _REQUIRED


# --- writing ---------------------------------------------------------------------------------------------------------


@_once
def _record_writer(cls: type[Any]) -> Writer:
    table = [(f.name, _default(f), _writer(_hints(cls)[f.name])) for f in dataclasses.fields(cls)]
    names = [name for name, *_ in table]
    values = operator.attrgetter(*names) if len(names) > 1 else lambda record: (getattr(record, names[0]),)

    def write(record: Any) -> dict[str, Any]:
        data = {}
        for (name, default, write_field), value in zip(table, values(record), strict=True):
            if value is not default and value != default:
                data[name] = write_field(value) if write_field else value
        return data

    return write


def _writer(hint: Any) -> Writer | None:
    """None: the value is plain data already."""
    if hint in _SCALARS or hint in (None, types.NoneType):
        return None
    if hint in _ADDRESSES:
        return str
    if _is_record(hint):
        return _record_writer(hint)
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict and arms == (str, str):
        return dict
    if origin is tuple:
        return _tuple_writer([_writer(arm) for arm in arms if arm is not ...], endless=arms[-1:] == (...,))
    if origin in (types.UnionType, typing.Union):
        found = {write for arm in arms if arm is not types.NoneType for write in [_writer(arm)]}
        if len(found) == 1 and (write := found.pop()):
            return lambda value: None if value is None else write(value)
        if not found:
            return None
    raise TypeError(f"schema cannot write {hint!r}")


def _tuple_writer(writers: list[Writer | None], *, endless: bool) -> Writer:
    plain = [write or (lambda value: value) for write in writers]
    if endless:
        return list if writers == [None] else lambda values: list(map(plain[0], values))
    return lambda values: [write(value) for write, value in zip(plain, values, strict=True)]


# --- reading ---------------------------------------------------------------------------------------------------------


@_once
def _record_reader(cls: type[Any], *, strict: bool) -> Reader:
    hints = _hints(cls)
    table = {name: _reader(hint, strict) for name, hint in hints.items()}
    plain = {name: hint for name, hint in hints.items() if hint in _SCALARS}  # the quick way of a value that fits
    required = [f.name for f in dataclasses.fields(cls) if _default(f) is _REQUIRED]

    def read_record(data: Any) -> Any:
        if not isinstance(data, dict):
            raise Misfit(f"{data!r} is not a mapping of keys ({', '.join(table)})")
        values = {}
        for key, value in data.items():
            if plain.get(key) is type(value):
                values[key] = value
                continue
            read_field = table.get(key)
            if read_field is None:
                if strict:
                    raise unknown_key(key, table)
                continue
            try:
                values[key] = read_field(value)
            except Misfit as misfit:
                raise misfit.below(key) from None
        for name in required:
            if name not in values:
                raise Misfit(f"key {name!r} is missing")
        try:
            return cls(**values)
        except TowpathError as exc:  # the record's own check of its values
            raise Misfit(exc.what, hint=exc.hint) from None

    return read_record


def _reader(hint: Any, strict: bool) -> Reader:
    if hint in _SCALARS:
        return _scalar_reader(hint)
    if hint in _ADDRESSES:
        return _address_reader(*_ADDRESSES[hint])
    if _is_record(hint):
        return _record_reader(hint, strict=strict)
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict and arms == (str, str):
        return _read_text_dict
    if origin is tuple and arms[-1:] == (...,):
        return _list_reader(_reader(arms[0], strict))
    if origin is tuple:
        return _fixed_reader([_reader(arm, strict) for arm in arms])
    if origin in (types.UnionType, typing.Union):
        return _union_reader(frozenset(arms), strict)
    raise TypeError(f"schema cannot read {hint!r}")


def _scalar_reader(kind: type) -> Reader:
    # bool is a subclass of int: the exact type decides, or `mtu: yes` would be 1. A whole number is a float too.
    accepted = (float, int) if kind is float else (kind,)

    def read_scalar(value: Any) -> Any:
        if type(value) not in accepted:
            hint = "put it in quotes" if kind is str and type(value) in _SCALARS else ""
            raise Misfit(f"{value!r} is not {_SCALARS[kind]}", hint=hint)
        return value

    return read_scalar


def _union_reader(arms: frozenset[Any], strict: bool) -> Reader:
    """X | None, or the IPv4 and IPv6 form of one thing (| None)."""
    some = arms - {types.NoneType}
    if len(some) == 1:
        inner = _reader(next(iter(some)), strict)
    elif some in _FAMILIES:
        inner = _address_reader(*_FAMILIES[some])
    else:
        raise TypeError(f"schema cannot read a union of {sorted(map(str, arms))}")
    return inner if some == arms else lambda value: None if value is None else inner(value)


def _list_reader(read_one: Reader) -> Reader:
    def read_list(values: Any) -> Any:
        if not isinstance(values, (list, tuple)):
            raise Misfit(f"{values!r} is not a list")
        result = []
        for index, value in enumerate(values):
            try:
                result.append(read_one(value))
            except Misfit as misfit:
                raise misfit.below(index) from None
        return tuple(result)

    return read_list


def _fixed_reader(readers: list[Reader]) -> Reader:
    def read_fixed(values: Any) -> Any:
        if not isinstance(values, (list, tuple)) or len(values) != len(readers):
            raise Misfit(f"{values!r} is not a list of {len(readers)}")
        result = []
        for index, (read_one, value) in enumerate(zip(readers, values, strict=True)):
            try:
                result.append(read_one(value))
            except Misfit as misfit:
                raise misfit.below(index) from None
        return tuple(result)

    return read_fixed


def _read_text_dict(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Misfit(f"{value!r} is not a mapping of text to text")
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise Misfit(f"{text!r} is not text", hint="put it in quotes").below(str(key))
    return dict(value)


def _interface(text: str) -> Any:
    """ipaddress parses "10.0.0.2/24" in 7 µs, most of it spent on the network; the pair form of the same takes 3."""
    address, slash, length = text.partition("/")
    if not slash:
        raise ValueError(f"{text!r} has no prefix length")
    if not (length.isascii() and length.isdecimal()):
        return ipaddress.ip_interface(text)
    if ":" in address:
        if "%" in address:
            return ipaddress.ip_interface(text)
        return IPv6Interface((int(IPv6Address(address)), int(length)))
    return IPv4Interface((int(IPv4Address(address)), int(length)))


# Gateways and subnets come again and again: a few objects, which are immutable, serve all rows.
_address = functools.lru_cache(1024)(ipaddress.ip_address)
_subnet = functools.lru_cache(1024)(ipaddress.ip_network)

_Shape = tuple[Callable[[str], Any], tuple[type, ...], str]
_ADDRESSES: dict[type, _Shape] = {
    IPv4Address: (_address, (IPv4Address,), "an IPv4 address such as 10.0.0.2"),
    IPv6Address: (_address, (IPv6Address,), "an IPv6 address such as fd00::2"),
    IPv4Interface: (_interface, (IPv4Interface,), "an IPv4 address with prefix length such as 10.0.0.2/24"),
    IPv6Interface: (_interface, (IPv6Interface,), "an IPv6 address with prefix length such as fd00::2/64"),
    IPv4Network: (_subnet, (IPv4Network,), "an IPv4 subnet such as 10.0.0.0/24"),
    IPv6Network: (_subnet, (IPv6Network,), "an IPv6 subnet such as fd00::/64"),
}
_FAMILIES: dict[frozenset[Any], _Shape] = {
    frozenset((IPv4Address, IPv6Address)): (_address, (IPv4Address, IPv6Address), "an address such as 10.0.0.2"),
    frozenset((IPv4Interface, IPv6Interface)): (
        _interface,
        (IPv4Interface, IPv6Interface),
        "an address with prefix length such as 10.0.0.2/24",
    ),
    frozenset((IPv4Network, IPv6Network)): (_subnet, (IPv4Network, IPv6Network), "a subnet such as 10.0.0.0/24"),
}


def _address_reader(parse: Callable[[str], Any], classes: tuple[type, ...], right: str) -> Reader:
    def read_address(text: Any) -> Any:
        if not isinstance(text, str):  # ipaddress would take 5 for 0.0.0.5
            raise Misfit(f"{text!r} is not {right}")
        try:
            value = parse(text)
        except ValueError as exc:
            reason = f": {exc}" if "host bits" in str(exc) else ""
            raise Misfit(f"{text!r} is not {right}{reason}") from None
        if not isinstance(value, classes):
            raise Misfit(f"{text!r} is not {right}")
        return value

    return read_address


def reader(hint: Any) -> Reader:
    """A function that reads one value of that type strictly and raises Misfit: reader(int | None)(5) == 5."""
    return _reader(hint, strict=True)
