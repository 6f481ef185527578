"""The regions of AWS: those that botocore knows of, in all partitions. Called by `accounts`, admission, sweep."""

from __future__ import annotations

import functools

import botocore.loaders
import botocore.session

LOADER = botocore.loaders.create_loader()
"""Reads and keeps botocore's descriptions of the services: 0.2 s and many megabytes each, once per process."""


@functools.cache
def known_regions() -> frozenset[str]:
    """Where EC2 is, as far as this version of botocore knows. It takes 0.2 s, once."""
    core = botocore.session.Session()
    core.register_component("data_loader", LOADER)
    partitions = core.get_available_partitions()
    return frozenset(region for partition in partitions for region in core.get_available_regions("ec2", partition))
