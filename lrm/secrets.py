"""Secrets by reference: a resource names an environment variable or a file, and only names on an allow-list are read.

The value goes to whoever asked and nowhere else; errors name the reference, never the value.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self

from pydantic import model_validator

from lrm.errors import LrmError
from lrm.model import Model


class SecretRef(Model):
    """`{env: NAME}` or `{file: PATH}`."""

    env: str | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.env is None) == (self.file is None):
            raise ValueError("name exactly one of env and file")
        return self

    def __str__(self) -> str:
        return f"env {self.env}" if self.env is not None else f"file {self.file}"


class SecretRefused(LrmError):  # noqa: N818 - it says what happened
    """The reference is not on the allow-list, or there is nothing at it."""


class Secrets:
    """Reads references; `allow` has environment names and file globs (`*` does not cross `/`)."""

    def __init__(self, allow: Sequence[str]) -> None:
        self._allow = tuple(allow)

    def read(self, ref: SecretRef) -> str:
        """The secret, without a trailing newline. Raises `SecretRefused`."""
        return self._env(ref.env) if ref.env is not None else self._file(ref.file or "")

    def _env(self, name: str) -> str:
        if name not in self._allow:
            raise SecretRefused(f"env {name} is not on the list of secrets that resources may name (LRM_SECRETS_ALLOW)")
        value = os.environ.get(name, "")
        if not value:
            raise SecretRefused(f"env {name} is not set where lrm runs")
        return value

    def _file(self, name: str) -> str:
        path = Path(name)
        real = path.resolve()
        if not path.is_absolute() or not any(_matches(str(real), glob) for glob in self._allow if glob.startswith("/")):
            raise SecretRefused(
                f"file {name} is not on the list of secrets that resources may name (LRM_SECRETS_ALLOW)"
            )
        try:
            value = real.read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SecretRefused(f"file {name} cannot be read: {type(error).__name__}") from error
        if not value:
            raise SecretRefused(f"file {name} is empty")
        return value


def _matches(path: str, glob: str) -> bool:
    parts, globs = path.split("/"), glob.split("/")
    return len(parts) == len(globs) and all(fnmatchcase(p, g) for p, g in zip(parts, globs, strict=True))
