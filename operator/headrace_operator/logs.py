"""Log records as one JSON object per line."""

import json
import logging
import sys
from datetime import UTC, datetime

_LOUD = ("kopf", "aiohttp.access", "asyncio")


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object; fields given by `extra` are kept by name."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        # `name` is the logger's in a record, so objects are passed as one field.
        target = getattr(record, "object", None)
        if target is not None:
            entry["namespace"], entry["name"] = target
        entry |= {f: getattr(record, f) for f in ("reason", "seconds") if hasattr(record, f)}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging() -> None:
    """Send all records to standard error; those of libraries from WARNING up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)
