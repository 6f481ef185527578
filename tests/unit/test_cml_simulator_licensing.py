"""Licensing: accepted now, done later, and what can go wrong in between."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from controllers.cml.simulator.licensing import Licensing, NotPossibleNowError, NotRegisteredError

START = datetime(2026, 1, 1, tzinfo=UTC)


def make_licensing() -> Licensing:
    return Licensing(delay=10, product_uuid="u", hostname="h")


def look(licensing: Licensing, now: float) -> tuple[str, str]:
    licensing.advance(now, START + timedelta(seconds=now))
    return licensing.status, licensing.authorization


def test_registration_and_authorization_come_one_after_the_other() -> None:
    licensing = make_licensing()
    licensing.register("token", 0, START, again=False)
    assert look(licensing, 9.9) == ("IN_PROGRESS", "INIT")
    assert look(licensing, 10) == ("COMPLETED", "INIT")
    assert not licensing.licensed
    assert look(licensing, 14.9) == ("COMPLETED", "INIT")
    assert look(licensing, 15) == ("COMPLETED", "IN_COMPLIANCE")
    assert licensing.licensed


def test_times_are_of_the_event_and_not_of_the_look() -> None:
    licensing = make_licensing()
    licensing.register("token", 0, START, again=False)
    look(licensing, 500)
    assert licensing.registered == START + timedelta(seconds=10)
    assert licensing.authorized == START + timedelta(seconds=15)
    assert licensing.document()["registration"]["register_time"]["succeeded"] == "2026-01-01 00:00:10"


def test_a_second_registration_is_refused_unless_it_is_meant() -> None:
    licensing = make_licensing()
    licensing.register("token", 0, START, again=False)
    with pytest.raises(NotPossibleNowError):
        licensing.register("token", 1, START, again=False)
    look(licensing, 20)
    with pytest.raises(NotPossibleNowError):
        licensing.register("token", 20, START, again=False)
    licensing.register("token", 20, START, again=True)
    assert look(licensing, 21) == ("IN_PROGRESS", "INIT")


def test_a_refused_token_fails_and_can_be_followed_by_a_good_one() -> None:
    licensing = make_licensing()
    licensing.register("INVALID-token", 0, START, again=False)
    assert look(licensing, 10) == ("FAILED", "INIT")
    assert licensing.document()["registration"]["register_time"]["failure"]
    licensing.register("good", 11, START, again=False)
    assert look(licensing, 30) == ("COMPLETED", "IN_COMPLIANCE")


def test_a_stuck_registration_never_ends_until_it_is_let_go() -> None:
    licensing = make_licensing()
    licensing.stuck = True
    licensing.register("token", 0, START, again=False)
    assert look(licensing, 1e6) == ("IN_PROGRESS", "INIT")
    licensing.stuck = False
    assert look(licensing, 1e6)[0] == "COMPLETED"


def test_an_authorization_can_hang_after_the_registration() -> None:
    licensing = make_licensing()
    licensing.register("token", 0, START, again=False)
    assert look(licensing, 10) == ("COMPLETED", "INIT")
    licensing.stuck = True
    assert look(licensing, 1e6) == ("COMPLETED", "INIT")
    licensing.stuck = False
    assert look(licensing, 1e6) == ("COMPLETED", "IN_COMPLIANCE")


def test_an_unreachable_service_is_retried_until_it_answers() -> None:
    licensing = make_licensing()
    licensing.ssms_reachable = False
    licensing.register("token", 0, START, again=False)
    assert look(licensing, 9)[0] == "IN_PROGRESS"
    assert look(licensing, 10)[0] == "RETRY"
    licensing.ssms_reachable = True
    assert look(licensing, 50) == ("COMPLETED", "INIT"), "the authorization follows the retry, not the first attempt"
    assert look(licensing, 55) == ("COMPLETED", "IN_COMPLIANCE")


def test_deregistering_gives_the_seat_back_or_says_that_it_could_not() -> None:
    licensing = make_licensing()
    with pytest.raises(NotRegisteredError):
        licensing.deregister()
    licensing.register("token", 0, START, again=False)
    with pytest.raises(NotPossibleNowError):
        licensing.deregister()
    look(licensing, 20)
    assert licensing.deregister() is True
    with pytest.raises(NotRegisteredError):
        licensing.deregister()
    licensing.register("token", 20, START, again=False)
    look(licensing, 40)
    licensing.ssms_reachable = False
    assert licensing.deregister() is False
    assert look(licensing, 40) == ("NOT_REGISTERED", "INIT")


def test_renewal_needs_a_registration() -> None:
    licensing = make_licensing()
    with pytest.raises(NotRegisteredError):
        licensing.renew(START)
    licensing.register("token", 0, START, again=False)
    with pytest.raises(NotPossibleNowError):
        licensing.renew(START)
    look(licensing, 20)
    licensing.renew(START + timedelta(seconds=20))
    assert licensing.document()["registration"]["renew_time"]["succeeded"] == "2026-01-01 00:00:20"
