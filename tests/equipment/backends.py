"""A backend of the storage contract as a test sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from storage.base import Storage


@dataclass(frozen=True)
class Backend:
    """One store, below a root of the test's own; `client` opens another client of it."""

    name: str
    store: Storage
    root: str
    client: Callable[[str], Storage]

    @property
    def is_memory(self) -> bool:
        return self.name == "memory"

    def key(self, name: str) -> str:
        return f"{self.root}/r/{name}"

    @property
    def prefix(self) -> str:
        return f"{self.root}/r/"
