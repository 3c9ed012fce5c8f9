"""The log of the server's processes: one line a record, as JSON or as text. Never prompts, outputs or keys."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

log = logging.getLogger(__name__)
FIELDS = "fields"
"""The attribute of a log record that holds what was measured."""


class JsonFormatter(logging.Formatter):
    """Writes one JSON object a line: ``time``, ``level``, ``logger``, ``message`` and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Writes time, level, message and ``field=value``. Fields are escaped, so that a line stays one line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, FIELDS, {})
        return " ".join([super().formatMessage(record), *(f"{k}={json.dumps(v)}" for k, v in fields.items())])


def configure(log_format: str, stream: TextIO | None = None) -> None:
    """Sends this package's log to `stream` (stderr by default) as ``json`` or ``text``; for a serving process."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("echo_rl").setLevel(logging.INFO)


def write(message: str, **fields: Any) -> None:
    """Logs a message with what was measured."""
    log.info(message, extra={FIELDS: fields})
