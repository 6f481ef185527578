"""Who did what to which object, with what result: one JSON object a line, written before the client has its answer.

Writes are recorded, and whatever was refused for lack of rights. The file is opened for every record, so that it can
be rotated by renaming. When a record cannot be written the request that caused it is still answered truthfully, and
further writes are refused until records can be written again: at most one write per request in hand goes unrecorded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import structlog

from lrm.api.status import RequestError
from lrm.model import rfc3339
from storage.clock import Clock

log = structlog.get_logger(__name__)

_OBJECTS_MOST = 200
"""Objects in one record: readers of lines have limits, and a line is written as a whole or not at all."""


@dataclass(frozen=True, slots=True)
class Touched:
    """One object that a request wrote or tried to write."""

    plural: str
    namespace: str
    name: str
    result: str = ""
    """created, configured, unchanged, deleted, deleting, failed; empty when the answer's code says it."""
    before: str = ""
    """resourceVersion before and after."""
    after: str = ""
    note: str = ""


class Audit:
    """The record; with no file it keeps none. A request with very many objects has several records under its one id."""

    def __init__(self, path: Path | None, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self.error = ""
        """Why the last record was not written."""

    def check(self) -> None:
        """Before a write: raise 503 when it could not be recorded."""
        if self.error:
            self._append({"event": "resumed after a record was lost", "lost": self.error})
        if self.error:
            raise RequestError(503, "ServiceUnavailable", "writes cannot be recorded at the moment", retry_after=10)

    def record(
        self,
        *,
        request_id: str,
        who: str,
        role: str,
        source: str,
        method: str,
        path: str,
        code: int,
        touched: list[Touched],
    ) -> bool:
        """Write down one request; False when that failed."""
        objects = [{field: getattr(t, field) for field in Touched.__slots__ if getattr(t, field)} for t in touched]
        record = {
            "request": request_id,
            "who": who,
            "role": role,
            "from": source,
            "method": method,
            "path": path,
            "code": code,
        }
        parts = [objects[n : n + _OBJECTS_MOST] for n in range(0, len(objects), _OBJECTS_MOST)] or [[]]
        return all(self._append({**record, "objects": part}) for part in parts)

    def _append(self, record: dict[str, Any]) -> bool:
        if self._path is None:
            return True
        line = orjson.dumps({"at": rfc3339(self._clock.now()), **record}, option=orjson.OPT_APPEND_NEWLINE)
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError("the record was written in part: the disk is full")
            finally:
                os.close(descriptor)
        except OSError as error:
            self.error = str(error)
            log.error("audit.not_written", file=str(self._path), error=self.error, record=record)  # noqa: TRY400
            return False
        self.error = ""
        return True
