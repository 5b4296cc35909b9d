"""Tables stay tables, whatever stands in a cell."""

from __future__ import annotations

from towpath.cli.table import table


def test_a_cell_that_would_move_the_cursor_is_shown_in_one_line() -> None:
    assert table(("a", "b"), [("x\ny", "\x1b[2J")]).splitlines()[1:] == ["x\\ny  \\x1b[2J"]
