"""How a lab in CML shows whose it is: its title names the request, its notes the installation and the try.

The title is what labs are found by: a uid is never given twice, so a lab of that title is the request's. The mark at
the end of the notes tells a try from the one before it, and one installation's labs from another's where no request
claims them. People can edit both: what is unreadable is nobody's, and never removed as a stray; and a mark alone makes
no lab ours, since whoever may make labs may write one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from controllers.instances.kind import LabInstanceRequest

_UID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_TITLE = re.compile(rf"lrm-({_UID})")
_MARK = re.compile(rf"^lrm installation=(\S+) uid=({_UID}) attempt=(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Mark:
    """What the notes say."""

    installation: str
    uid: str
    attempt: int


def notes_for(request: LabInstanceRequest, installation: str) -> str:
    """Notes for its lab: whose it is, its environment for whoever works in it, and the mark."""
    environment = [f"{name}={value}" for name, value in sorted(request.spec.environment.items())]
    mark = f"lrm installation={installation} uid={request.uid} attempt={request.status.attempt}"
    told = [f"Made by lrm for {request.namespace}/{request.name}.", "\n".join(environment), mark]
    return "\n\n".join(part for part in told if part)


def read_mark(notes: str) -> Mark | None:
    """The last mark in a lab's notes: ours stands at their end."""
    found = [Mark(m[1], m[2], int(m[3])) for m in _MARK.finditer(notes)]
    return found[-1] if found else None


def uid_of_title(title: str) -> str | None:
    """The uid that a lab's title names, None for a title of another form."""
    match = _TITLE.fullmatch(title)
    return match[1] if match else None
