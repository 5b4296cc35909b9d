"""Read the reservations that the reference's host-local plug-in keeps on disk, so that a host can move over.

<dataDir>/<network>/<address> holds "<container id>\\r\\n<interface>" (the old form: the id only);
last_reserved_ip.<number of the range set> holds the address given last; `lock` is empty. Nothing is written here, and
the lock is not taken: a reservation that is just being written is reported as broken.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface, ip_address
from pathlib import Path

from towpath.errors import BadConfig, Unavailable
from towpath.model import Address, Interface, check_ifname, check_name

log = logging.getLogger(__name__)

DATA_DIR = "/var/lib/cni/networks"  # host-local's default dataDir
LAST = "last_reserved_ip."
LONGEST = 4096  # bytes; a reservation is an id and an interface name


@dataclass(frozen=True, slots=True)
class Reservation:
    """ifname "" = written in the old form, which names the container only."""

    address: Address
    container: str
    ifname: str = ""


@dataclass(frozen=True, slots=True)
class Broken:
    """A file that says nothing usable, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Found:
    """One network's directory. last: the address given last of each range set, in the order of the sets."""

    reservations: tuple[Reservation, ...] = ()
    last: tuple[Address, ...] = ()
    broken: tuple[Broken, ...] = ()


def parse_name(name: str) -> Address | None:
    """The address that a file name is, None = it is none. "_" stands for ":" where a file system lacks it."""
    try:
        return ip_address(name.replace("_", ":"))
    except ValueError:
        return None


def parse_reservation(address: Address, content: bytes) -> Reservation:
    """Read what a reservation file holds; white space around either line is ignored, as host-local does.

    Raises BadConfig saying what is wrong with it.
    """
    try:
        lines = content.decode().split()
    except UnicodeDecodeError:
        raise BadConfig("it is no text") from None
    if not lines:
        raise BadConfig("it is empty")
    if len(lines) > 2:
        raise BadConfig(f"it holds {len(lines)} words, not a container id and an interface name")
    container = check_name("container id", lines[0])
    return Reservation(address, container, check_ifname("interface", lines[1]) if lines[1:] else "")


def read_directory(folder: str | Path) -> Found:
    """Everything in <dataDir>/<network>. A directory that is not there holds nothing; `broken` names the bad files.

    Raises Unavailable where the directory cannot be listed.
    """
    try:
        files = sorted(Path(folder).iterdir())
    except FileNotFoundError:
        return Found()
    except OSError as exc:
        raise Unavailable(f"cannot list the reservations in {folder}: {exc.strerror}") from exc
    reservations, last, broken = [], {}, []
    for file in files:
        if file.name == "lock":
            continue
        try:
            if file.name.startswith(LAST):
                last[_range_set(file.name)] = _last_address(_content(file))
            else:
                reservations.append(parse_reservation(_address(file.name), _content(file)))
        except BadConfig as exc:
            broken.append(Broken(file.name, exc.what))
    return Found(tuple(reservations), tuple(last[i] for i in sorted(last)), tuple(broken))


def _content(file: Path) -> bytes:
    try:
        if not file.is_file():  # reading a pipe would wait for ever
            raise BadConfig("it is no file")
        with file.open("rb") as stream:
            return stream.read(LONGEST)
    except OSError as exc:
        raise BadConfig(f"it cannot be read: {exc.strerror}") from exc


def _address(name: str) -> Address:
    address = parse_name(name)
    if address is None:
        raise BadConfig("its name is no address")
    return address


def _range_set(name: str) -> int:
    number = name.removeprefix(LAST)
    if not (number.isascii() and number.isdecimal()):
        raise BadConfig("its name ends in no number of a range set")
    return int(number)


def _last_address(content: bytes) -> Address:
    try:
        return ip_address(content.decode().strip())
    except ValueError:
        raise BadConfig("it holds no address") from None


def reservations(data_dir: str, network: str) -> Iterator[tuple[Address, str, str]]:
    """(address, container, ifname) of each good reservation of that network; broken ones are logged."""
    folder = Path(data_dir or DATA_DIR) / network
    found = read_directory(folder)
    for bad in found.broken:
        log.warning("reservation not adopted", extra={"file": str(folder / bad.name), "reason": bad.why})
    return ((one.address, one.container, one.ifname) for one in found.reservations)


def interface(address: Address, prefix: int) -> Interface:
    """The address with the prefix length that its subnet has."""
    if isinstance(address, IPv4Address):
        return IPv4Interface((int(address), prefix))
    return IPv6Interface((int(address), prefix))
