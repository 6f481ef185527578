"""What a worker's status says of a sync that failed: in words, and for as long as they hold."""

from __future__ import annotations

import pytest

from controllers.cml.errors import CmlBadAnswer, CmlCircuitOpen, CmlClosed, CmlError, CmlLoginThrottled
from controllers.labs.controller import problem_of
from controllers.workers.kind import LabWorker, LabWorkerSpec
from lrm.resource import ObjectMeta


@pytest.mark.parametrize(
    ("error", "before", "told"),
    [
        (CmlCircuitOpen(9.7), None, "CML was unreachable several times in a row; it is asked again in a while"),
        (CmlLoginThrottled(60), None, "CML refused these credentials; it is asked again in a while"),
        (CmlCircuitOpen(9.7), "cut off", "cut off"),
        (CmlClosed(), "cut off", "cut off"),
        (CmlBadAnswer(500, "no JSON"), "cut off", "CML gave an unusable answer (500): no JSON"),
    ],
)
def test_what_was_not_even_asked_is_told_in_words_unless_more_is_known(
    error: CmlError, before: str | None, told: str
) -> None:
    spec = LabWorkerSpec.model_validate({"region": "us-east-1", "aws": {"amiId": "ami-12345678"}})
    worker = LabWorker(metadata=ObjectMeta(name="w1"), spec=spec)
    worker.status.labs_sync_error = before
    assert problem_of(error, worker) == told
