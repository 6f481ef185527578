"""The licence agent: accepted now, done later, and what can go wrong in between."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from controllers.cml.simulator.licensing import Licensing, NotPossibleNowError, NotRegisteredError

START = datetime(2026, 1, 1, tzinfo=UTC)


def make_agent() -> Licensing:
    return Licensing(delay=10, product_uuid="u", hostname="h")


def look(agent: Licensing, now: float) -> tuple[str, str]:
    agent.advance(now, START + timedelta(seconds=now))
    return agent.status, agent.authorization


def test_registration_and_authorization_come_one_after_the_other() -> None:
    agent = make_agent()
    agent.register("token", 0, START, again=False)
    assert look(agent, 9.9) == ("IN_PROGRESS", "INIT")
    assert look(agent, 10) == ("COMPLETED", "INIT")
    assert not agent.licensed
    assert look(agent, 14.9) == ("COMPLETED", "INIT")
    assert look(agent, 15) == ("COMPLETED", "IN_COMPLIANCE")
    assert agent.licensed


def test_times_are_of_the_event_and_not_of_the_look() -> None:
    agent = make_agent()
    agent.register("token", 0, START, again=False)
    look(agent, 500)
    assert agent.registered == START + timedelta(seconds=10)
    assert agent.authorized == START + timedelta(seconds=15)
    assert agent.document()["registration"]["register_time"]["succeeded"] == "2026-01-01 00:00:10"


def test_a_second_registration_is_refused_unless_it_is_meant() -> None:
    agent = make_agent()
    agent.register("token", 0, START, again=False)
    with pytest.raises(NotPossibleNowError):
        agent.register("token", 1, START, again=False)
    look(agent, 20)
    with pytest.raises(NotPossibleNowError):
        agent.register("token", 20, START, again=False)
    agent.register("token", 20, START, again=True)
    assert look(agent, 21) == ("IN_PROGRESS", "INIT")


def test_a_refused_token_fails_and_can_be_followed_by_a_good_one() -> None:
    agent = make_agent()
    agent.register("INVALID-token", 0, START, again=False)
    assert look(agent, 10) == ("FAILED", "INIT")
    assert agent.document()["registration"]["register_time"]["failure"]
    agent.register("good", 11, START, again=False)
    assert look(agent, 30) == ("COMPLETED", "IN_COMPLIANCE")


def test_a_stuck_registration_never_ends_until_it_is_let_go() -> None:
    agent = make_agent()
    agent.stuck = True
    agent.register("token", 0, START, again=False)
    assert look(agent, 1e6) == ("IN_PROGRESS", "INIT")
    agent.stuck = False
    assert look(agent, 1e6)[0] == "COMPLETED"


def test_an_authorization_can_hang_after_the_registration() -> None:
    agent = make_agent()
    agent.register("token", 0, START, again=False)
    assert look(agent, 10) == ("COMPLETED", "INIT")
    agent.stuck = True
    assert look(agent, 1e6) == ("COMPLETED", "INIT")
    agent.stuck = False
    assert look(agent, 1e6) == ("COMPLETED", "IN_COMPLIANCE")


def test_an_unreachable_service_is_retried_until_it_answers() -> None:
    agent = make_agent()
    agent.ssms_reachable = False
    agent.register("token", 0, START, again=False)
    assert look(agent, 9)[0] == "IN_PROGRESS"
    assert look(agent, 10)[0] == "RETRY"
    agent.ssms_reachable = True
    assert look(agent, 50) == ("COMPLETED", "INIT"), "the authorization follows the retry, not the first attempt"
    assert look(agent, 55) == ("COMPLETED", "IN_COMPLIANCE")


def test_deregistering_gives_the_seat_back_or_says_that_it_could_not() -> None:
    agent = make_agent()
    with pytest.raises(NotRegisteredError):
        agent.deregister()
    agent.register("token", 0, START, again=False)
    with pytest.raises(NotPossibleNowError):
        agent.deregister()
    look(agent, 20)
    assert agent.deregister() is True
    with pytest.raises(NotRegisteredError):
        agent.deregister()
    agent.register("token", 20, START, again=False)
    look(agent, 40)
    agent.ssms_reachable = False
    assert agent.deregister() is False
    assert look(agent, 40) == ("NOT_REGISTERED", "INIT")


def test_renewal_needs_a_registration() -> None:
    agent = make_agent()
    with pytest.raises(NotRegisteredError):
        agent.renew(START)
    agent.register("token", 0, START, again=False)
    with pytest.raises(NotPossibleNowError):
        agent.renew(START)
    look(agent, 20)
    agent.renew(START + timedelta(seconds=20))
    assert agent.document()["registration"]["renew_time"]["succeeded"] == "2026-01-01 00:00:20"
