"""The package's loggers, and a formatter that writes their records as JSON.

    rollout_server             WARNING: a rollout that failed, an engine that died or was restarted
    rollout_server.requests    INFO: one record a request; WARNING: answered with 500 or above
    rollout_server.lifecycle   INFO: sync, sleep, wake, the end; DEBUG: sessions;
                               WARNING: one that failed; ERROR: the server is broken

All is standard logging: nothing is shown but what the user's own handlers and levels ask for.
Where there are none, logging itself prints the warnings of the first; failures of the other two
are answered, or raised, to whom they concern. Each record has its facts as attributes, `event`
first, as given in `extra`. Secrets are taken out before a handler sees a record.
"""

import datetime
import json
import logging
import traceback
from typing import Any

from rollout_server.observability.redact import scrub

# The last one is set by vLLM on every record of its process.
_STANDARD = {
    *vars(logging.makeLogRecord({})),
    "message",
    "asctime",
    "taskName",
    "vllm_process_name",
}


class _Scrub(logging.Filter):
    """Runs only for records that are wanted."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage()), None
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = scrub("".join(traceback.format_exception(record.exc_info[1])).strip())
            record.exc_info = None  # an exception's own text may hold a URL
        for name, value in facts(record).items():
            if isinstance(value, str):
                setattr(record, name, scrub(value))
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, the record's facts, and
    `exception` with a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        told = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        } | facts(record)
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            told["exception"] = record.exc_text
        return json.dumps(told, default=str)


def facts(record: logging.LogRecord) -> dict[str, Any]:
    """What a record was given in `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def tell(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Log an event with its facts, which the message shows too."""
    if logger.isEnabledFor(level):
        fields = {name: value for name, value in fields.items() if value is not None}
        shown = " ".join(f"{name}={_short(value)}" for name, value in fields.items())
        logger.log(level, f"{event} {shown}".rstrip(), extra={"event": event} | fields)


def _short(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else value


def _own(name: str) -> logging.Logger:
    logger = logging.getLogger(name)
    if not any(isinstance(f, _Scrub) for f in logger.filters):
        logger.addFilter(_Scrub())
    return logger


def _silent(name: str) -> logging.Logger:
    logger = _own(name)
    logger.addHandler(logging.NullHandler())
    return logger


GENERAL = _own("rollout_server")
REQUESTS = _silent("rollout_server.requests")
LIFECYCLE = _silent("rollout_server.lifecycle")
