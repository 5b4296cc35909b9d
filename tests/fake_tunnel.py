"""The tunnel part of the kernel in memory: neighbours, forwarding entries and policy rules."""

from __future__ import annotations

from towpath.plan import AddFdb, AddNeighbour, AddPolicyRule, DropFdb, DropNeighbour, DropPolicyRule


class FakeTunnel:
    """Neighbours and forwarding entries by key, and policy rules."""

    def __init__(self) -> None:
        self.entries: dict[tuple[object, ...], AddNeighbour | AddFdb | AddPolicyRule] = {}

    def add(self, op: AddNeighbour | AddFdb | AddPolicyRule) -> None:
        self.entries[self.key(op)] = op

    def drop(self, op: DropNeighbour | DropFdb | DropPolicyRule) -> None:
        held = self.entries.get(self.key(op))
        if not isinstance(op, DropFdb) or (isinstance(held, AddFdb) and held.to == op.to):
            self.entries.pop(self.key(op), None)

    @staticmethod
    def key(
        op: AddNeighbour | AddFdb | AddPolicyRule | DropNeighbour | DropFdb | DropPolicyRule,
    ) -> tuple[object, ...]:
        match op:
            case AddNeighbour() | DropNeighbour():
                return ("neighbour", op.link, op.address)
            case AddFdb() | DropFdb():
                return ("fdb", op.link, op.mac)
        return ("rule", op.source, op.table, op.priority)

    def forget(self, link: str) -> None:
        self.entries = {key: op for key, op in self.entries.items() if key[1] != link}

    def lines(self) -> set[str]:
        found = set()
        for op in self.entries.values():
            match op:
                case AddNeighbour():
                    found.add(f"neighbour {op.address} at {op.mac} on {op.link}")
                case AddFdb():
                    found.add(f"fdb {op.mac} to {op.to} on {op.link}")
                case AddPolicyRule():
                    found.add(f"rule {op.priority} from {op.source} table {op.table}")
        return found
