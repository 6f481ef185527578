"""Hours of the week in a time zone, also across midnight; pure functions of an aware time.

A window belongs to the day on which it starts: Fri 22:00 to 06:00 ends on Saturday morning. Wall-clock hours are
meant: a night on which clocks are changed is an hour longer or shorter.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import Field

from lrm.errors import Cause
from lrm.model import Model

Day = Literal["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
DAYS: tuple[Day, ...] = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")

HourMinute = Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$|^24:00$")]
"""A time of day, 00:00 to 24:00."""


class UnknownTimeZone(ValueError):  # noqa: N818 - it says what is wrong
    """The machine's time zone data do not have this name."""


class Window(Model):
    """From `start` until `end` on the days on which it starts; an end at or before the start is on the next day."""

    days: list[Day] = Field(default_factory=lambda: list(DAYS), min_length=1)
    start: HourMinute
    end: HourMinute

    def holds(self, local: datetime) -> bool:
        """Whether a local time is in the window."""
        minute = local.hour * 60 + local.minute
        start, end = _minutes(self.start), _minutes(self.end)
        today, yesterday = DAYS[local.weekday()], DAYS[local.weekday() - 1]
        if end > start:
            return today in self.days and start <= minute < end
        return (today in self.days and minute >= start) or (yesterday in self.days and minute < end)


def local_time(now: datetime, zone: str) -> datetime:
    """The time in a zone of the IANA database. Raises `UnknownTimeZone`."""
    try:
        return now.astimezone(ZoneInfo(zone))
    except (OSError, ValueError, LookupError) as error:
        raise UnknownTimeZone(f"{zone[:80]!r} is not a time zone known here, as Europe/Zurich would be") from error


def soon_or_now(window: Window, now: datetime, zone: str, ahead: timedelta) -> bool:
    """Whether a window holds now or begins within `ahead`. Raises `UnknownTimeZone`."""
    if window.holds(local_time(now, zone)):
        return True
    step, last = timedelta(minutes=1), min(ahead, timedelta(days=1))
    return any(window.holds(local_time(now + step * i, zone)) for i in range(1, int(last / step) + 1))


def zone_causes(zone: str, path: str) -> Iterator[Cause]:
    """What is wrong with the name of a zone."""
    try:
        ZoneInfo(zone)
    except (OSError, ValueError, LookupError):
        message = f"{zone[:80]!r} is not a time zone known here, as Europe/Zurich would be"
        yield Cause(path, "FieldValueInvalid", message)


def _minutes(text: str) -> int:
    hours, minutes = text.split(":")
    return int(hours) * 60 + int(minutes)
