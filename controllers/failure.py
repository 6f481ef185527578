"""Why an object is Failed, as its status keeps it: of workers and of lab instances."""

from __future__ import annotations

from lrm.model import Model, Timestamp


class Failure(Model):
    """Why it is Failed, and what must differ for it to begin again."""

    reason: str
    message: str
    at: Timestamp
    phase: str
    """Where it failed."""
    generation: int
    retry: str | None = None
    """The value of the retry annotation then."""
