"""Structured logs: one JSON object for each log record, with the task that the record concerns."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Protocol

FIELDS = ("task", "queue", "worker", "attempt")
"""The fields that a record may have in addition to its message."""


class Logged(Protocol):
    """An object that provides the log fields of the current task or worker."""

    def log_fields(self) -> dict[str, object]:
        """Return a dict of the `FIELDS` whose values are known."""
        ...


class WorkerLogged:
    """The log fields of a worker that is not working on a task."""

    def __init__(self, worker: str) -> None:
        self._worker = worker

    def log_fields(self) -> dict[str, object]:
        """Return the worker's id."""
        return {"worker": self._worker}


LOGGED: ContextVar[Logged | None] = ContextVar("nqnb.logged", default=None)
"""The provider of the log fields for the current asyncio task or thread."""


class JsonFormatter(logging.Formatter):
    """A log formatter that writes a record as one line of JSON.

    The line contains the time in UTC, the level, the logger, the message, and the `FIELDS` that are known. If the
    record has an exception, ``error`` contains the traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for a record. Control characters and all characters outside ASCII are escaped."""
        logged = LOGGED.get()
        known = {} if logged is None else logged.log_fields()
        at = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in FIELDS:
            value = getattr(record, name, known.get(name))
            if value not in (None, ""):
                line[name] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
