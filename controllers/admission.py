"""What the API says about a worker, a pool or an import before it is stored: whether its place may be named there.

A courtesy to people: whoever writes otherwise is refused by `controllers.aws` when it comes to asking AWS. What is
stored already stands in the way of no other change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from controllers.aws.place import Place
from controllers.aws.regions import known_regions
from controllers.aws.settings import AwsSettings
from controllers.imports.kind import LabWorkerImport
from controllers.pools.kind import LabWorkerPool
from controllers.workers.kind import LabWorker
from lrm.admission import Admission, Admit
from lrm.errors import Cause


def place_admission(settings: AwsSettings) -> Admission:
    """For `Plugin.admission`."""
    regions = frozenset(settings.aws_regions) or known_regions()

    def judge(place_of: Callable[[Any], Place], spec: str) -> Admit:
        def admit(new: Any, old: Any) -> Iterator[Cause]:
            place = place_of(new)
            if old is not None and place_of(old) == place:
                return
            if place.region not in regions:
                message = "it is not among the AWS regions that may be named (LRM_AWS_REGIONS)"
                yield Cause(f"{spec}.region", "FieldValueNotSupported", message)
            account = settings.aws_accounts.get(place.account)
            if account is not None and not account.serves(new.namespace):
                message = f"namespace {new.namespace} may not name this AWS account (LRM_AWS_ACCOUNTS)"
                yield Cause(f"{spec}.account", "FieldValueForbidden", message)

        return admit

    return {
        LabWorker: judge(lambda worker: worker.spec.place, "spec"),
        LabWorkerPool: judge(lambda pool: pool.spec.template.spec.place, "spec.template.spec"),
        LabWorkerImport: judge(lambda of: of.spec.place, "spec"),
    }
