"""Settings: `LRM_` environment variables over a YAML file (`LRM_CONFIG`) over the defaults here.

Every field tells its unit, and why its default is what it is. Plug-ins bring settings classes of their own on the same
base, so one file and one prefix serve all. Durations are seconds, fractions allowed, or `90s`, `30m`, `2h`.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_serializer, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from lrm.lease import check_times

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*")
_ROOT = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}


def parse_duration(value: Any) -> Any:
    """Seconds from a number or from `90s`, `30m`, `2h`. Raises ValueError with an example."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value)
    if not match:
        raise ValueError(f"{value!r} is not a duration; write seconds, or 90s, 30m, 2h")
    return float(match[1]) * _UNITS[match[2]]


def split_commas(value: Any) -> Any:
    """A tuple from `a, b, c`. Raises ValueError for JSON, which would be one strange word."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        raise ValueError("write it as a, b, c: words with commas between them, not JSON")
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
"""A duration above zero, in seconds."""
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)]
"""A comma-separated list."""


def _check_url(name: str, value: str, schemes: tuple[str, ...]) -> None:
    """Raise ValueError, which does not repeat what may hold a password."""
    try:
        url = urlsplit(value)
        fits = url.scheme in schemes and bool(url.path if url.scheme == "unix" else url.hostname)
        _ = url.port
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} takes URLs that begin with {' or '.join(f'{s}://' for s in schemes)}")


class LrmSettings(BaseSettings):
    """Base of all settings classes: where values come from. Plug-ins subclass it."""

    model_config = SettingsConfigDict(env_prefix="LRM_", extra="ignore", frozen=True, validate_default=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the YAML file."""
        del dotenv_settings, file_secret_settings
        path = os.environ.get("LRM_CONFIG")
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"LRM_CONFIG names {path}, which is not a file")
        yaml = (YamlConfigSettingsSource(settings_cls, yaml_file=path),) if path else ()
        return (init_settings, env_settings, *yaml)


class Settings(LrmSettings):
    """The daemon's own settings."""

    etcd_endpoints: Words = Field(
        ("http://127.0.0.1:2379",),
        description="URLs of the etcd members, comma-separated. Default: one on this machine.",
    )
    etcd_root: str = Field(
        "/lrm", description="Key prefix of this installation; two may share an etcd and a Redis under different ones."
    )
    etcd_ca: Path | None = Field(None, description="CA certificates that sign the members' certificates, PEM.")
    etcd_cert: Path | None = Field(None, description="Client certificate, PEM.")
    etcd_key: Path | None = Field(None, description="Key of the client certificate, PEM.")
    etcd_user: str = Field("", description="etcd user; empty where etcd's authentication is off.")
    etcd_password_file: Path | None = Field(None, description="File that holds the etcd user's password.")
    etcd_timeout: Seconds = Field(5.0, description="Seconds for one etcd request; an election round trip is under 2.")
    etcd_silence: Seconds = Field(
        10.0,
        description="Seconds without a message before the watch is probed by a barrier; etcd gives no sign itself.",
    )
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="Redis for watch bookmarks; work goes on without it. Empty: they last as long as the process.",
    )

    api_host: str = Field("127.0.0.1", description="Address to serve on; other than loopback needs a tokens file.")
    api_port: int = Field(8000, ge=0, le=65535, description="Port to serve on; 0 takes a free one.")
    tls_cert: Path | None = Field(None, description="Certificate chain of the API, PEM; reloaded when it changes.")
    tls_key: Path | None = Field(None, description="Key of the API's certificate, PEM.")
    auth_tokens_file: Path | None = Field(None, description="YAML list of {name, sha256, role, namespaces}.")
    audit_file: Path | None = Field(None, description="Append-only record of every write, one JSON object a line.")
    max_body_bytes: int = Field(1024 * 1024, ge=1024, description="Largest request body, bytes; etcd takes 1.5 MiB.")

    instance_id: str = Field(
        default_factory=socket.gethostname, min_length=1, description="Name of this daemon; unique in the installation."
    )
    leader: Literal["lease", "static"] = Field(
        "lease",
        description="lease: daemons elect one of them for each lock. static: one daemon an installation; it takes the"
        " locks from whoever had them, at once also after a crash.",
    )
    lease_duration: Seconds = Field(
        15.0, description="Seconds after which another daemon takes over from one that died; whole seconds, 3 at least."
    )
    renew_deadline: Seconds = Field(
        10.0,
        description="Seconds that leadership is trusted after its last renewal; a call that creates something outside"
        " takes half at most. With retry_period it stays below lease_duration - 1 s.",
    )
    retry_period: Seconds = Field(
        2.0, description="Seconds between renewals: one small request each, for all the locks of a daemon."
    )
    bookmark_every: Seconds = Field(
        1.0, description="Least seconds between two saves of bookmarks to Redis; a crash repeats as much, no more."
    )
    compact: bool = Field(True, description="Compact etcd's history; switch off where etcd does it by itself.")
    compact_every: Seconds = Field(300.0, description="Seconds between compactions.")
    compact_retention: Seconds = Field(
        3600.0, description="Seconds of history that stay: for so long a watch can be resumed without listing again."
    )
    etcd_quota_bytes: int = Field(
        2 * 1024**3,
        gt=0,
        description="etcd's quota, bytes, where its members do not tell it; 2 GiB is its own default.",
    )
    observe_only: bool = Field(False, description="Change nothing outside; status is still written.")
    stop_timeout: Seconds = Field(30.0, description="Seconds for a graceful stop before the process ends anyway.")

    plugins: Words = Field((), description="Modules with a `plugin`; empty loads every `lrm.plugins` entry point.")
    secrets_allow: Words = Field(
        (), description="Environment names and file globs that resources may refer to; none unless said."
    )
    log_format: Literal["console", "json"] = Field("console", description="console for people, json for collectors.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is written.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if not self.etcd_endpoints:
            raise ValueError("etcd_endpoints names no endpoint")
        for endpoint in self.etcd_endpoints:
            _check_url("etcd_endpoints", endpoint, ("http", "https"))
        if self.redis_url:
            _check_url("redis_url", self.redis_url, ("redis", "rediss", "unix"))
        check_times(self.lease_duration, self.renew_deadline, self.retry_period)
        return self

    @field_validator("etcd_root")
    @classmethod
    def _root(cls, value: str) -> str:
        root = value.rstrip("/")
        if not _ROOT.fullmatch(root):
            raise ValueError("etcd_root is an absolute path of letters, digits, '.', '_' and '-', such as /lrm")
        return root

    @field_serializer("redis_url")
    def _masked(self, url: str) -> str:
        return re.sub(r"(://[^:/@]*:)[^@]+@", r"\1***@", url)

    def etcd_password(self) -> str:
        """The etcd password, read anew each time so that a rotated one is taken."""
        return self.etcd_password_file.read_text().strip() if self.etcd_password_file else ""


__all__ = ["LrmSettings", "Seconds", "SecretStr", "Settings", "Words", "parse_duration", "split_commas"]
