"""Tables for people: columns as wide as their widest cell, two spaces between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

DASH = "-"


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, right: frozenset[str] = frozenset()) -> str:
    """Headers in capitals, one line per row, an empty cell as `-`; columns named in `right` stand at the right."""
    cells = [[header.upper() for header in headers], *([one_line(cell) or DASH for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        line = [
            text.rjust(width) if header in right else text.ljust(width)
            for header, text, width in zip(headers, row, widths, strict=True)
        ]
        lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def one_line(cell: object) -> str:
    """A cell as one line: what would move the cursor (newlines, escapes) is shown, not done."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(cell))


def details(pairs: Iterable[tuple[str, object]]) -> str:
    """`key  value` lines with the values below each other; a list takes a line per element."""
    shown = [(key, value) for key, value in pairs if value not in (None, [], ()) and _plain(value)]
    width = max((len(key) for key, _ in shown), default=0)
    lines = []
    for key, value in shown:
        for i, text in enumerate(value if isinstance(value, list | tuple) else [value]):
            lines.append(f"{'' if i else key:<{width}}  {_plain(text)}")
    return "\n".join(lines)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{k}={_plain(v)}" for k, v in value.items() if v not in ("", None, [], {}))
    return str(value)


def span(seconds: float) -> str:
    """A length of time in its two largest units: 45s, 3m 20s, 2h 5m, 4d 3h."""
    whole = max(0, int(seconds))
    units = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
    for i, (size, letter) in enumerate(units):
        if whole >= size:
            rest = units[i + 1] if i + 1 < len(units) else None
            more = whole % size // rest[0] if rest else 0
            return f"{whole // size}{letter}" + (f" {more}{rest[1]}" if rest and more else "")
    return "0s"
