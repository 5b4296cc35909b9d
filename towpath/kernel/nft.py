"""The nftables back end: an own table whose maps and sets hold one element or a few per rule, changed by one batch.

The hot path speaks netlink and costs the same at any size; `nft -f -` puts the tables in, and writes what only a rule
can say (conditions of the user). `plain=True` writes everything by `nft`: tests hold the two against each other.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from towpath.errors import BadConfig, PhaseFailed, Unavailable
from towpath.kernel.forwarding import Forwarding
from towpath.kernel.nftbatch import Refusal, Structure, Tables
from towpath.kernel.nftrules import CHAINS, OPEN_CHAINS, Conditional, Piece, edition, pieces, sets_of, shared, skeleton
from towpath.kernel.nftset import BRIDGE, CLAIMS, IFNAME_ROOM, INET, SETS, Element, phrase
from towpath.plan import Accept, AddRule, DropRule, Rule

T = TypeVar("T")

log = logging.getLogger(__name__)

ATTEMPTS = 4  # each time the world changed between reading and writing: somebody flushes rules in a loop
PATIENCE = 30.0  # seconds for one run of nft
NOT_UNDERSTOOD = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT)
ERRNOS = {
    os.strerror(number): number for number in (errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.EPERM, errno.EINVAL)
}


@dataclass(slots=True)
class Edit:
    """What one transaction writes. `because` names the operation behind each addition."""

    drop: list[Element] = field(default_factory=list)
    add: dict[Element, object] = field(default_factory=dict)
    drop_rules: list[tuple[str, int]] = field(default_factory=list)  # chain, handle
    add_rules: dict[Conditional, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.drop) + len(self.add) + len(self.drop_rules) + len(self.add_rules)

    def text(self) -> str:
        """The same for `nft -f -`."""
        lines = [f"delete element {SETS[item.set].table} {item}" for item in self.drop]
        lines += [f"delete rule {INET} {chain} handle {handle}" for chain, handle in self.drop_rules]
        lines += [f"add element {SETS[item.set].table} {item}" for item in self.add]
        lines += [f'add rule {INET} {rule.chain} {rule.text} comment "{rule.comment}"' for rule in self.add_rules]
        return "".join(f"{line}\n" for line in lines)


class NftRefused(Exception):
    """`nft` said no; errno 0 where its text tells none that we know."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.errno = next((number for text, number in ERRNOS.items() if text in said), 0)


def run_nft(text: str) -> None:
    """Give `text` to nft as one transaction. Raises NftRefused, or Unavailable where there is no nft."""
    try:
        done = subprocess.run(
            ["nft", "-f", "-"], input=text.encode(), capture_output=True, timeout=PATIENCE, check=False
        )
    except FileNotFoundError:
        raise Unavailable("the program nft is missing", hint="install it: apt-get install nftables") from None
    if done.returncode:
        raise NftRefused(done.stderr.decode(errors="replace").strip() or f"nft ended with code {done.returncode}")


def sound(table: str, seen: Structure) -> bool:
    """Whether our chains, sets and rules are all there; what others put into user_ chains is theirs."""
    rules = {chain: len(lines) for chain, lines in CHAINS[table].items() if chain not in OPEN_CHAINS}
    return (
        edition(table) in seen.chains
        and seen.chains >= CHAINS[table].keys()
        and seen.sets.keys() >= set(sets_of(table))
        and all(seen.rules[chain] == count for chain, count in rules.items())
    )


def rebuild(table: str, seen: Structure, edit: Edit) -> str:
    """The text that puts `table` in anew with what `edit` adds, in one transaction; user_ chains and sets stay."""
    chains = sorted(chain for chain in seen.chains if not chain.startswith("user_"))
    sets = sorted(
        (name, "map" if is_map else "set") for name, is_map in seen.sets.items() if not name.startswith("user_")
    )
    lines = [f"flush chain {table} {chain}" for chain in chains]
    # A verdict map holds on to the chains that it names, so maps go first.
    lines += [f"delete {kind} {table} {name}" for name, kind in sets]
    lines += [f"delete chain {table} {chain}" for chain in chains]
    return "".join(f"{line}\n" for line in lines) + skeleton(table) + edit.text()


def read_changes(changes: Iterable[object]) -> tuple[dict[Rule, object], dict[Rule, object]]:
    """(to add, to drop), each with its operation; of several about one rule the last counts."""
    add: dict[Rule, object] = {}
    drop: dict[Rule, object] = {}
    for change in changes:
        if not isinstance(change, AddRule | DropRule):
            raise TypeError(f"{change} is no change of a firewall")
        one, other = (add, drop) if isinstance(change, AddRule) else (drop, add)
        other.pop(change.rule, None)
        one[change.rule] = change
    return add, drop


def expressed(rules: Iterable[Rule], read: Callable[[Rule], T]) -> Iterator[tuple[Rule, T]]:
    """Each rule with what `read` makes of it. One that cannot be written was never installed: it is left out."""
    for rule in rules:
        try:
            made = read(rule)
        except BadConfig as refusal:
            log.warning("a rule is left out", extra={"rule": str(rule), "why": refusal.what})
        else:
            yield rule, made


def ours(seen: Structure) -> dict[str, tuple[str, int]]:
    """Comments of the rules that belong to a Publish: chain and handle of each."""
    return {comment: place for comment, place in seen.comments.items() if place[0].startswith("conditional")}


def own(rule: Rule) -> tuple[Piece, ...]:
    return tuple(pieces(rule))


def everything(rule: Rule) -> tuple[Piece, ...]:
    return (*pieces(rule), *shared(rule))


class Nftables:
    """towpath.kernel.contract.Firewall on nftables. One caller at a time is served; others wait."""

    name = "nftables"
    quick = True

    def __init__(
        self, *, plain: bool = False, tables: tuple[str, ...] = (INET, BRIDGE), netns_is_current: bool = False
    ) -> None:
        self._plain = plain
        self._settled = netns_is_current
        self._names = tables
        self._forwarding = Forwarding()
        self._lock = threading.Lock()
        self._tables: Tables | None = None
        self._netns = 0

    # --- the contract ------------------------------------------------------------------------------------------------

    def commit(self, changes: tuple[object, ...]) -> int:
        add, drop = read_changes(changes)
        wanted = {rule: (everything(rule), operation) for rule, operation in add.items()}
        gone = dict(expressed(drop, own))
        with self._turn() as kernel:
            for attempt in range(ATTEMPTS):
                edit = _edit(kernel, wanted, gone)
                if not len(edit) or self._write(kernel, edit):
                    told = self._forward(kernel, add, edit)
                    return -1 if attempt or told else int(len(edit) > 0)
        raise PhaseFailed("firewall", changes, errno.EAGAIN, "somebody else keeps changing our tables")

    def seen(self) -> frozenset[object]:
        with self._turn() as kernel:
            found: set[object] = set()
            for table in self._names:
                structure = kernel.structure(table)
                if sound(table, structure):  # elements of a table without its rules do nothing
                    found.update(element for name in sets_of(table) for element in kernel.elements(name))
                    found.update((chain, comment) for comment, (chain, _) in ours(structure).items())
            return frozenset(found)

    def fingerprints(self, rules: Iterable[Rule]) -> frozenset[object]:
        return frozenset(
            (piece.chain, piece.comment) if isinstance(piece, Conditional) else piece
            for rule in rules
            for piece in everything(rule)
        )

    def heal(self, wanted: Iterable[Rule]) -> int:
        by_table = _by_table(made for _, made in expressed(wanted, everything))
        with self._turn() as kernel:
            done = sum(self._heal_table(kernel, table, by_table.get(table, {})) for table in self._names)
            return done + (self._forwarding.heal(kernel, _homes(by_table)) if INET in self._names else 0)

    def remove(self) -> None:
        with self._turn() as kernel:
            present = [table for table in self._names if not kernel.structure(table).absent]
            if INET in self._names:
                self._forwarding.heal(kernel, ())
            if present:
                self._run("".join(f"delete table {table}\n" for table in present))

    def describe(self, rule: Rule) -> str:
        words = [
            f"{piece.chain}: {piece.text}" if isinstance(piece, Conditional) else str(piece)
            for piece in everything(rule)
        ]
        return f"nftables {', '.join(words) or 'nothing'}"

    def close(self) -> None:
        with self._lock:
            self._close()

    # --- the socket --------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[Tables]:
        """The socket, for one caller at a time. What goes wrong with it is a PhaseFailed, and the next gets another."""
        with self._lock:
            try:
                yield self._kernel()
            except OSError as failure:
                self._close()
                raise PhaseFailed("firewall", "our tables", failure.errno or 0, str(failure)) from failure

    def _kernel(self) -> Tables:
        """The socket of the calling thread's namespace: kept, for closing one waits for a grace period."""
        if self._settled and self._tables is not None:
            return self._tables
        # Its inode cannot come again while the socket, which holds the namespace, is open.
        netns = os.stat("/proc/thread-self/ns/net").st_ino  # noqa: PTH116
        if self._tables is None or netns != self._netns:
            self._close()
            self._tables, self._netns = Tables(), netns
        return self._tables

    def _close(self) -> None:
        if self._tables is not None:
            self._tables.close()
            self._tables = None

    # --- commit ------------------------------------------------------------------------------------------------------

    def _forward(self, kernel: Tables, add: Iterable[Rule], edit: Edit) -> bool:
        """Tell the host's own FORWARD who came, and who went last; whether there was anything to tell."""
        told = False
        if homes := {rule.home for rule in add if isinstance(rule, Accept) and rule.home}:
            told = self._forwarding.admit(kernel, homes)
        if self._forwarding.used and any(item.set == "homes" for item in edit.drop):
            told = self._forwarding.heal(kernel, [phrase(item).strip('"') for item in kernel.elements("homes")]) > 0
        return told

    def _write(self, kernel: Tables, edit: Edit) -> bool:
        """False: nothing was written, for the tables are not what they were: read again and retry."""
        if self._plain or edit.drop_rules or edit.add_rules:
            return self._write_text(kernel, edit)
        refusals = kernel.transact(edit.drop, tuple(edit.add))
        if refusals and refusals[0].errno in NOT_UNDERSTOOD:
            log.warning("the kernel does not take our batch, nft writes it", extra={"why": refusals[0].text})
            return self._write_text(kernel, edit)
        if refusals:
            self._judge(kernel, edit, refusals[0])
        return not refusals

    def _judge(self, kernel: Tables, edit: Edit, refusal: Refusal) -> None:
        """Return where a second attempt may succeed, raise PhaseFailed where not."""
        item, operation = None, object()
        if 0 <= (place := refusal.place - len(edit.drop)) < len(edit.add):
            item, operation = list(edit.add.items())[place]
        if refusal.errno == errno.ENOENT:
            if item is not None:
                self._restore(kernel, SETS[item.set].table)
            return  # a deleted element went away by itself meanwhile
        if refusal.errno in (errno.EEXIST, errno.EBUSY) and item is not None:
            _refuse_taken(kernel, {item: operation})
        raise PhaseFailed("firewall", operation if item else edit.text(), refusal.errno, refusal.text)

    def _write_text(self, kernel: Tables, edit: Edit) -> bool:
        try:
            run_nft(edit.text())
        except NftRefused as refusal:
            if refusal.errno == errno.ENOENT:
                needed = {SETS[item.set].table for item in edit.add} | ({INET} if edit.add_rules else set())
                for table in needed:
                    self._restore(kernel, table)
                return False
            if refusal.errno in (errno.EEXIST, errno.EBUSY):
                _refuse_taken(kernel, edit.add)
            operations = [*edit.add.values(), *edit.add_rules.values(), *edit.drop_rules]
            raise PhaseFailed(
                "firewall", operations[0] if operations else edit.text(), refusal.errno, str(refusal)
            ) from None
        return True

    def _restore(self, kernel: Tables, table: str) -> None:
        """Put the table in where it is not whole. What it held is for `heal`, which is told of every change."""
        seen = kernel.structure(table)
        if not sound(table, seen):
            self._run(rebuild(table, seen, Edit()))

    def _run(self, text: str) -> None:
        try:
            run_nft(text)
        except NftRefused as refusal:
            raise PhaseFailed("firewall", "our table", refusal.errno, str(refusal)) from None

    # --- heal --------------------------------------------------------------------------------------------------------

    def _heal_table(self, kernel: Tables, table: str, wanted: dict[object, Piece]) -> int:
        for _ in range(ATTEMPTS):
            seen = kernel.structure(table)
            whole = sound(table, seen)
            edit = _difference(kernel, table, seen if whole else Structure(), wanted.values())
            if not whole and (edit.add or edit.add_rules or not seen.absent):
                self._run(rebuild(table, seen, edit))
                return 1 + len(edit)
            if not len(edit) or self._write(kernel, edit):
                return len(edit)
        raise PhaseFailed("firewall", table, errno.EAGAIN, "somebody else keeps changing it")


def _edit(
    kernel: Tables, wanted: dict[Rule, tuple[tuple[Piece, ...], object]], gone: dict[Rule, tuple[Piece, ...]]
) -> Edit:
    """What is to be written, by what the kernel holds now. wanted: a rule's pieces and the operation behind it."""
    edit = Edit()
    conditional: dict[Conditional, object] = {}
    for made, operation in wanted.values():
        for piece in made:
            if isinstance(piece, Conditional):
                conditional[piece] = operation
            else:
                edit.add[piece] = operation
    old = {piece for found in gone.values() for piece in found if isinstance(piece, Conditional)}
    comments = ours(kernel.structure(INET)) if conditional or old else {}
    edit.add_rules = {piece: operation for piece, operation in conditional.items() if piece.comment not in comments}
    edit.drop_rules = [comments[piece.comment] for piece in old - conditional.keys() if piece.comment in comments]
    if gone:
        edit.drop = _droppable(kernel, gone, edit.add, comments)
    return edit


def _droppable(
    kernel: Tables,
    gone: dict[Rule, tuple[Piece, ...]],
    add: dict[Element, object],
    comments: dict[str, tuple[str, int]],
) -> list[Element]:
    """The elements that leave with these rules.

    A rule whose first piece is not there is not installed: what is there under its other keys is somebody else's.
    """
    asked = [piece for found in gone.values() for piece in found if isinstance(piece, Element)]
    there = {seen for seen in kernel.read(asked) if seen is not None}
    drop: dict[Element, None] = {}
    candidates: dict[Element, None] = {}
    for rule, found in gone.items():
        candidates.update(dict.fromkeys(shared(rule)))
        if found and (found[0].comment in comments if isinstance(found[0], Conditional) else found[0] in there):
            drop.update((piece, None) for piece in found if isinstance(piece, Element) and piece in there)
    for item in add:
        drop.pop(item, None)
        candidates.pop(item, None)
    unclaimed = [item for item in candidates if not _claimed(kernel, item, drop.keys() | add.keys(), drop.keys())]
    return [*drop, *(seen for seen in kernel.read(unclaimed) if seen is not None)]


def _claimed(kernel: Tables, item: Element, changed: Iterable[Element], dropped: Iterable[Element]) -> bool:
    """Whether some element that stays, or comes, needs the shared `item`."""
    interface = item.key[:IFNAME_ROOM]
    leaving = set(dropped)
    for name in CLAIMS[item.set]:
        mine = [other for other in changed if other.set == name and other.key.startswith(interface)]
        if any(other not in leaving for other in mine):
            return True
        if kernel.count(name, interface) > len(mine):
            return True
    return False


def _refuse_taken(kernel: Tables, add: dict[Element, object]) -> None:
    """Raise PhaseFailed for the first addition whose key is taken with another value; return where there is none."""
    for (item, operation), seen in zip(add.items(), kernel.read(add), strict=True):
        if seen is not None and seen != item:
            raise PhaseFailed("firewall", operation, errno.EEXIST, f"taken: {seen}")


def _by_table(rules: Iterable[tuple[Piece, ...]]) -> dict[str, dict[object, Piece]]:
    """All pieces by table and by key. Of two with one key the first counts."""
    found: dict[str, dict[object, Piece]] = {}
    for rule in rules:
        for piece in rule:
            if isinstance(piece, Conditional):
                found.setdefault(INET, {}).setdefault(piece.comment, piece)
            else:
                found.setdefault(SETS[piece.set].table, {}).setdefault((piece.set, piece.key), piece)
    return found


def _homes(by_table: dict[str, dict[object, Piece]]) -> list[str]:
    """The interfaces behind which members are wanted."""
    pieces_ = by_table.get(INET, {}).values()
    return [phrase(p).strip('"') for p in pieces_ if isinstance(p, Element) and p.set == "homes"]


def _difference(kernel: Tables, table: str, seen: Structure, wanted: Iterable[Piece]) -> Edit:
    """Wanted minus seen and seen minus wanted, for one table."""
    target = {piece for piece in wanted if isinstance(piece, Element)}
    rules = {piece.comment: piece for piece in wanted if isinstance(piece, Conditional)}
    there = set() if seen.absent else {item for name in sets_of(table) for item in kernel.elements(name)}
    comments = ours(seen)
    return Edit(
        drop=list(there - target),
        add=dict.fromkeys(target - there, "heal"),
        drop_rules=[place for comment, place in comments.items() if comment not in rules],
        add_rules={piece: "heal" for comment, piece in rules.items() if comment not in comments},
    )
