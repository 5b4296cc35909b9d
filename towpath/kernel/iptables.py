"""The iptables back end: one reading (iptables-save) and one writing (iptables-restore) per change and address family.

`change` decides on the text that was read and what is wanted, and touches nothing.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from towpath.errors import PhaseFailed
from towpath.kernel import iptablesrules, xtables
from towpath.kernel.iptablesrules import BUILT_IN, CHAINS, DNAT, Group, Line
from towpath.kernel.nft import Nftables, expressed, read_changes
from towpath.kernel.nftrules import FramePin
from towpath.kernel.nftset import FRAMES
from towpath.kernel.xtables import PREFIX
from towpath.plan import AddRule, DropRule, PinMac, Publish, Rule

TABLES = ("nat", "filter")
COMMENT = re.compile(r'--comment "?towpath ([^" ]+) ?([^"]*)"?')
NO_RULE = frozenset({"skeleton", "shared", "dispatch"})
TARGET = re.compile(r" -[jg] (\S+)")


@dataclass(frozen=True, slots=True)
class SavedLine:
    """A line as iptables-save prints it, `-A` included. id and notes are empty where it is not ours."""

    table: str
    chain: str
    text: str
    id: str = ""
    notes: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        return tag_of(self.id)


def tag_of(line_id: str) -> str:
    """Which rule a line belongs to; "skeleton", "shared", "dispatch" for lines that belong to none alone."""
    return line_id.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Saved:
    """What iptables-save printed."""

    chains: frozenset[tuple[str, str]] = frozenset()  # table, chain
    lines: tuple[SavedLine, ...] = ()

    def ids(self) -> set[str]:
        return {line.id for line in self.lines if line.id}


def read(text: str) -> Saved:
    """Parse the output of iptables-save."""
    chains, lines, table = set(), [], ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            chains.add((table, line[1:].split()[0]))
        elif line.startswith("-A "):
            found = COMMENT.search(line)
            marks = (found[1], tuple(found[2].split())) if found else ("", ())
            lines.append(SavedLine(table, line.split(maxsplit=2)[1], line, *marks))
    return Saved(frozenset(chains), tuple(lines))


# --- deciding --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Change:
    """Lines to delete and to write, in this order; chains to make before, chains that are empty to remove after."""

    drop: list[SavedLine] = field(default_factory=list)
    add: list[Line] = field(default_factory=list)
    make: list[tuple[str, str]] = field(default_factory=list)
    unmake: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.drop) + len(self.add) + len(self.make) + len(self.unmake)

    def text(self) -> str:
        """The same for iptables-restore --noflush, which makes (and would flush) each chain named with a colon."""
        parts = []
        for table in TABLES:
            words = [f":{chain} - [0:0]" for name, chain in self.make if name == table]
            words += [f"-D{line.text[2:]}" for line in self.drop if line.table == table]
            words += [line.text() for line in self.add if line.table == table]
            words += [f"-X {chain}" for name, chain in self.unmake if name == table]
            if words:
                parts.append("\n".join((f"*{table}", *words, "COMMIT", "")))
        return "".join(parts)


def change(
    version: int, saved: Saved, add: Collection[Rule], drop: Collection[Rule], tags: Collection[str] = ()
) -> Change:
    """What brings `saved` to hold `add` and not `drop`, nor the rules whose tags are named; the least that does."""
    wanted = {rule: iptablesrules.lines(rule) for rule in add}
    going = {tag_of(line.id) for rule in drop for line in iptablesrules.lines(rule)} | set(tags)
    have = saved.ids()
    fresh = [lines for lines in wanted.values() if not all(line.id in have for line in lines)]
    # A rule of which a part is missing is written anew: marks must come before the DNAT that ends their chain.
    going |= {tag_of(lines[0].id) for lines in fresh if lines}
    result = Change(drop=[line for line in saved.lines if line.tag in going])
    result.add = [line for lines in fresh for line in lines]
    left = [line for line in saved.lines if line.id and line.tag not in going]
    _dispatch(result, saved, left, [rule for rule in (*add, *drop) if isinstance(rule, Publish)])
    _share(result, saved, left)
    _skeleton(result, version, saved, {line.table for lines in wanted.values() for line in lines})
    _chains(result, saved)
    return result


def _dispatch(result: Change, saved: Saved, left: list[SavedLine], rules: list[Publish]) -> None:
    """The lines that lead to each chain of published ports that changes."""
    changed: list[SavedLine | Line] = [*result.drop, *result.add]
    staying: list[SavedLine | Line] = [*left, *result.add]
    touched = {line.chain for line in changed if line.chain.startswith("CNI-DN-")}
    groups = {found.chain: found for found in map(iptablesrules.group, rules)}
    touched |= groups.keys() & {line.chain for line in staying}
    for chain in sorted(touched):
        ports = [port for line in staying if line.chain == chain for port in published(line.notes)]
        wanted = {line.id: line for line in groups.get(chain, Group(chain, "", "")).lines(ports)}
        old = [line for line in saved.lines if line.id.startswith(f"dispatch.{chain}.")]
        result.drop += [line for line in old if line.id not in wanted]
        result.add += [line for name, line in wanted.items() if name not in {line.id for line in old}]


def published(notes: Iterable[str]) -> list[tuple[str, int]]:
    """(protocol, host port) that a line's notes say it takes."""
    found = []
    for note in notes:
        word, _, value = note.partition("=")
        if word in ("port", "if-port"):
            _, port, proto = value.rsplit(",", 2)
            found.append((proto, int(port)))
    return found


def _share(result: Change, saved: Saved, left: list[SavedLine]) -> None:
    """Shared lines come with the first line that needs them and go with the last."""
    lines: list[SavedLine | Line] = [*left, *result.add]
    needed = {note for line in lines if tag_of(line.id) not in NO_RULE for note in line.notes if "=" in note}
    wanted = {line.id: line for note in sorted(needed) for line in iptablesrules.shared(note)}
    have = {line.id for line in saved.lines}
    result.add += [line for name, line in wanted.items() if name not in have]
    result.drop += [line for line in saved.lines if line.id.startswith("shared.") and line.id not in wanted]


def _skeleton(result: Change, version: int, saved: Saved, tables: set[str]) -> None:
    have = saved.ids()
    for table in sorted(tables):
        docker = (table, "DOCKER-USER") in saved.chains
        missing = [line for line in iptablesrules.skeleton(table, version, docker) if line.id not in have]
        result.add[:0] = missing  # they go first in their chains too


def _chains(result: Change, saved: Saved) -> None:
    targets = {(line.table, line.chain): None for line in result.add}
    for table in {line.table for line in result.add}:
        targets.update(dict.fromkeys((table, chain) for chain in CHAINS[table]))
    result.make = [place for place in targets if place[1] not in BUILT_IN and place not in saved.chains]
    dropped = set(result.drop)
    staying = [line for line in saved.lines if line not in dropped]
    used = {(line.table, line.chain) for line in staying} | targets.keys()
    used |= {(line.table, found[1]) for line in staying if (found := TARGET.search(line.text))}
    empty = {(line.table, line.chain) for line in result.drop} - used
    permanent = BUILT_IN | {chain for chains in CHAINS.values() for chain in chains}
    result.unmake = sorted(place for place in empty if place[1] not in permanent)


# --- doing -----------------------------------------------------------------------------------------------------------


class Iptables:
    """towpath.kernel.contract.Firewall on iptables and ip6tables. One caller at a time is served; others wait.

    A commit is one transaction per address family and table; what fails in the second leaves the first, and whoever
    undoes the attachment takes both away. Frames (PinMac) are beyond iptables: they are pinned by nftables.
    """

    name = "iptables"
    quick = False

    def __init__(self, *, netns_is_current: bool = False) -> None:
        self._lock = threading.Lock()
        self._frames = Nftables(tables=(FRAMES,), netns_is_current=netns_is_current)

    def commit(self, changes: tuple[object, ...]) -> int:
        add, drop = read_changes(changes)
        if pins := (*(AddRule(pin) for pin in frame_pins(add)), *(DropRule(pin) for pin in frame_pins(drop))):
            self._frames.commit(pins)
        with self._lock:
            for version in PREFIX:
                here, gone = of_family(add, version), of_family(dict(expressed(drop, iptablesrules.lines)), version)
                if here or gone:
                    saved = self._save(version, {line.table for r in (*here, *gone) for line in iptablesrules.lines(r)})
                    _refuse_taken(saved, here, {rule: add[rule] for rule in here}, gone)
                    self._write(version, change(version, saved, here, gone), changes)
        return -1

    def seen(self) -> frozenset[object]:
        found: set[object] = set(self._frames.seen())
        with self._lock:
            for version in PREFIX:
                for line in self._save(version).lines:
                    found |= line_fingerprints(version, line)
        return frozenset(found)

    def fingerprints(self, rules: Iterable[Rule]) -> frozenset[object]:
        rules = tuple(rules)
        found: set[object] = set(self._frames.fingerprints(frame_pins(rules)))
        for rule in rules:
            for version in iptablesrules.versions_of(rule):
                found |= _fingerprints(rule, version)
        return frozenset(found)

    def heal(self, wanted: Iterable[Rule]) -> int:
        rules = tuple(dict(expressed(wanted, iptablesrules.lines)))
        done = self._frames.heal(frame_pins(rules))
        with self._lock:
            for version in PREFIX:
                here = of_family(rules, version)
                saved = self._save(version)
                tags = {tag_of(line.id) for rule in here for line in iptablesrules.lines(rule)}
                stale = {line.tag for line in saved.lines if line.id} - tags - NO_RULE
                edit = change(version, saved, here, (), stale)
                self._write(version, edit, rules)
                done += len(edit)
        return done

    def remove(self) -> None:
        self._frames.remove()
        with self._lock:
            for version in PREFIX:
                saved = self._save(version)
                edit = Change(drop=[line for line in saved.lines if line.id])
                staying = [line for line in saved.lines if not line.id]
                used = {(line.table, line.chain) for line in staying}
                used |= {(line.table, found[1]) for line in staying if (found := TARGET.search(line.text))}
                mine = {(line.table, line.chain) for line in edit.drop}
                mine |= {(table, chain) for table, chains in CHAINS.items() for chain in chains}
                edit.unmake = sorted(place for place in (mine & saved.chains) - used if place[1] not in BUILT_IN)
                self._write(version, edit, "our chains")

    def describe(self, rule: Rule) -> str:
        if isinstance(rule, PinMac):
            return self._frames.describe(frame_pin(rule))
        lines = iptablesrules.lines(rule)
        words = [f"-t {line.table} {line.text()}" for line in lines]
        return f"{PREFIX[min(iptablesrules.versions_of(rule), default=4)]}tables {', '.join(words) or 'nothing'}"

    def close(self) -> None:
        self._frames.close()

    def _save(self, version: int, tables: Collection[str] = TABLES) -> Saved:
        return read(xtables.save(version, next(iter(tables)) if len(tables) == 1 else ""))

    def _write(self, version: int, edit: Change, operations: object) -> None:
        if len(edit):
            xtables.restore(version, edit.text(), operations)


def _fingerprints(rule: Rule, version: int) -> set[object]:
    own = iptablesrules.lines(rule)
    notes = {note for line in own for note in line.notes}
    lines = [*own, *(line for note in notes for line in iptablesrules.shared(note))]
    for table in {line.table for line in own}:
        lines += iptablesrules.skeleton(table, version)
    found: set[object] = {(version, line.chain, line.id) for line in lines}
    if isinstance(rule, Publish) and own:
        found.add((version, iptablesrules.group(rule).chain, rule.port.proto, rule.port.host_port))
    return found


def of_family(rules: Iterable[Rule], version: int) -> list[Rule]:
    return [rule for rule in rules if version in iptablesrules.versions_of(rule)]


def frame_pin(rule: PinMac) -> FramePin:
    return FramePin(rule.port, rule.mac, rule.owner)


def frame_pins(rules: Iterable[Rule]) -> list[FramePin]:
    return [frame_pin(rule) for rule in rules if isinstance(rule, PinMac)]


def line_fingerprints(version: int, line: SavedLine) -> set[object]:
    """What a line proves to be there: itself; of one that leads to published ports, each port."""
    if not line.id:
        return set()
    if line.tag != "dispatch" or line.chain != DNAT:
        return {(version, line.chain, line.id)}
    chain = line.id.split(".")[1]
    proto, _, ports = line.notes[0].partition("=")
    return {(version, chain, proto, int(port)) for port in ports.split(",")}


def _refuse_taken(saved: Saved, add: Iterable[Rule], because: dict[Rule, object], drop: Sequence[Rule]) -> None:
    """Raise PhaseFailed for the first port to be published that other lines take."""
    leaving = {tag_of(line.id) for rule in drop for line in iptablesrules.lines(rule)}
    holders = {
        note: line for line in saved.lines if line.tag not in leaving for note in line.notes if note[:5] == "port="
    }
    for rule in add:
        if isinstance(rule, Publish):
            holder = holders.get(iptablesrules.taken(rule))
            if holder is not None and holder.tag != tag_of(iptablesrules.lines(rule)[0].id):
                text = f"taken by {holder.notes[-1]}: {holder.text}"
                raise PhaseFailed("firewall", because[rule], errno.EEXIST, text)
