"""Structured logs: every line knows its stream, and nothing of what was said is written unless asked for."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from service.config import LogConfig

stream_id: ContextVar[str] = ContextVar("stream_id", default="")
_PLAIN = frozenset(vars(logging.makeLogRecord({})))


class _JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, stream, and whatever `extra` held."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        values |= {key: value for key, value in vars(record).items() if key not in _PLAIN and value != ""}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)


class _TextLines(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        known = {key: value for key, value in vars(record).items() if key not in _PLAIN and value != ""}
        return " ".join([super().format(record), *(f"{key}={value}" for key, value in known.items())])


def _add_stream(record: logging.LogRecord) -> bool:
    if not hasattr(record, "stream"):
        record.stream = stream_id.get()
    return True


def set_up(config: LogConfig, file: TextIO | None = None) -> None:
    """Let every logger of the process write to `file` (standard error) as configured."""
    handler = logging.StreamHandler(file or sys.stderr)
    handler.addFilter(_add_stream)
    plain = _TextLines("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonLines() if config.format == "json" else plain)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level.upper())
