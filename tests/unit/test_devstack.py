"""What `lrm dev` tells its daemon and its simulators."""

from __future__ import annotations

from pathlib import Path

import pytest

from controllers.aws.simulator.__main__ import options
from controllers.cml.simulator.command import parse
from controllers.plugin import DEV_SERVICES, plugin
from lrm.devstack import DevStack, ProcessError, daemon_environment
from lrm.plugin import DevPlan


def test_settings_that_a_person_has_set_stay_and_where_things_are_is_not_theirs_to_say() -> None:
    plan = DevPlan({"aws": 1, "cml": 2}, Path("/nowhere"))
    ours = {
        "LRM_LABS_REFRESH_INTERVAL": "1800",
        "AWS_ENDPOINT_URL": "https://ec2.example.com",
        "AWS_ACCESS_KEY_ID": "own",
    }
    told: dict[str, str] = {}
    for service in DEV_SERVICES:
        told |= daemon_environment(service, plan, ours)
    assert told["LRM_LABS_REFRESH_INTERVAL"] == "1800"
    assert told["LRM_LABS_STEP_INTERVAL"] == "0.5"
    assert told["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"
    assert told["AWS_ACCESS_KEY_ID"] != "own", "a slip of the endpoint must not reach a real account"


def test_a_person_chooses_how_long_the_simulators_take() -> None:
    plan = DevPlan({"aws": 1, "cml": 2}, Path("/nowhere"))
    aws, cml = DEV_SERVICES
    chosen = DevStack([plugin], simulators=["aws --delay 10", "cml --boot-not-ready 30", "aws --describe-lag 4"])
    told = options(chosen.arguments(aws, plan))
    assert (told.delay, told.describe_lag, told.port) == (10, 4, 1)
    assert parse(chosen.arguments(cml, plan)).boot_not_ready == 30
    assert options(DevStack([plugin]).arguments(aws, plan)).delay == 1


@pytest.mark.parametrize("text", ["mars --delay 1", "", "aws '"])
def test_options_of_no_simulator_are_refused(text: str) -> None:
    with pytest.raises(ProcessError, match="begin with one of aws, cml"):
        DevStack([plugin], simulators=[text])
