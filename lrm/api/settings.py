"""What can be set about the API; the daemon fills it from its own settings."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class ApiSettings(BaseModel):
    """Sizes in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to serve on; other than loopback needs a tokens file.")
    port: int = Field(8000, ge=0, le=65535, description="Port to serve on; 0 takes a free one.")
    tls_cert: Path | None = Field(None, description="Certificate chain, PEM; taken anew when the file changes.")
    tls_key: Path | None = Field(None, description="Key of the certificate, PEM.")
    tokens_file: Path | None = Field(
        None, description="YAML list of {name, sha256, role, namespaces}; without it only loopback is served, as admin."
    )
    audit_file: Path | None = Field(None, description="Append-only record of writes and refusals, JSON lines.")
    max_body_bytes: int = Field(1024 * 1024, ge=1024, description="Largest request body; the store takes 1 MiB values.")
    body_seconds: float = Field(30.0, gt=0, description="For a request body to arrive: a slow sender holds nothing.")
    max_in_flight: int = Field(400, ge=1, description="Requests at once, watches aside; more are told 429.")
    max_watches: int = Field(1000, ge=1, description="Watches at once; more are told 429.")
    max_documents: int = Field(500, ge=1, description="Documents in one POST; one request stays a matter of seconds.")
    watch_seconds: float = Field(
        3600.0, gt=0, description="A watch without timeoutSeconds ends after one to two of it."
    )
    write_seconds: float = Field(
        60.0, gt=0, description="A watcher that takes nothing for so long is cut off; its history has gone by then."
    )
    barrier_seconds: float = Field(3.0, gt=0, description="A consistent list waits so long for the cache, then 504.")
