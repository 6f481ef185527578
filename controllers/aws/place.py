"""Where a call to AWS goes: a region of an account.

An account is a short name that resources carry; the settings say what it means (`accounts`). The empty one is the
daemon's own credentials. Called by all that asks AWS.
"""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """A region of an account; what is in one place is invisible from every other."""

    region: str
    account: str = ""

    def __str__(self) -> str:
        return f"{self.account}/{self.region}" if self.account else self.region
