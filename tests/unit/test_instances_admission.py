"""What people are told before a lab instance is stored: what settings refuse, with its field, and what they warn of."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from controllers.instances.admission import admission
from controllers.instances.kind import LabInstanceRequest, LabInstanceRequestSpec
from controllers.plugin import ControllersSettings, plugin
from equipment.placing_scene import TOPOLOGY, PlacingScene, placing_scene
from lrm.admission import admit
from lrm.errors import Forbidden
from lrm.resource import ObjectMeta

URLS = {"topology_urls": ("https://git.example.com/labs/",)}


def request(*, namespace: str = "default", **spec: Any) -> LabInstanceRequest:
    wanted = {"labTemplate": "lab:1", "studentEmail": "ann@x.edu", "durationMinutes": 60, **spec}
    meta = ObjectMeta(name="new", namespace=namespace)
    return LabInstanceRequest(metadata=meta, spec=LabInstanceRequestSpec.model_validate(wanted))


def ask(
    scene: PlacingScene, new: LabInstanceRequest, old: LabInstanceRequest | None = None
) -> tuple[list[str], list[str]]:
    """The fields that are refused, and the warnings."""
    causes, warnings = admit(admission(scene.settings, scene.cache, scene.clock), new, old)
    assert all(cause.message for cause in causes)
    return [cause.field for cause in causes], warnings


def topology(url: str) -> dict[str, Any]:
    return {"labTemplate": {"topologyUrl": url}}


def checked_every(seconds: float) -> dict[str, Any]:
    return {"labTemplate": {"image": "lab:1", "healthCheck": {"command": ["ok"], "intervalSeconds": seconds}}}


@pytest.mark.parametrize(
    ("spec", "field", "why"),
    [
        ({"durationMinutes": 480}, "", "the longest that is allowed"),
        ({"durationMinutes": 481}, "spec.durationMinutes", "a minute too long"),
        ({"labTemplate": {"topology": TOPOLOGY}}, "", "a topology"),
        ({"labTemplate": {"topology": "lab: [\n"}}, "spec.labTemplate.topology", "no YAML"),
        ({"labTemplate": {"topology": '{"lab": '}}, "spec.labTemplate.topology", "no JSON"),
        ({"labTemplate": {"topology": "lab: {title: t}\n"}}, "spec.labTemplate.topology", "no nodes"),
        (topology("https://git.example.com/labs/one.yaml"), "", "below what is listed"),
        (topology("https://GIT.example.com:443/labs/one.yaml"), "", "the same server in other words"),
        (topology("http://git.example.com/labs/one.yaml"), "spec.labTemplate.topologyUrl", "another scheme"),
        (topology("https://git.example.com/other/one.yaml"), "spec.labTemplate.topologyUrl", "another path"),
        (topology("https://git.example.com/labs/../other"), "spec.labTemplate.topologyUrl", "a step up"),
        (topology("https://git.example.com/labs/%2e%2e/other"), "spec.labTemplate.topologyUrl", "a hidden step up"),
        (topology("https://git.example.com.evil.org/labs/"), "spec.labTemplate.topologyUrl", "a look-alike host"),
        (topology("https://git.example.com:8443/labs/"), "spec.labTemplate.topologyUrl", "another port"),
        ({"resources": {"pids": 4096}}, "", "as many processes as are allowed"),
        ({"resources": {"pids": 4097}}, "spec.resources.pids", "one too many"),
        (checked_every(5), "", "as often as is allowed"),
        (checked_every(4.9), "spec.labTemplate.healthCheck.intervalSeconds", "more often"),
        (
            {"labTemplate": {"topologyFile": "/etc/passwd"}},
            "spec.labTemplate.topologyFile",
            "a file that is not listed",
        ),
    ],
)
async def test_what_settings_do_not_allow_is_refused_with_its_field(spec: dict[str, Any], field: str, why: str) -> None:
    async with placing_scene(lead=False, **URLS) as scene:
        assert ask(scene, request(**spec)) == ([field] if field else [], []), why


async def test_a_file_is_judged_by_its_name_without_a_look_at_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "labs").symlink_to("/nowhere")
    async with placing_scene(lead=False, topology_files=(f"{tmp_path}/labs/*.yaml",)) as scene:
        for name, refused in (
            ("labs/one.yaml", False),
            ("labs/deep/../one.yaml", False),
            ("labs/../secret.yaml", True),
            ("labs/deep/one.yaml", True),
            ("labs/one.txt", True),
        ):
            fields, _ = ask(scene, request(labTemplate={"topologyFile": f"{tmp_path}/{name}"}))
            assert bool(fields) == refused, name


async def test_a_start_in_the_past_is_accepted_with_a_warning() -> None:
    async with placing_scene(lead=False) as scene:
        past = request(scheduledStartTime=scene.clock.now() - timedelta(hours=1))
        assert ask(scene, past) == (
            [],
            ["spec.scheduledStartTime: 2025-12-31T23:00:00Z is past: the lab starts as soon as there is a place"],
        )
        assert ask(scene, request(scheduledStartTime=scene.clock.now() + timedelta(hours=1))) == ([], [])
        assert ask(scene, past, past) == ([], [])


async def test_a_start_more_than_a_year_ahead_is_refused_unless_it_is_there_already() -> None:
    async with placing_scene(lead=False) as scene:
        year = scene.clock.now() + timedelta(days=366)
        assert ask(scene, request(scheduledStartTime=year)) == ([], [])
        far = request(scheduledStartTime=year + timedelta(seconds=1))
        assert ask(scene, far) == (["spec.scheduledStartTime"], [])
        assert ask(scene, far, far) == ([], [])


async def test_what_was_stored_under_other_settings_may_stay_as_it_is() -> None:
    async with placing_scene(lead=False) as scene:
        old = request(durationMinutes=600, labTemplate={"topologyUrl": "https://git.example.com/labs/one.yaml"})
        stopped = request(
            durationMinutes=600,
            labTemplate={"topologyUrl": "https://git.example.com/labs/one.yaml"},
            desiredPhase="Stopped",
        )
        assert ask(scene, stopped, old) == ([], [])
        longer = request(durationMinutes=601, labTemplate=old.spec.lab_template)
        assert ask(scene, longer, old) == (["spec.durationMinutes"], [])


async def test_what_runs_can_be_extended_up_to_the_longest_that_is_allowed() -> None:
    async with placing_scene() as scene:
        await scene.ask("a", runtime="Container")
        await scene.clock.advance(10)
        running = await scene.get("a")
        assert running.status.phase == "Running"
        for minutes, refused in ((480, []), (481, ["spec.durationMinutes"]), (10**4, ["spec.durationMinutes"])):
            longer = running.thaw()
            longer.spec.duration_minutes = minutes
            assert ask(scene, longer, running)[0] == refused


async def test_one_more_than_a_student_may_have_is_forbidden_and_what_is_over_does_not_count() -> None:
    async with placing_scene(instances_most_per_student=2) as scene:
        await scene.ask("a", runtime="Container", studentEmail="ann@x.edu")
        await scene.ask("b", studentEmail="Ann@X.EDU")  # waits: there is no worker
        with pytest.raises(Forbidden, match=r"^exceeded quota: ann@x\.edu has 2 lab instances in default, 2 are"):
            ask(scene, request())
        assert ask(scene, request(studentEmail="bob@x.edu")) == ([], [])
        assert ask(scene, request(namespace="other")) == ([], [])
        assert ask(scene, request(durationMinutes=61), request()) == ([], []), "it is there already"
        assert ask(scene, request(durationMinutes=9999))[0] == ["spec.durationMinutes"], "what is wrong is told first"
        await scene.client.update(await scene.get("a"), lambda r: setattr(r.spec, "desired_phase", "Stopped"))
        await scene.clock.advance(10)
        assert await scene.where("a") == "Completed"
        assert ask(scene, request()) == ([], [])


async def test_one_more_than_a_namespace_may_have_is_forbidden() -> None:
    async with placing_scene(lead=False, instances_most_per_namespace=1) as scene:
        await scene.ask("a", studentEmail="bob@x.edu")
        with pytest.raises(Forbidden, match=r"^exceeded quota: default has 1 lab instances, 1 are allowed"):
            ask(scene, request())
        assert ask(scene, request(namespace="other")) == ([], [])


async def test_the_plug_in_brings_it() -> None:
    async with placing_scene(lead=False) as scene:
        rules = plugin.admission(ControllersSettings(instances_longest_minutes=59), scene.cache, scene.clock)
        assert [cause.field for cause in admit(rules, request(), None)[0]] == ["spec.durationMinutes"]
