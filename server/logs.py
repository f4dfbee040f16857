"""Logs as JSON lines or as text, each with the call that it belongs to."""

import json
import logging
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

LogFormat = Literal["json", "text"]


@dataclass
class Call:
    """One HTTP call, from its first header to its last byte."""

    request_id: str
    """The client's, where it sent a well-formed one."""
    answer_id: str
    """Always our own, and so unique: it names the request in the engine and in the answer."""
    generation: str | None = None
    """Of the task that answers, once it is known."""
    traceparent: str | None = None
    """The client's place in a trace (W3C Trace Context)."""
    asked: int = 0
    """How often the call has asked the engine."""


current_call: ContextVar[Call | None] = ContextVar("polyhead_call", default=None)
"""The call that the running code serves; None beside calls."""


def configure(kind: LogFormat, level: str) -> None:
    """Send every log of the process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if kind == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, and a record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """The same for eyes."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        pairs = [
            f"{key}={json.dumps(value, default=str)}" for key, value in fields_of(record).items()
        ]
        return " ".join([super().formatMessage(record), *pairs])


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as `extra={"fields": …}`, after the id of the running call."""
    call = current_call.get()
    own = {"request_id": call.request_id} if call is not None else {}
    return own | getattr(record, "fields", {})
