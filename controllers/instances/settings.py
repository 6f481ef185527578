"""Settings of the lab instances' part: limits, deadlines, quotas, and where containers run."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from controllers.instances.quantity import LEAST_CORES, Bytes, Cores
from lrm.settings import LrmSettings, Seconds, Words


def _address(value: str) -> str:
    """Raise ValueError for what is no IP address: the engine takes no other, and would refuse every container."""
    return str(ip_address(value))


class InstanceSettings(LrmSettings):
    """Read from the same environment and file as the daemon's own settings."""

    instances_longest_minutes: int = Field(
        480, ge=1, le=7 * 24 * 60, description="Minutes that a lab may be asked to run, extensions included; 8 hours."
    )
    instances_early_start: Seconds = Field(
        300.0,
        description="Seconds before its scheduled start at which a lab may begin; its duration counts from the start.",
    )
    instances_placement: Literal["BestFit", "LeastUsed", "RoundRobin"] = Field(
        "BestFit",
        description="Which of the workers that fit is taken: the fullest, which lets others be stopped; the emptiest; "
        "or each in turn.",
    )
    instances_provisioning_timeout: Seconds = Field(
        900.0, description="Seconds from its place to Running; a big CML lab boots for ten minutes."
    )
    instances_stopping_timeout: Seconds = Field(
        600.0, description="Seconds for cleaning up, after which a lab is Failed; cleaning up goes on."
    )
    instances_retries: int = Field(
        3, ge=0, le=100, description="Times that a lab begins again after a failure that another try may mend."
    )
    instances_retry_delay: Seconds = Field(
        10.0, description="Seconds before the first of them; doubled each time, 5 minutes at most."
    )
    instances_step_interval: Seconds = Field(
        2.0, description="Seconds between two looks at a CML lab that is being started, stopped, wiped or deleted."
    )
    instances_rest_interval: Seconds = Field(
        60.0, description="Seconds between two looks at a CML lab that runs; what its sync tells is heard at once."
    )
    instances_most_per_student: int = Field(
        5, ge=0, description="Lab instances of one student in a namespace that wait or run; 0 is no limit."
    )
    instances_most_per_namespace: int = Field(
        0, ge=0, description="Lab instances in one namespace that wait or run; 0 is no limit."
    )
    topology_files: Words = Field(
        (), description="Globs of files that a template may name; `*` does not cross `/`. None unless said."
    )
    topology_urls: Words = Field(
        (), description="Beginnings of addresses that a template may name, host and `/` included. None unless said."
    )

    docker_host: str = Field(
        "",
        pattern=r"^((unix:///|tcp://|https?://)\S+)?$",
        description="The engine for containers, unix:///path or tcp://host:port; empty: there is none.",
    )
    docker_cpu: Cores = Field(
        0, ge=0, description="Cores that labs on the engine may reserve in all; 0: as many as it has."
    )
    docker_memory: Bytes = Field(0, ge=0, description="Bytes that they may reserve in all; 0: as many as it has.")
    docker_slots: int = Field(500, ge=0, description="Labs on the engine at the same time.")
    docker_default_cpu: Cores = Field(0.5, ge=LEAST_CORES, description="Cores of a lab that names none.")
    docker_default_memory: Bytes = Field(256 * 1024**2, ge=6 * 1024**2, description="Bytes of a lab that names none.")
    docker_default_pids: int = Field(256, ge=1, description="Processes and threads of a lab that names none.")
    docker_most_pids: int = Field(4096, ge=1, description="Processes and threads that a lab may name, at most.")
    docker_check_interval: Seconds = Field(
        5.0, description="Seconds between two of a lab's health checks that it may name, at least."
    )
    docker_pull: Literal["IfNotPresent", "Always", "Never"] = Field(
        "IfNotPresent", description="Whether images are pulled, where a template does not say."
    )
    docker_pull_timeout: Seconds = Field(600.0, description="Seconds for the pull of one image.")
    docker_publish: Annotated[str, AfterValidator(_address)] = Field(
        "127.0.0.1", description="Address of the engine's machine on which ports are published; loopback unless said."
    )
    docker_public_host: str = Field(
        "", description="Name by which students reach that address, for access URLs; empty: the address itself."
    )
    docker_stop_grace: float = Field(5.0, ge=0, le=300, description="Seconds that a container has for its own end.")
