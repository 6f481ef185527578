"""When to look at a worker again, and whether its time is over.

Derived from the settings and from timestamps in the status, so nothing of it is lost with a process.
"""

from __future__ import annotations

from datetime import datetime

from controllers.workers.settings import WorkerSettings
from controllers.workers.work import Work
from lrm.controller import Result

_BACKOFF_MOST = 60.0


class Pace:
    """The answers of one set of settings."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings

    def soon(self) -> Result:
        """Something is on its way."""
        return Result.after(self.settings.worker_poll_interval)

    def rest(self) -> Result:
        """Nothing is expected; what happens outside is seen by then."""
        return Result.after(self.settings.worker_rest_interval)

    def uneasy(self) -> Result:
        """A look has failed: sooner than at rest, and not so soon that three of them are one outage of seconds."""
        return Result.after(max(self.settings.worker_poll_interval, self.settings.worker_rest_interval / 4))

    def backoff(self, work: Work) -> Result:
        """Longer between launches the longer they have been tried: a full account is not asked every 5 s."""
        began = work.worker.status.timestamps.provisioning_started_at
        tried = (work.due_by - began).total_seconds() if began is not None else 0.0
        return Result.after(max(self.settings.worker_poll_interval, min(_BACKOFF_MOST, tried / 5)))

    def is_over(self, work: Work, since: datetime | None, seconds: float) -> bool:
        """Whether a deadline has passed; observing only, nothing can have moved, so none does."""
        return not work.observe_only and work.over(since, seconds)
