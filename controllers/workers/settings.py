"""Settings of the workers' part: how often to look, how long to wait, and the brakes.

Deadlines are counted from timestamps in the status, so they outlive a restart.
"""

from __future__ import annotations

import string

from pydantic import Field, field_validator

from lrm.settings import LrmSettings, Seconds

_TEMPLATE_FIELDS = frozenset({"instance_id", "public_ip", "private_ip", "name"})


class WorkerSettings(LrmSettings):
    """What the workers' controller and the CML sessions can be told."""

    worker_poll_interval: Seconds = Field(5.0, description="Seconds between looks at a worker that is on its way.")
    worker_rest_interval: Seconds = Field(
        60.0, description="Seconds between looks at a worker at rest; the health check's period."
    )
    worker_examine_interval: Seconds = Field(
        300.0,
        description="Longest seconds between two times that a CML at rest is asked everything; at each look between "
        "them one question tells that it answers, that it is ours and that it is licensed.",
    )
    worker_ec2_deadline: Seconds = Field(
        600.0, description="Seconds for EC2 to launch, start or stop; a metal host's launch takes minutes."
    )
    worker_boot_deadline: Seconds = Field(
        1500.0, description="Seconds for CML to boot on a running instance; 15 to 20 minutes are usual on metal."
    )
    worker_license_deadline: Seconds = Field(
        120.0, description="Seconds for a registration or a deregistration; Cisco's own script waits as long."
    )
    worker_trace_timeout: Seconds = Field(
        600.0,
        description="Seconds without a trace after which a launch whose answer was lost is taken for not made; far "
        "more than a lost request can wait anywhere, and than EC2's views need to agree.",
    )
    worker_gone_after: Seconds = Field(
        300.0,
        description="Seconds after its first sight from which EC2's word that an instance does not exist is believed; "
        "before, it may be a view that lags (AWS advises to retry for up to 5 minutes).",
    )
    worker_idle_interval: Seconds = Field(
        300.0,
        description="Longest seconds between questions whether a worker with idleDetection is used: CML answers with "
        "its whole history. A quarter of the worker's timeoutMinutes where that is less.",
    )
    max_instances: int = Field(
        20, ge=0, description="Most instances that this installation has at once; a brake on mistakes, they cost."
    )
    cml_url_template: str = Field(
        "",
        description="Address of a worker's CML without /api/v0, with {instance_id}, {public_ip}, {private_ip} and "
        "{name}; empty is https:// and its address. spec.cml.apiBaseUrl wins over it.",
    )
    cml_allow_plain_http: bool = Field(
        False, description="Allow http:// beyond loopback, where passwords can be read on the way."
    )

    @field_validator("cml_url_template")
    @classmethod
    def _known_fields(cls, value: str) -> str:
        try:
            used = {name for _, name, _, _ in string.Formatter().parse(value) if name is not None}
        except ValueError as error:
            raise ValueError(f"cml_url_template cannot be read: {error}") from error
        if used - _TEMPLATE_FIELDS:
            raise ValueError(f"cml_url_template knows {', '.join(sorted(_TEMPLATE_FIELDS))}; not {used}")
        return value
