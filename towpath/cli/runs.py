"""What `towpath run` started: one state file and one lock per run, in the folder of the agent's socket.

    <folder>/run/<name>.json     what was asked for and what it got (State)
    <folder>/run/<name>/lock     held (flock) by the supervisor for its life: a free lock means that the run is dead
    <folder>/run/<name>/         also hosts and resolv.conf, which the command sees in /etc
    <folder>/netns/<name>        the network namespace, bind-mounted

The lock, not a process id, tells who lives: an id may belong to somebody else by now.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from towpath.errors import Conflict, NotFound, TowpathError

if TYPE_CHECKING:
    from towpath.cli.client import Client


@dataclass(frozen=True, slots=True)
class State:
    """One run. netns "" = the host's namespace; pid 0 = the command has not started; `problem`: why it is not tidy."""

    name: str
    network: str
    ifname: str
    netns: str
    supervisor: int
    command: tuple[str, ...]
    pid: int = 0
    addresses: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    started: float = 0.0
    problem: str = ""
    v: int = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where the runs of one agent are kept."""

    folder: Path

    @classmethod
    def of(cls, socket: str) -> Place:
        return cls(Path(socket).absolute().parent)

    @property
    def netns(self) -> Path:
        return self.folder / "netns"

    def state(self, name: str) -> Path:
        return self.folder / "run" / f"{name}.json"

    def files(self, name: str) -> Path:
        return self.folder / "run" / name

    def lock(self, name: str) -> Path:
        return self.files(name) / "lock"

    def names(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "run").glob("[!.]*.json"))


def save(place: Place, state: State) -> None:
    """By rename: a reader sees the old state or the new one."""
    path = place.state(state.name)
    fresh = path.with_name(f".{state.name}.new")  # no name begins with a dot
    fresh.write_text(json.dumps(asdict(state)))
    fresh.replace(path)


def load(place: Place, name: str) -> State:
    """Raises NotFound; fields of a newer version are ignored."""
    path = place.state(name)
    try:
        data = json.loads(path.read_text())
        known = {f.name: data[f.name] for f in fields(State) if f.name in data}
        known["command"], known["labels"] = tuple(known["command"]), tuple(map(tuple, known.get("labels", ())))
        known["addresses"], known["ports"] = tuple(known.get("addresses", ())), tuple(known.get("ports", ()))
        return State(**known)
    except FileNotFoundError:
        raise NotFound(f"nothing runs under the name {name!r}", hint="see: towpath ps") from None
    except (ValueError, TypeError, KeyError) as exc:
        raise TowpathError(f"{path} is broken: {exc}", hint="stop its processes, then remove it") from None


def every(place: Place) -> list[State]:
    """All runs, by name; one that ends while we look is left out."""
    found = []
    for name in place.names():
        with suppress(NotFound):
            found.append(load(place, name))
    return found


def alive(place: Place, name: str) -> bool:
    """Whether a supervisor holds the run's lock."""
    try:
        fd = os.open(place.lock(name), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@contextmanager
def claimed(place: Place, name: str) -> Iterator[None]:
    """Own the name while inside. Raises Conflict where a living run has it; what a dead one left is the caller's."""
    path = place.lock(name)
    while True:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the run that had the name removed its folder between the two calls
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended while we opened it removed this very file: then the lock is worth nothing.
            if path.exists() and path.stat().st_ino == os.fstat(fd).st_ino:
                yield
                return
        except BlockingIOError:
            raise Conflict(
                f"the name {name!r} is in use by another run", hint=f"choose another --name, or: towpath stop {name}"
            ) from None
        finally:
            os.close(fd)


def tidy(place: Place, state: State, client: Client) -> None:
    """Detach and remove whatever the run made; the caller owns the name. Again and again does no harm.

    Where the agent cannot detach, its error is raised, the state file stays and says why, and the name of the
    namespace goes all the same: the kernel then takes the interface away itself.
    """
    from towpath.cli.client import Refused
    from towpath.cli.namespaces import drop_netns

    try:
        client.delete("attachments", "run", state.network, state.name, state.ifname)
    except TowpathError as error:
        if not (isinstance(error, Refused) and error.status == 404):
            raise
    finally:
        if state.netns:
            drop_netns(Path(state.netns))
    place.state(state.name).unlink(missing_ok=True)
    shutil.rmtree(place.files(state.name), ignore_errors=True)


def sweep(place: Place, client: Client) -> list[str]:
    """Tidy up after every run whose supervisor died; returns their names. One that fails waits for the next sweep."""
    gone = []
    for name in place.names():
        if alive(place, name):
            continue
        with suppress(TowpathError), claimed(place, name):
            tidy(place, load(place, name), client)
            gone.append(name)
    return gone
