"""What containers and engines say, where it is stored and shown."""

from __future__ import annotations

import pytest

from controllers.containers.words import LAST_LOG_MOST, last_lines, one_line


@pytest.mark.parametrize(
    ("said", "kept", "why"),
    [
        (b"", "", "it has said nothing"),
        (b"one\ntwo\n\n\n", "one\ntwo\n", "empty lines at the end say nothing"),
        (b"one\n\ntwo", "one\n\ntwo\n", "those between may, and the last line may lack its end"),
        (b"".join(b"%d\n" % n for n in range(30)), "".join(f"{n}\n" for n in range(10, 30)), "the last twenty"),
        (b"\x1b[31mred\x1b[0m\x1b]0;title\x07 \x1b[2Jx\r\n", "red x\n", "a terminal is told nothing"),
        (b"x\x1b]0;a title without an end\nwhy it failed\n", "x\nwhy it failed\n", "no title swallows what follows it"),
        (b"a\x00b\xffc\td\n", "a\ufffdb\ufffdc d\n", "what has no shape is marked"),
        ("\u202eevil\n".encode(), "\ufffdevil\n", "nor does anything turn round what follows"),
    ],
)
def test_the_end_of_a_log_is_bounded_and_printable(said: bytes, kept: str, why: str) -> None:
    assert last_lines(said) == kept, why


def test_what_is_kept_of_a_log_is_bounded_in_bytes_and_holds_no_half_of_a_character() -> None:
    kept = last_lines("€".encode() * 10_000)
    assert LAST_LOG_MOST - 3 <= len(kept.encode()) <= LAST_LOG_MOST
    assert kept == "€" * (len(kept) - 1) + "\n"


def test_a_message_is_one_line_of_a_bounded_length() -> None:
    assert one_line("no\nsuch \x1b[1mfile\x1b[0m\x07\n") == "no such file\ufffd"
    assert one_line("x" * 1000) == "x" * 299 + "…"
