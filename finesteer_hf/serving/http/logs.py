"""Structured logs: one JSON object a line, without prompts, answers or keys."""

from __future__ import annotations

import json
import logging
import time
import traceback


LOGGER = logging.getLogger("finesteer_hf.serving")


class JsonLines(logging.Formatter):
    """A record as JSON; what is given as `extra={"fields": {...}}` stands beside its message.

    Of an exception its kind and place are shown and not its text, which may quote what a client sent.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["at"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(record.exc_info[2])]
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr() -> None:
    """Write the logs of this package, of transformers and uvicorn, and warnings, to stderr as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.captureWarnings(True)
    for name in ("finesteer_hf", "transformers", "uvicorn", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO if name == "finesteer_hf" else logging.WARNING)
        logger.propagate = False
