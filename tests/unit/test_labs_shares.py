"""How many keys of one worker are in hand, and who comes next."""

from __future__ import annotations

from contextlib import ExitStack

from controllers.labs.shares import Shares

A, B, C, D = (("default", name) for name in "abcd")


def test_keys_of_one_worker_wait_for_each_other_alone_and_are_woken_in_their_order() -> None:
    shares, told = Shares(2), []
    shares.listen(told.append)
    with shares.one_of("slow", A) as first, ExitStack() as later:
        with shares.one_of("slow", B) as second:
            for key in (C, D):
                with shares.one_of("slow", key) as let_in:
                    assert not let_in
            with shares.one_of("quick", A) as other:
                assert (first, second, other, told) == (True, True, True, [])
        assert told == [C]
        assert later.enter_context(shares.one_of("slow", C))
        later.close()
        assert told == [C, D], "as each one leaves, the next is woken"
        assert later.enter_context(shares.one_of("slow", D))
    assert told == [C, D]
