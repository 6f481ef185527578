"""Our EC2 client against plain moto, which is less exact than EC2: what the client must bear with."""

from __future__ import annotations

import pytest

from controllers.aws.ec2 import Ec2
from controllers.aws.errors import Ec2NotFound
from equipment.aws import ABSENT, HERE, launch
from storage.clock import SystemClock


async def test_an_instance_lives_on_plain_moto(moto_url: str) -> None:
    async with Ec2(SystemClock(), endpoint_url=moto_url) as ec2:
        one = await ec2.run_instance(HERE, launch("moto-life", volume_type="gp3"))
        assert (await ec2.describe_instance(HERE, one.id)).state == "running"
        assert [i.id for i in await ec2.find_by_tags(HERE, {"lrm/uid": "moto-life"})] == [one.id]
        assert set(await ec2.describe_instances(HERE, [one.id, ABSENT])) == {one.id}
        checks = await ec2.instance_status(HERE, [one.id, ABSENT])
        assert (checks[one.id].state, checks[one.id].system, checks[one.id].instance) == ("running", "ok", "ok")
        assert await ec2.stop(HERE, one.id) in ("stopping", "stopped")
        assert (await ec2.describe_instance(HERE, one.id)).public_ip == ""
        assert await ec2.start(HERE, one.id) in ("pending", "running")
        await ec2.create_tags(HERE, one.id, {"a": "b"})
        await ec2.terminate(HERE, one.id)
        ended = await ec2.describe_instance(HERE, one.id)
        assert (ended.state, ended.tags["a"]) == ("terminated", "b")
        assert await ec2.find_by_tags(HERE, {"lrm/uid": "moto-life"}) == []
        with pytest.raises(Ec2NotFound):
            await ec2.describe_instance(HERE, ABSENT)


async def test_a_launch_that_moto_refuses_too_late_gives_the_one_instance_that_it_made(moto_url: str) -> None:
    """Moto loses the Iops of io1 on the way and refuses for the want of them, with the instance launched."""
    async with Ec2(SystemClock(), endpoint_url=moto_url) as ec2:
        parameters = launch("moto-io1")
        assert parameters.volume_type == "io1"
        one = await ec2.run_instance(HERE, parameters)
        assert [i.id for i in await ec2.find_by_tags(HERE, {"lrm/uid": "moto-io1"})] == [one.id]
        await ec2.terminate(HERE, one.id)


async def test_moto_takes_every_form_of_launch(moto_url: str) -> None:
    """Without a subnet, without a public address, with groups: none of them is refused for its form."""
    async with Ec2(SystemClock(), endpoint_url=moto_url) as ec2:
        for number, changes in enumerate(({}, {"assign_public_ip": False})):
            one = await ec2.run_instance(HERE, launch(f"moto-form-{number}", volume_type="gp3", **changes))
            await ec2.terminate(HERE, one.id)


async def test_moto_ignores_client_tokens_and_the_look_by_tag_shows_the_surplus(moto_url: str) -> None:
    """So the token alone is no protection there; who launches looks by tag before, and removes what is too much."""
    async with Ec2(SystemClock(), endpoint_url=moto_url) as ec2:
        first = await ec2.run_instance(HERE, launch("moto-twice", volume_type="gp3"))
        second = await ec2.run_instance(HERE, launch("moto-twice", volume_type="gp3"))
        assert first.id != second.id
        found = {i.id for i in await ec2.find_by_tags(HERE, {"lrm/uid": "moto-twice"})}
        assert found == {first.id, second.id}
        for instance_id in found:
            await ec2.terminate(HERE, instance_id)
