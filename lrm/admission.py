"""What a plug-in says about an object before it is stored: limits that settings set, and what only the cache can tell.

A kind's own rules (`Kind.validate`) are pure and hold for every writer. Admission is the API's courtesy to people: it
looks at settings and at the cache, which may be behind, so whatever must hold is decided again by a controller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lrm.errors import Cause
from lrm.resource import AnyResource

Admit = Callable[[Any, Any], Iterable[Cause | str]]
"""`(new, old)`, old None for a new object → causes, which refuse it, and texts, which are told as warnings.

May raise `Forbidden` for what is right in form and not allowed.
"""
Admission = Mapping[type[Any], Admit]
"""By the model of the kind."""


def admit(admission: Admission, new: AnyResource, old: AnyResource | None) -> tuple[list[Cause], list[str]]:
    """Causes and warnings for an object that a person wants to store. Raises `Forbidden`."""
    ask = admission.get(type(new))
    told = list(ask(new, old)) if ask else []
    return [t for t in told if isinstance(t, Cause)], [t for t in told if isinstance(t, str)]
