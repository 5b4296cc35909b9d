"""Log lines that people read and programs parse: logfmt or JSON, with journal priorities under systemd."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")

_OWN = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}
# syslog(3) priorities, which sd-daemon(3) reads from a `<N>` at the start of a line.
_PRIORITY = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))


def fields_of(record: logging.LogRecord) -> Iterator[tuple[str, object]]:
    """(key, value) as printed: time, level, logger, message, then what the caller gave as `extra`."""
    when = datetime.fromtimestamp(record.created, UTC)
    yield "time", when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    yield "level", record.levelname.lower()
    yield "from", record.name.removeprefix("towpath.")
    yield "msg", record.getMessage()
    for key, value in record.__dict__.items():
        if key not in _OWN and not key.startswith("_"):
            yield key, value
    if record.exc_info and record.exc_info[0] is not None:
        yield "trace", "".join(traceback.format_exception(*record.exc_info)).rstrip()


def logfmt_value(value: object) -> str:
    """Bare where it is one plain word, else quoted as JSON quotes; a line is always one line."""
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    plain = text.isascii() and text.isprintable() and not any(c in ' "=\\' for c in text)
    return text if text and plain else json.dumps(text, ensure_ascii=False)


def priority(level: int) -> str:
    return f"<{next((number for least, number in _PRIORITY if level >= least), 7)}>"


class Lines(logging.Formatter):
    """One line per record. `style`: "text" (logfmt) or "json"; journal: prefix `<N>` and leave the time to journald."""

    def __init__(self, style: str = "text", *, journal: bool = False) -> None:
        super().__init__()
        self.style = style
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        pairs = [(k, v) for k, v in fields_of(record) if not (self.journal and k == "time")]
        if self.style == "json":
            line = json.dumps(dict(pairs), default=str, ensure_ascii=False)
        else:
            line = " ".join(f"{key}={logfmt_value(value)}" for key, value in pairs)
        return (priority(record.levelno) if self.journal else "") + line


def to_journal(stream: TextIO) -> bool:
    """Whether `stream` is the journal's: $JOURNAL_STREAM holds its device and inode (systemd.exec(5))."""
    try:
        seen = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file behind it, or closed
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{seen.st_dev}:{seen.st_ino}"


def setup(level: str = "info", style: str = "text", stream: TextIO | None = None) -> None:
    """Send every logger's lines to `stream` (stderr). May be called again: the last call counts."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines(style, journal=to_journal(stream)))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
