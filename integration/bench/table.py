"""Rows of a benchmark: what was measured of ours and of the peer, the bar, and whether it was met."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True, slots=True)
class Row:
    """ratio = ours / peer; without a peer, `ours` itself is held against the bar. bar None = told, not judged.

    more: the ratio has to be at least the bar (rates); else at most (times, sizes).
    """

    name: str
    unit: str
    ours: float
    peer: float | None
    bar: float | None
    more: bool = False

    @property
    def ratio(self) -> float | None:
        return None if not self.peer else self.ours / self.peer

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        value = self.ours if self.ratio is None else self.ratio
        return value >= self.bar if self.more else value <= self.bar

    def json(self) -> dict[str, object]:
        found = asdict(self)
        del found["more"]
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
        ratio = None if self.ratio is None else round(self.ratio, 4)
        return {**rounded, "ratio": ratio, "met": self.met}


def compare(name: str, ours: Sequence[float], peer: Sequence[float], bar: float | None) -> list[Row]:
    """Two rows of interleaved times in seconds: the medians, which are judged, and the best of each, which are told."""
    return [
        Row(name, "ms", median(ours) * 1000, median(peer) * 1000, bar),
        Row(f"{name}, best", "ms", min(ours) * 1000, min(peer) * 1000, None),
    ]


def text(rows: Iterable[Row]) -> str:
    """The table as people read it."""
    lines = [f"{'':58} {'unit':>7} {'ours':>9} {'peer':>9} {'ratio':>8} {'bar':>7}"]
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:.2f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        bar = "" if row.bar is None else f"{'≥' if row.more else '≤'}{row.bar:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[row.met]
        lines.append(f"{row.name:58} {row.unit:>7} {row.ours:9.2f} {peer:>9} {ratio:>8} {bar:>7} {verdict}")
    return "\n".join(lines)


def write(rows: Iterable[Row], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([row.json() for row in rows], indent=1) + "\n")
