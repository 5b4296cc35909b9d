"""Log lines and the word to systemd."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
from pathlib import Path

import pytest

from towpath import logs
from towpath.notify import notify


def line(style: str = "text", *, journal: bool = False, level: int = logging.INFO, **extra: object) -> str:
    record = logging.makeLogRecord(
        {"name": "towpath.attach", "levelno": level, "levelname": logging.getLevelName(level), "msg": "attached"}
        | {"created": 1_700_000_000.5}
        | extra
    )
    return logs.Lines(style, journal=journal).format(record)


def test_a_text_line_is_logfmt() -> None:
    assert line(network="web", why='a "b"', n=3, ok=True, empty="") == (
        "time=2023-11-14T22:13:20.500Z level=info from=attach msg=attached network=web "
        'why="a \\"b\\"" n=3 ok=true empty=""'
    )


def test_a_json_line_holds_the_same_fields() -> None:
    assert json.loads(line("json", network="web", n=3)) == {
        "time": "2023-11-14T22:13:20.500Z",
        "level": "info",
        "from": "attach",
        "msg": "attached",
        "network": "web",
        "n": 3,
    }


@pytest.mark.parametrize(
    ("level", "prefix"),
    [
        (logging.DEBUG, "<7>"),
        (logging.INFO, "<6>"),
        (logging.WARNING, "<4>"),
        (logging.ERROR, "<3>"),
        (50, "<2>"),
        (5, "<7>"),
    ],
)
def test_the_journal_gets_priorities_and_no_time(level: int, prefix: str) -> None:
    assert line(journal=True, level=level).startswith(f"{prefix}level=")


def test_a_trace_stays_on_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as exc:
        text = line(exc_info=(type(exc), exc, exc.__traceback__))
    assert "\n" not in text
    assert "ValueError: two\\nlines" in text


def test_the_journal_is_known_by_its_inode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "journal").open("w") as stream:
        seen = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{seen.st_dev}:{seen.st_ino}")
        assert logs.to_journal(stream)
        assert not logs.to_journal(io.StringIO())
        monkeypatch.setenv("JOURNAL_STREAM", "1:1")
        assert not logs.to_journal(stream)


def test_nobody_is_told_where_there_is_no_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")


@pytest.mark.parametrize("kind", ["a path", "an abstract name"])
def test_systemd_hears_the_state(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(tmp_path / "notify") if kind == "a path" else f"@towpath-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(name.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify("READY=1")
        assert heard.recv(100) == b"READY=1"
