"""Our EC2 client against the simulator: every call, every error, and answers that are lost, late or lies."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from controllers.aws.accounts import Accounts
from controllers.aws.calls import IN_FLIGHT
from controllers.aws.ec2 import Ec2, Ec2Instance
from controllers.aws.errors import (
    AwsAuthError,
    AwsBadInput,
    AwsCapacity,
    AwsError,
    AwsIdempotentMismatch,
    AwsOutcomeUnknown,
    AwsQuota,
    AwsServerError,
    AwsThrottled,
    AwsUnavailable,
    AwsUnknownAccount,
    AwsWrongState,
    Ec2NotFound,
)
from controllers.aws.place import Place
from controllers.aws.simulator import AwsShim
from equipment import certificates
from equipment.aws import ABSENT, HERE, REGION, boto, launch, lying_server, reply, shim_process
from equipment.waiting import until
from lrm.processes import ChildProcess
from storage.clock import SystemClock


async def ready(ec2: Ec2, instance_id: str, state: str = "running") -> Ec2Instance:
    """Wait for a state."""

    async def reached() -> Ec2Instance | None:
        instance = await ec2.describe_instance(HERE, instance_id)
        return instance if instance.state == state else None

    found = await until(reached, f"{instance_id} {state}")
    assert found is not None
    return found


async def test_an_instance_lives_from_launch_to_termination(ec2: Ec2) -> None:
    one = await ec2.run_instance(HERE, launch("life"))
    assert (one.state, one.tags, one.client_token) == ("pending", {"lrm/uid": "life"}, "life")
    assert one.launch_time is not None
    assert one.launch_time.tzinfo is UTC
    assert abs(datetime.now(UTC) - one.launch_time) < timedelta(seconds=30)
    running = await ready(ec2, one.id)
    assert running.public_ip
    assert running.private_ip
    await ec2.create_tags(HERE, one.id, {"a": "b"})
    assert (await ec2.describe_instance(HERE, one.id)).tags == {"lrm/uid": "life", "a": "b"}
    await ec2.delete_tags(HERE, one.id, ["a", "never there"])
    assert (await ec2.describe_instance(HERE, one.id)).tags == {"lrm/uid": "life"}
    assert await ec2.stop(HERE, one.id) == "stopping"
    with pytest.raises(AwsWrongState):
        await ec2.start(HERE, one.id)
    stopped = await ready(ec2, one.id, "stopped")
    assert stopped.public_ip == ""
    assert "UserInitiatedShutdown" in stopped.state_reason
    assert await ec2.stop(HERE, one.id) == "stopped"
    assert await ec2.start(HERE, one.id) == "pending"
    again = await ready(ec2, one.id)
    assert again.public_ip not in ("", running.public_ip)
    assert await ec2.terminate(HERE, one.id) == "shutting-down"
    await ready(ec2, one.id, "terminated")
    assert await ec2.terminate(HERE, one.id) == "terminated"


async def test_one_token_is_one_instance_however_often_and_at_once_it_is_sent(ec2: Ec2, aws_shim: AwsShim) -> None:
    aws_shim.faults.add({"action": "RunInstances", "fault": "delay", "seconds": 0.1, "times": 4})
    launched = await asyncio.gather(*(ec2.run_instance(HERE, launch("same")) for _ in range(12)))
    assert len({instance.id for instance in launched}) == 1
    assert len(await ec2.find_by_tags(HERE, {"lrm/uid": "same"})) == 1
    with pytest.raises(AwsIdempotentMismatch):
        await ec2.run_instance(HERE, launch("same", instance_type="t3.micro"))


async def test_what_does_not_exist_is_not_found_and_is_absent_from_lists_without_hiding_the_others(ec2: Ec2) -> None:
    one = await ec2.run_instance(HERE, launch("there"))
    for call in (ec2.describe_instance, ec2.start, ec2.stop, ec2.terminate):
        with pytest.raises(Ec2NotFound):
            await call(HERE, ABSENT)
    with pytest.raises(Ec2NotFound):
        await ec2.create_tags(HERE, ABSENT, {"a": "b"})
    assert set(await ec2.describe_instances(HERE, [one.id, ABSENT])) == {one.id}
    assert set(await ec2.instance_status(HERE, [one.id, ABSENT])) == {one.id}
    assert await ec2.instance_status(HERE, [ABSENT]) == {}
    assert await ec2.describe_instances(HERE, []) == {}
    with pytest.raises(Ec2NotFound):
        await ec2.describe_instance(Place("eu-west-1"), one.id)


async def test_a_look_that_would_mean_everything_is_refused(ec2: Ec2) -> None:
    with pytest.raises(ValueError, match="every instance"):
        await ec2.find_by_tags(HERE, {})
    with pytest.raises(ValueError, match="id is needed"):
        await ec2.terminate(HERE, "")
    with pytest.raises(ValueError, match="every tag"):
        await ec2.delete_tags(HERE, ABSENT, [])


async def test_tags_are_found_exactly_and_only_in_the_asked_states(ec2: Ec2) -> None:
    """EC2 takes * in a filter for anything; a look by tag that did too would find strangers."""
    star = await ec2.run_instance(HERE, launch("star", tags={"name": "a*", "installation": "x"}))
    await ec2.run_instance(HERE, launch("other", tags={"name": "abc", "installation": "x"}))
    gone = await ec2.run_instance(HERE, launch("gone", tags={"name": "a*", "installation": "x"}))
    await ec2.terminate(HERE, gone.id)
    await ready(ec2, gone.id, "terminated")
    found = await ec2.find_by_tags(HERE, {"name": "a*", "installation": "x"})
    assert [instance.id for instance in found] == [star.id]
    ended = await ec2.find_by_tags(HERE, {"name": "a*"}, states=["terminated"])
    assert [instance.id for instance in ended] == [gone.id]


FLEET = [{"ResourceType": "instance", "Tags": [{"Key": "fleet", "Value": "1"}]}]


async def test_more_than_a_page_of_instances_is_found_whole(ec2: Ec2, aws_shim: AwsShim) -> None:
    async with boto(aws_shim.url) as call:
        named = {"ImageId": launch("x").ami_id, "InstanceType": "m5zn.metal", "TagSpecifications": FLEET}
        said = await call("run_instances", MinCount=1203, MaxCount=1203, **named)
    ids = {instance["InstanceId"] for instance in said["Instances"]}
    found = await ec2.find_by_tags(HERE, {"fleet": "1"})
    assert {instance.id for instance in found} == ids
    assert aws_shim.calls["DescribeInstances"] == 2
    assert set(await ec2.describe_instances(HERE, ids)) == ids
    assert set(await ec2.instance_status(HERE, sorted(ids)[:250])) == set(sorted(ids)[:250])


REFUSALS: list[tuple[dict[str, object], type[AwsError]]] = [
    ({"fault": "throttle"}, AwsThrottled),
    ({"fault": "quota"}, AwsQuota),
    ({"fault": "vcpu"}, AwsQuota),
    ({"fault": "capacity"}, AwsCapacity),
    ({"fault": "auth"}, AwsAuthError),
    ({"fault": "denied"}, AwsAuthError),
    ({"fault": "server-error"}, AwsServerError),
    ({"fault": "error", "code": "InvalidGroup.NotFound", "message": "no group"}, AwsBadInput),
    ({"fault": "error", "code": "IdempotentInstanceTerminated"}, AwsIdempotentMismatch),
]


@pytest.mark.parametrize(("fault", "kind"), REFUSALS)
async def test_each_refusal_of_a_launch_is_told_once_and_leaves_no_instance(
    ec2: Ec2, aws_shim: AwsShim, fault: dict[str, object], kind: type[AwsError]
) -> None:
    aws_shim.faults.add({"action": "RunInstances", **fault})
    with pytest.raises(kind) as raised:
        await ec2.run_instance(HERE, launch("refused"))
    assert type(raised.value) is kind
    assert aws_shim.calls["RunInstances"] == 1, "a creating call is tried once"
    assert await ec2.find_by_tags(HERE, {"lrm/uid": "refused"}) == []
    await ec2.run_instance(HERE, launch("refused"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"ami_id": "ami-00000000000000000"}, "InvalidAMIID.NotFound"),
        ({"ami_id": "nonsense"}, "InvalidAMIID.Malformed"),
        ({"key_name": "no-such-key"}, "InvalidKeyPair.NotFound"),
        ({"instance_type": "m99.metal"}, "InvalidParameterValue"),
        ({"volume_size_gb": "many"}, "ParamValidationError"),
        ({"client_token": "t" * 65}, "InvalidParameterValue"),
    ],
)
async def test_a_launch_of_what_does_not_exist_is_bad_input(ec2: Ec2, change: dict[str, object], word: str) -> None:
    with pytest.raises(AwsBadInput, match=word):
        await ec2.run_instance(HERE, launch("bad", **change))


async def test_reads_are_repeated_through_throttling_and_failures_and_writes_are_not(
    ec2: Ec2, aws_shim: AwsShim
) -> None:
    one = await ec2.run_instance(HERE, launch("steady"))
    for fault in ("throttle", "server-error", "dropped"):
        aws_shim.faults.add({"action": "DescribeInstances", "fault": fault})
        assert (await ec2.describe_instance(HERE, one.id)).id == one.id
    for fault, kind in (("throttle", AwsThrottled), ("dropped", AwsOutcomeUnknown)):
        aws_shim.calls.clear()
        aws_shim.faults.add({"action": "TerminateInstances", "fault": fault})
        with pytest.raises(kind):
            await ec2.terminate(HERE, one.id)
        assert aws_shim.calls["TerminateInstances"] == 1
    assert (await ec2.describe_instance(HERE, one.id)).state != "terminated"


async def test_a_describe_that_fails_for_good_is_an_error_and_never_an_absence(ec2: Ec2, aws_shim: AwsShim) -> None:
    one = await ec2.run_instance(HERE, launch("hidden"))
    aws_shim.faults.add({"action": "DescribeInstances", "fault": "auth", "times": 0})
    for call in (
        ec2.describe_instance(HERE, one.id),
        ec2.describe_instances(HERE, [one.id]),
        ec2.find_by_tags(HERE, {"lrm/uid": "hidden"}),
    ):
        with pytest.raises(AwsAuthError):
            await call


async def test_a_lost_reply_is_an_unknown_outcome_and_the_look_by_tag_sees_exactly_one(
    ec2: Ec2, aws_shim: AwsShim
) -> None:
    aws_shim.faults.add({"action": "RunInstances", "fault": "lost-reply"})
    with pytest.raises(AwsOutcomeUnknown) as raised:
        await ec2.run_instance(HERE, launch("lost"))
    assert not raised.value.definite_refusal
    [one] = await ec2.find_by_tags(HERE, {"lrm/uid": "lost"})
    assert (await ec2.run_instance(HERE, launch("lost"))).id == one.id
    assert len(await ec2.find_by_tags(HERE, {"lrm/uid": "lost"})) == 1


async def test_a_request_that_was_dropped_is_an_unknown_outcome_and_has_launched_nothing(
    ec2: Ec2, aws_shim: AwsShim
) -> None:
    aws_shim.faults.add({"action": "RunInstances", "fault": "dropped"})
    with pytest.raises(AwsOutcomeUnknown):
        await ec2.run_instance(HERE, launch("dropped"))
    assert aws_shim.calls["RunInstances"] == 1
    assert await ec2.find_by_tags(HERE, {"lrm/uid": "dropped"}) == []


async def test_a_launch_carried_out_after_its_deadline_is_found_by_token_and_tag(ec2: Ec2, aws_shim: AwsShim) -> None:
    """The caller has left long ago; the same token still means the same instance."""
    await ec2.find_by_tags(HERE, {"lrm/uid": "late"})
    aws_shim.faults.add({"action": "RunInstances", "fault": "delay", "seconds": 5.0})
    with pytest.raises(AwsOutcomeUnknown, match="no answer within"):
        await ec2.run_instance(HERE, launch("late"), timeout=2.5)  # a first client takes a busy machine a second
    assert await ec2.find_by_tags(HERE, {"lrm/uid": "late"}) == []
    [late] = await until(lambda: ec2.find_by_tags(HERE, {"lrm/uid": "late"}))
    assert (await ec2.run_instance(HERE, launch("late"))).id == late.id


@pytest.mark.parametrize("call", ["stop", "terminate", "describe_instance"])
async def test_a_call_without_an_answer_ends_by_its_own_deadline(ec2: Ec2, aws_shim: AwsShim, call: str) -> None:
    one = await ec2.run_instance(HERE, launch("slow"))
    await ready(ec2, one.id)
    aws_shim.faults.add({"action": "*", "fault": "slow-reply", "seconds": 60, "times": 1})
    with pytest.raises(AwsUnavailable if call == "describe_instance" else AwsOutcomeUnknown, match="no answer within"):
        await getattr(ec2, call)(HERE, one.id, timeout=2)


async def test_nobody_there_is_certainly_not_carried_out(aws_credentials: None) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        async with Ec2(SystemClock(), endpoint_url=url) as ec2:
            with pytest.raises(AwsUnavailable):
                await ec2.run_instance(HERE, launch("nobody"))
            with pytest.raises(AwsUnavailable):
                await ec2.find_by_tags(HERE, {"a": "b"})


async def test_without_credentials_or_with_an_impossible_region_or_endpoint_nothing_is_sent(
    aws_shim: AwsShim, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_wrongly = Accounts({}, SystemClock(), regions=["not a region"], endpoint_url=aws_shim.url)
    async with Ec2(SystemClock(), set_wrongly) as ec2:
        with pytest.raises(AwsBadInput):
            await ec2.describe_instance(Place("not a region"), ABSENT)
    async with Ec2(SystemClock(), endpoint_url="nonsense") as ec2:
        with pytest.raises(AwsUnavailable, match="Invalid endpoint"):
            await ec2.run_instance(HERE, launch("nonsense"))
    async with Ec2(SystemClock(), endpoint_url=aws_shim.url) as ec2:
        with pytest.raises(AwsUnknownAccount, match="'mars'"):
            await ec2.describe_instance(Place(REGION, "mars"), ABSENT)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    async with Ec2(SystemClock(), endpoint_url=aws_shim.url) as ec2:
        with pytest.raises(AwsAuthError, match="no usable credentials"):
            await ec2.run_instance(HERE, launch("anonymous"))
    assert not aws_shim.calls


async def test_the_endpoint_of_the_environment_is_used(aws_shim: AwsShim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws_shim.url)
    async with Ec2(SystemClock()) as ec2:
        await ec2.run_instance(HERE, launch("environment"))
    assert aws_shim.calls["RunInstances"] == 1


@pytest.fixture
async def stuck(ec2: Ec2, aws_shim: AwsShim) -> AsyncIterator[list[asyncio.Task[Ec2Instance]]]:
    """All of the client's threads wait for answers that do not come."""
    one = await ec2.run_instance(HERE, launch("stuck"))
    aws_shim.calls.clear()
    aws_shim.faults.add({"action": "DescribeInstances", "fault": "dropped", "seconds": 3, "times": 0})
    slots = IN_FLIGHT
    tasks = [asyncio.create_task(ec2.describe_instance(HERE, one.id)) for _ in range(slots)]
    await until(lambda: aws_shim.calls["DescribeInstances"] == slots)
    yield tasks
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_call_that_finds_no_free_thread_is_certainly_not_sent_not_even_later(
    ec2: Ec2, aws_shim: AwsShim, stuck: list[asyncio.Task[Ec2Instance]]
) -> None:
    with pytest.raises(AwsUnavailable, match="not sent within"):
        await ec2.run_instance(HERE, launch("queued"), timeout=0.3)
    cancelled = asyncio.create_task(ec2.run_instance(HERE, launch("queued")))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    aws_shim.faults.clear()
    for task in stuck:
        task.cancel()
    await until(lambda: ec2._calls.busy == 0, "the threads are free again")
    assert aws_shim.calls["RunInstances"] == 0


async def test_cancelled_callers_leave_at_once_and_their_calls_are_not_repeated(
    ec2: Ec2, aws_shim: AwsShim, stuck: list[asyncio.Task[Ec2Instance]]
) -> None:
    """The read client would try three times; nobody wants to know any more."""
    for task in stuck:
        task.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
    assert ec2._calls.busy == len(stuck), "they left before their calls had ended"
    assert all(task.cancelled() for task in stuck)
    await until(lambda: ec2._calls.busy == 0, "the threads are free again")
    assert aws_shim.calls["DescribeInstances"] == len(stuck)


HTML = reply("<html><body>Please log in to the network</body></html>", content_type="text/html")
EMPTY_SET = "<DescribeInstancesResponse><requestId>r</requestId><reservationSet/>"
WHOLE = f"{EMPTY_SET}</DescribeInstancesResponse>"
ENDLESS = f"{EMPTY_SET}<nextToken>again</nextToken></DescribeInstancesResponse>"
LIES: list[tuple[bytes, str]] = [
    (HTML, "a portal's page is well-formed XML with nothing in it"),
    (reply(""), "nothing at all"),
    (reply("<a><b>"), "half an answer"),
    (reply(WHOLE[:60], length=len(WHOLE)), "an answer that breaks off"),
    (reply("{}", content_type="application/json"), "another protocol"),
    (reply("<DescribeInstancesResponse><requestId>r</requestId></DescribeInstancesResponse>"), "no set"),
    (reply(WHOLE.replace("<requestId>r</requestId>", "")), "no request id"),
    (reply(ENDLESS), "pages that never end"),
    (reply("bad gateway", status=502), "a proxy's own error"),
    (reply("<html>moved</html>", status=302), "a redirect"),
    (b"HTTP/1.1 200", "half a status line"),
    (b"", "a closed connection"),
    (b"\x00\x01\x02 nonsense\r\n\r\n", "no HTTP"),
]


@pytest.mark.parametrize(("lie", "why"), LIES, ids=[why for _, why in LIES])
async def test_an_answer_that_is_none_is_never_told_as_nothing_there(
    aws_credentials: None, lie: bytes, why: str
) -> None:
    async with lying_server(lie) as (url, _), Ec2(SystemClock(), endpoint_url=url) as ec2:
        with pytest.raises((AwsServerError, AwsUnavailable)):
            await ec2.find_by_tags(HERE, {"a": "b"})


@pytest.mark.parametrize(("lie", "why"), [*LIES[:5], *LIES[8:]], ids=[why for _, why in [*LIES[:5], *LIES[8:]]])
async def test_a_launch_answered_with_nonsense_has_an_unknown_outcome_and_is_sent_once(
    aws_credentials: None, lie: bytes, why: str
) -> None:
    async with lying_server(lie) as (url, seen), Ec2(SystemClock(), endpoint_url=url) as ec2:
        with pytest.raises((AwsOutcomeUnknown, AwsServerError)) as raised:
            await ec2.run_instance(HERE, launch("nonsense"))
        assert not raised.value.definite_refusal
        assert len(seen) == 1


async def test_an_empty_answer_about_one_instance_is_no_proof_that_it_is_gone(aws_credentials: None) -> None:
    """EC2 says NotFound for that."""
    async with lying_server(reply(WHOLE)) as (url, _), Ec2(SystemClock(), endpoint_url=url) as ec2:
        with pytest.raises(AwsServerError):
            await ec2.describe_instance(HERE, ABSENT)
        assert await ec2.find_by_tags(HERE, {"a": "b"}) == []


async def test_a_peer_that_trickles_bytes_holds_nobody_beyond_the_deadline(aws_credentials: None) -> None:
    """No socket timeout ever strikes: only our own deadline does."""
    async with lying_server(reply(WHOLE), pause=1.0) as (url, _), Ec2(SystemClock(), endpoint_url=url) as ec2:
        with pytest.raises(AwsUnavailable, match="no answer within"):
            await ec2.find_by_tags(HERE, {"a": "b"}, timeout=3)


async def test_calls_and_their_large_answers_do_not_hold_up_the_event_loop(
    tmp_path: Path, moto_url: str, aws_credentials: None
) -> None:
    """A call that blocked the loop would do so for seconds: eight times the time that one answer takes to parse."""
    async with (
        shim_process(tmp_path, moto_url, "--delay", "0") as (_, url),
        Ec2(SystemClock(), endpoint_url=url) as ec2,
    ):
        await ec2.run_instance(HERE, launch("loop"))
        async with boto(url) as call:
            await call("run_instances", ImageId=launch("x").ami_id, MinCount=300, MaxCount=300, TagSpecifications=FLEET)
        calls = asyncio.gather(*(ec2.find_by_tags(HERE, {"fleet": "1"}) for _ in range(8)))
        turns = await turns_during(calls)
        assert [len(found) for found in await calls] == [300] * 8
    assert len(turns) > 20, "calls that blocked would leave one turn for each"
    assert turns[int(len(turns) * 0.9)] < 0.05, "and answers parsed by the loop itself one long turn for each"


async def turns_during(work: asyncio.Future[Any]) -> list[float]:
    """What the event loop computed in each of its turns while it waited for some work: CPU seconds, least first."""
    found = []
    while not work.done():
        before = time.thread_time()
        await asyncio.sleep(0.005)
        found.append(time.thread_time() - before)
    return sorted(found)


async def test_in_a_storm_of_faults_and_leaving_callers_one_token_never_makes_two_instances(
    ec2: Ec2, aws_shim: AwsShim
) -> None:
    """Each of six launches is tried again and again, cancelled, cut short, lost and refused, until it is known."""
    chance = random.Random(7)
    tokens = [f"storm-{number}" for number in range(6)]
    for fault in ("lost-reply", "dropped", "throttle", "server-error", "delay", "slow-reply") * 4:
        aws_shim.faults.add({"action": "RunInstances", "fault": fault, "seconds": chance.choice([0, 0.05, 0.3])})

    async def launch_for_certain(token: str) -> str:
        while True:
            task = asyncio.create_task(ec2.run_instance(HERE, launch(token), timeout=chance.choice([0.1, 0.2, 1])))
            if chance.random() < 0.3:
                await asyncio.wait([task], timeout=chance.random() * 0.2)
                task.cancel()
            try:
                return (await task).id
            except AwsError as error:
                if not error.retryable:
                    raise
            except asyncio.CancelledError:
                continue

    ids = await asyncio.gather(*(launch_for_certain(token) for token in tokens))
    assert len(set(ids)) == len(tokens)
    await until(lambda: ec2._calls.busy == 0, "the threads are free again")
    for token, instance_id in zip(tokens, ids, strict=True):
        assert [i.id for i in await ec2.find_by_tags(HERE, {"lrm/uid": token})] == [instance_id]


async def test_an_endpoint_with_a_certificate_that_nobody_vouches_for_is_sent_nothing(
    aws_credentials: None, tmp_path: Path
) -> None:
    made = certificates.make(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.server.cert, made.server.key)
    async with lying_server(reply(WHOLE), tls=context) as (url, seen), Ec2(SystemClock(), endpoint_url=url) as ec2:
        with pytest.raises(AwsUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            await ec2.run_instance(HERE, launch("tls"))
        assert seen == []


LEAVE = """
import asyncio, sys
from controllers.aws.ec2 import Ec2
from controllers.aws.errors import AwsUnavailable
from controllers.aws.place import Place
from storage.clock import SystemClock

async def ask():
    async with Ec2(SystemClock(), endpoint_url=sys.argv[1]) as ec2:
        try:
            await ec2.find_by_tags(Place("us-east-1"), {"a": "b"}, timeout=1)
        except AwsUnavailable:
            print("left", flush=True)

asyncio.run(ask())
"""


async def test_a_hanging_peer_does_not_hold_up_the_end_of_the_process(aws_credentials: None, tmp_path: Path) -> None:
    """The thread would wait 40 s for its answer; an executor's threads are waited for at the end of Python."""
    async with lying_server(b" " * 400, pause=0.1) as (url, _):
        child = ChildProcess.start([sys.executable, "-c", LEAVE, url], name="leaver", log_path=tmp_path / "log")
        try:
            await until(lambda: "left" in child.log_tail(), "the call's deadline")
            began = time.monotonic()
            assert await child.wait() == 0
            assert time.monotonic() - began < 20
        finally:
            child.kill()
