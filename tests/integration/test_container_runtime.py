"""Labs in containers on a real engine: made as asked, seen as they are, removed without a trace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from controllers.instances.kind import LabInstanceRequest, Need
from controllers.instances.phases import Reasons
from controllers.instances.runtime import LabFailed, Refused, Sighting, State
from equipment.containers_world import ContainersWorld, containers_world
from equipment.engine import Engine
from equipment.waiting import until

HTTPD = ["sh", "-c", "echo hello > /tmp/index.html; exec httpd -f -p 8000 -h /tmp"]


@pytest.fixture
async def world(engine: Engine) -> AsyncIterator[ContainersWorld]:
    async with containers_world(engine) as world:
        yield world


async def test_a_lab_is_made_as_asked_served_on_loopback_and_removed_without_a_trace(world: ContainersWorld) -> None:
    request = world.request(
        command=HTTPD,
        ports=[8000, 9000],
        spec_environment={"STUDENT": "ann", "EMPTY": ""},
        spec_resources={"cpu": 0.25, "memory": "64Mi", "pids": 40},
    )
    request.status.need = (await world.runtime.prepare(request, world.ctx)).need
    assert (request.status.need.cpu, request.status.need.memory) == (0.25, 64 * 1024**2)
    seen = await world.provision(request)
    assert seen.state is State.RUNNING
    assert seen.access_url == f"http://{seen.ports[0].address}"
    assert [p.port for p in seen.ports] == [8000, 9000]

    async def answers() -> bool:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{seen.access_url}/index.html") as reply:
                return await reply.text() == "hello\n"
        except aiohttp.ClientError:
            return False

    await until(answers, "the lab serves")
    told = world.inspect(request)
    host = told["HostConfig"]
    assert seen.container_id == told["Id"]
    assert told["Name"] == f"/lrm-{request.uid}"
    assert {"STUDENT=ann", "EMPTY="} <= set(told["Config"]["Env"])
    assert told["Config"]["Labels"]["lrm/installation"] == world.installation
    assert told["Config"]["Labels"]["lrm/uid"] == request.uid
    assert told["Config"]["Labels"]["lrm/created-by"] == "lrm"
    assert (host["NanoCpus"], host["PidsLimit"]) == (250_000_000, 40)
    assert host["Memory"] == host["MemorySwap"] == 64 * 1024**2
    assert (host["Privileged"], host["ReadonlyRootfs"], host["Init"]) == (False, True, True)
    assert (host["CapDrop"], host["CapAdd"]) == (["ALL"], None)
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "2"}
    published = told["NetworkSettings"]["Ports"].values()
    assert {binding["HostIp"] for bindings in published for binding in bindings} == {"127.0.0.1"}
    assert list(told["NetworkSettings"]["Networks"]) == [f"lrm-{request.uid}"]
    assert world.engine.client.volumes.list(filters={"label": f"lrm/uid={request.uid}"}), "the image declares one"
    await world.clean(request)
    assert await world.runtime.clean(request, world.ctx), "and again changes nothing"


async def test_the_root_cannot_be_written_to_unless_the_template_says_so(world: ContainersWorld) -> None:
    tries = ["sh", "-c", "touch /tmp/a /data/b && touch /c; echo wrote $?; exec sleep 1000"]
    sealed, writable = world.request("sealed", command=tries), world.request("writable", command=tries, writable=True)
    for request, words in ((sealed, b"wrote 1"), (writable, b"wrote 0")):
        await world.provision(request)
        await until(lambda request=request, words=words: _says(world, request, words), f"it says {words!r}", 60)
        await world.clean(request)


async def _says(world: ContainersWorld, request: LabInstanceRequest, words: bytes) -> bool:
    return words in await said(world, request)


async def said(world: ContainersWorld, request: LabInstanceRequest, tail: int = 1000) -> bytes:
    """The log as it is now."""
    return b"".join([piece async for piece in world.runtime.logs(request, tail=tail)])


async def test_it_is_running_when_its_health_check_says_so_and_unhealthy_afterwards(world: ContainersWorld) -> None:
    check = {"command": ["cat", "/tmp/well"], "intervalSeconds": 0.2, "retries": 1, "timeoutSeconds": 20}
    request = world.request(
        command=["sh", "-c", "while ! [ -e /data/go ]; do sleep 0.1; done; touch /tmp/well; exec sleep 1000"],
        healthCheck=check,
        writable=True,
    )
    await until(lambda: _is(world, request, State.STARTING, "health check"), "it runs, and is not well yet", 60)
    container = world.engine.client.containers.get(request.outside_name)
    assert container.exec_run(["touch", "/data/go"]).exit_code == 0
    assert (await world.provision(request)).state is State.RUNNING
    world.told.clear()
    assert container.exec_run(["busybox", "rm", "/tmp/well"]).exit_code == 0
    await until(lambda: _looks(world, request, State.UNHEALTHY), "the engine finds it unhealthy", 60)
    assert world.hinted(request)
    await world.clean(request)


async def _is(world: ContainersWorld, request: LabInstanceRequest, state: State, words: str) -> bool:
    seen = await world.runtime.provision(request, world.ctx)
    return seen.state is state and words in seen.message


async def _looks(world: ContainersWorld, request: LabInstanceRequest, state: State) -> bool:
    return (await world.runtime.look(request, world.ctx)).state is state


async def _ends(world: ContainersWorld, request: LabInstanceRequest) -> Sighting:
    """Provision it and look until it has ended by itself; raises `LabFailed`."""
    seen = await world.provision(request)
    if seen.state is State.RUNNING:
        await until(lambda: _looks(world, request, State.ENDED), f"{request.name} ends", 60)
        seen = await world.runtime.look(request, world.ctx)
    return seen


@pytest.mark.parametrize(
    ("script", "reason", "code"),
    [
        pytest.param("sleep 1; exit 3", Reasons.CONTAINER_FAILED, 3, id="another exit code"),
        pytest.param("sleep 1; dd if=/dev/zero of=/dev/null bs=200M count=1", Reasons.OUT_OF_MEMORY, 137, id="oom"),
    ],
)
async def test_a_container_that_fails_says_how(world: ContainersWorld, script: str, reason: str, code: int) -> None:
    request = world.request(command=["sh", "-c", script], spec_resources={"memory": "32Mi"})
    with pytest.raises(LabFailed) as failed:
        await _ends(world, request)
    assert (failed.value.reason, failed.value.exit_code) == (reason, code)
    assert failed.value.oom_killed == (reason == Reasons.OUT_OF_MEMORY)
    await until(lambda: world.hinted(request), "its end is told without a question")
    await world.clean(request)


async def test_what_a_container_wrote_last_is_known_at_its_end(world: ContainersWorld) -> None:
    """And told in its failure: it is removed a moment later."""
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21; do echo line $i; done; exit 3"
    failing = world.request("failing", command=["sh", "-c", script])
    with pytest.raises(LabFailed, match=r"exit code 3: line 21$") as failed:
        await _ends(world, failing)
    assert failed.value.last_log == "".join(f"line {n}\n" for n in range(2, 22))
    ending = world.request("ending", command=["sh", "-c", "echo bye"])
    assert (await _ends(world, ending)).last_log == "bye\n"
    for request in (failing, ending):
        assert await world.runtime.last_log(request), "and while it is there"
        await world.clean(request)
        assert await world.runtime.last_log(request) is None


async def test_a_container_that_ends_well_has_ended(world: ContainersWorld) -> None:
    request = world.request(command=["sh", "-c", "exit 0"])
    seen = await _ends(world, request)
    assert (seen.state, seen.exit_code, seen.oom_killed) == (State.ENDED, 0, False)
    await world.clean(request)


async def test_a_container_that_somebody_removes_is_lost_and_what_it_left_is_cleaned_up(world: ContainersWorld) -> None:
    request = world.request()
    await world.provision(request)
    world.told.clear()
    world.engine.client.containers.get(request.outside_name).remove(force=True)
    await until(lambda: world.hinted(request), "its going is told")
    with pytest.raises(LabFailed) as failed:
        await world.runtime.look(request, world.ctx)
    assert failed.value.reason == Reasons.CONTAINER_LOST
    assert len(world.engine.leftovers(f"lrm/uid={request.uid}")) == 2, "its network, and the volume of its image"
    await world.clean(request)


async def test_what_an_older_attempt_left_is_removed_before_another_is_made(world: ContainersWorld) -> None:
    first = world.request()
    before = await world.provision(first)
    second = first.model_copy(deep=True)
    second.status.attempt = 2
    after = await world.provision(second)
    assert after.container_id != before.container_id
    assert world.inspect(second)["Config"]["Labels"]["lrm/attempt"] == "2"
    assert len(world.engine.leftovers(f"lrm/uid={first.uid}")) == 3, "a container, a network, a volume"
    await world.clean(second)


async def test_two_leaders_who_make_the_same_lab_make_one(engine: Engine, world: ContainersWorld) -> None:
    """A deposed leader's late call meets the name; whoever comes second takes what is there."""
    request = world.request(ports=[8000])
    async with containers_world(engine, installation=world.installation) as other:
        one, two = await asyncio.gather(world.provision(request), other.provision(request))
        assert one.container_id == two.container_id
        chosen = {"label": f"lrm/uid={request.uid}"}
        assert len(engine.client.containers.list(all=True, filters=chosen)) == 1
        await asyncio.gather(world.clean(request), other.clean(request))


async def test_one_who_does_not_lead_makes_and_removes_nothing(world: ContainersWorld) -> None:
    request = world.request()
    await world.provision(request)
    stranger = world.request("stranger")
    world.term.lost()
    with pytest.raises(Exception, match="no longer leads"):
        await world.runtime.provision(stranger, world.ctx)
    assert world.engine.leftovers(f"lrm/uid={stranger.uid}") == []
    await world.runtime.clean(request, world.ctx)
    assert len(world.engine.leftovers(f"lrm/uid={request.uid}")) == 3


@pytest.mark.parametrize(
    ("template", "spec", "words"),
    [
        pytest.param({"command": ["/no/such"]}, {}, r"exit code 127: .*/no/such", id="no such program"),
        pytest.param({}, {"resources": {"cpu": 1000}}, "CPUs", id="more cores than the engine has"),
    ],
)
async def test_what_cannot_run_is_refused_in_the_engines_words(
    world: ContainersWorld, template: dict[str, object], spec: dict[str, object], words: str
) -> None:
    request = world.request(**template, **{f"spec_{k}": v for k, v in spec.items()})
    request.status.need = (await world.runtime.prepare(request, world.ctx)).need
    with pytest.raises((Refused, LabFailed), match=words):
        await _ends(world, request)
    await world.clean(request)


async def test_a_limit_that_the_kernel_does_not_take_is_refused(world: ContainersWorld) -> None:
    request = world.request(command=["sleep", "60"])
    request.status.need = Need(cpu=0.005, memory=64 * 1024**2)  # no spec may ask for so little
    with pytest.raises(Refused, match=r"cannot be started: .*invalid argument"):
        await _ends(world, request)
    await world.clean(request)


async def test_logs_come_in_order_bounded_by_their_tail_and_followed_to_the_end(world: ContainersWorld) -> None:
    speaks = "for i in 1 2 3 4 5; do echo out $i; echo err $i >&2; done"
    script = f"{speaks}; while ! [ -e /tmp/go ]; do sleep 0.1; done; echo end"
    request = world.request(command=["sh", "-c", script])
    await world.provision(request)

    async def spoken() -> list[bytes] | None:
        lines = (await said(world, request)).splitlines()
        return lines if len(lines) >= 10 else None

    lines = await until(spoken, "it has spoken", 60)
    assert sorted(lines or ()) == sorted(f"{s} {n}".encode() for n in range(1, 6) for s in ("out", "err"))
    assert len((await said(world, request, tail=3)).splitlines()) == 3
    following = world.runtime.logs(request, tail=1, follow=True)
    async with asyncio.timeout(60):
        assert await anext(following) == b"", "it is open"
        last = await anext(following)
        world.engine.client.containers.get(request.outside_name).exec_run(["touch", "/tmp/go"])
        rest = [piece async for piece in following]
    assert last.rstrip() in (lines or ())
    assert rest == [b"end\n"], "then what it says from there on, and the end"
    await world.clean(request)
    with pytest.raises(Refused, match="no container"):
        await said(world, request)


async def test_a_container_that_does_not_hear_is_killed_when_its_grace_is_over(world: ContainersWorld) -> None:
    request = world.request(command=["sh", "-c", "trap '' TERM; while true; do sleep 0.2; done"])
    await world.provision(request)
    await world.clean(request)
    paused = world.request("paused")
    await world.provision(paused)
    world.engine.client.containers.get(paused.outside_name).pause()
    await until(lambda: _looks(world, paused, State.STARTING), "its pause is seen")
    await world.clean(paused)
