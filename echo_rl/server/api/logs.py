"""One line per request and per admin action, as JSON or as text. Never prompts, outputs or keys."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

from echo_rl.server.api.request_stats import RequestStats

log = logging.getLogger(__name__)
FIELDS = "fields"
"""Attribute of a log record that holds what was measured."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message`` and the record's fields."""

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
    """The same for people: time, level, message, ``field=value``. Fields are escaped, so a line stays one line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, FIELDS, {})
        return " ".join([super().formatMessage(record), *(f"{k}={json.dumps(v)}" for k, v in fields.items())])


def configure(form: str, stream: TextIO | None = None) -> None:
    """Send this package's log to `stream` (stderr by default), in the given form. For processes that only serve."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("echo_rl").setLevel(logging.INFO)


def request_done(trail: RequestStats) -> None:
    """The line of a finished request."""
    write(
        "request",
        id=trail.id,
        route=trail.route,
        status=trail.status,
        stream=trail.streamed,
        prompt_tokens=trail.prompt_tokens,
        output_tokens=trail.output_tokens,
        ttft=_rounded(trail.ttft),
        e2e=_rounded(trail.e2e),
        finish_reason=",".join(trail.finish_reasons) or None,
    )


def admin_action(action: str, **what: Any) -> None:
    write(f"admin {action}", **what)


def write(message: str, **fields: Any) -> None:
    log.info(message, extra={FIELDS: fields})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
