"""Which wish of a record is open: a table of specs, statuses and whys."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from controllers.labs.kind import (
    DESIRED_STATE,
    PAST_OPERATIONS,
    Acting,
    LabRecord,
    LabRecordSpec,
    LabRecordStatus,
    Operation,
    OperationOutcome,
)
from controllers.labs.wishes import open_wish, outcome_of, tell_operation, unsettled, withdraw
from lrm.resource import ObjectMeta

NOW = datetime(2026, 1, 1, tzinfo=UTC)
START = {"id": "1", "verb": "Start"}


def told(name: str, result: str) -> OperationOutcome:
    return OperationOutcome(id=name, verb="Start", result=result, at=NOW)


def record(
    generation: int, spec: dict[str, Any], condition: tuple[bool | None, int] | None, **status: Any
) -> LabRecord:
    """`condition` is the status of DesiredState and the generation that it tells of."""
    made = LabRecord(
        metadata=ObjectMeta(name="w1-x", generation=generation, creation_timestamp=NOW),
        spec=LabRecordSpec.model_validate({"workerRef": "w1", "labId": "x", **spec}),
        status=LabRecordStatus(**status),
    )
    if condition is not None:
        made.status.set_condition(DESIRED_STATE, condition[0], "Test", "", now=NOW, generation=condition[1])
    return made


@pytest.mark.parametrize(
    ("made", "wish", "why"),
    [
        (record(1, {}, None), "", "nothing was ever wished"),
        (record(2, {"desiredState": "STOPPED"}, None, observed_generation=1), "STOPPED", "it is new"),
        (
            record(2, {"desiredState": "STOPPED"}, (None, 2), observed_generation=1, acted_state="STOPPED"),
            "STOPPED",
            "it was taken up, and is under way",
        ),
        (
            record(2, {"desiredState": "STOPPED"}, (True, 2), observed_generation=2, acted_state="STOPPED"),
            "",
            "it was reached",
        ),
        (record(2, {"operation": START}, None, observed_generation=1), "1", "the operation is new"),
        (
            record(2, {"operation": START}, (None, 2), observed_generation=1, operation=told("1", "Running")),
            "1",
            "it is under way",
        ),
        (
            record(2, {"operation": START}, (True, 2), observed_generation=1, operation=told("1", "Failed")),
            "",
            "it has ended",
        ),
        (
            record(3, {"operation": START}, (True, 2), observed_generation=2, operation=told("0", "Succeeded")),
            "1",
            "another one has ended",
        ),
        (
            record(
                3,
                {"operation": START, "desiredState": "STOPPED"},
                (None, 2),
                observed_generation=1,
                acted_state="STOPPED",
            ),
            "1",
            "it is newer than the desiredState under way",
        ),
        (
            record(
                3,
                {"operation": START, "desiredState": "STOPPED"},
                (True, 3),
                observed_generation=1,
                acted_state="STOPPED",
                operation=told("1", "Succeeded"),
            ),
            "",
            "the operation has taken the place of the desiredState that was under way",
        ),
        (
            record(
                3,
                {"operation": START, "desiredState": "STOPPED"},
                (True, 3),
                observed_generation=1,
                operation=told("1", "Succeeded"),
            ),
            "STOPPED",
            "both came together, and the desiredState was never taken up",
        ),
        (
            record(4, {"desiredState": "STOPPED"}, (None, 3), observed_generation=2, acted_state="STOPPED"),
            "",
            "an operation was withdrawn; the desiredState is an old one",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_the_open_wish(made: LabRecord, wish: str, why: str) -> None:
    found = open_wish(made)
    told_as = "" if found is None else found.operation.id if found.operation else found.state
    assert told_as == wish, why
    assert unsettled(made) or not wish


def test_the_steps_of_another_wish_do_not_count() -> None:
    made = record(2, {"operation": START}, None)
    made.status.acting = Acting(generation=2, since=NOW, step="Starting", operation="0")
    wish = open_wish(made)
    assert wish is not None
    assert wish.acting(made) is None
    made.status.acting.operation = "1"
    assert wish.acting(made) is made.status.acting


def test_a_past_operation_again_is_told_its_old_end_and_not_carried_out_again() -> None:
    """A manifest that is applied again after somebody else's order must not wipe the lab again."""
    made = record(2, {"operation": {"id": "a", "verb": "Wipe"}}, None)

    def ask(name: str, verb: str) -> Operation:
        made.spec.operation = Operation(id=name, verb=verb)  # type: ignore[arg-type]
        made.metadata.generation = (made.metadata.generation or 0) + 1
        return made.spec.operation

    tell_operation(made, ask("a", "Wipe"), "Failed", "the reason", NOW)
    tell_operation(made, ask("b", "Start"), "Running", "", NOW)
    ask("a", "Wipe")
    assert (open_wish(made), unsettled(made)) == (None, True)
    withdraw(made, NOW)
    told_of = {name: outcome_of(made, name) for name in "ab"}
    assert {name: told and told.result for name, told in told_of.items()} == {"a": "Failed", "b": "Superseded"}
    assert made.status.operation == told_of["a"]
    for n in range(PAST_OPERATIONS):
        tell_operation(made, ask(str(n), "Start"), "Succeeded", "m" * 500, NOW)
    assert made.status.past_operations[0].id == "a"
    assert len(made.status.past_operations) == PAST_OPERATIONS
    assert len(made.status.past_operations[-1].message) == 100
    tell_operation(made, ask("last", "Start"), "Succeeded", "", NOW)
    ask("a", "Wipe")
    assert open_wish(made) is not None, "nobody remembers it"


def test_what_is_told_of_an_operation_that_another_one_has_replaced() -> None:
    made = record(2, {"operation": START}, None)
    assert outcome_of(made, "1") is None
    superseded = outcome_of(made, "0")
    assert superseded is not None
    assert superseded.result == "Superseded"
    assert made.spec.operation is not None
    later = datetime(2026, 1, 2, tzinfo=UTC)
    tell_operation(made, made.spec.operation, "Running", "a", NOW)
    tell_operation(made, made.spec.operation, "Running", "b", later)
    running = outcome_of(made, "1")
    assert running is not None
    assert (running.message, running.at) == ("b", NOW)
