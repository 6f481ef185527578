"""What `lrm dev` tells its daemon."""

from __future__ import annotations

from pathlib import Path

from controllers.plugin import DEV_SERVICES
from lrm.devstack import daemon_environment
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
