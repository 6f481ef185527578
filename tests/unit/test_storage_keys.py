"""Patterns and continue tokens, beyond what the conformance suite shows."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import InvalidKey
from storage.keys import KeyPattern, check_limit, decode_key, decode_token, encode_key, encode_token

ALPHABET = "ab-]![*?/^\\.\n"


@given(st.text(ALPHABET.replace("/", ""), max_size=8), st.text(ALPHABET.replace("/", ""), max_size=8))
def test_without_slashes_a_pattern_means_what_fnmatch_says(pattern: str, name: str) -> None:
    assert KeyPattern.parse(pattern).matches(name) == fnmatch.fnmatchcase(name, pattern)


@given(st.text(ALPHABET, max_size=8), st.text(ALPHABET, max_size=8))
def test_a_match_begins_with_the_literal_and_has_as_many_slashes(pattern: str, name: str) -> None:
    parsed = KeyPattern.parse(pattern)
    if parsed.matches(name):
        assert name.startswith(parsed.literal)
        if "[" not in pattern:
            assert name.count("/") == pattern.count("/")


@given(st.text(min_size=1, max_size=20), st.integers(1, 2**62))
def test_a_token_brings_back_what_was_put_into_it(key: str, revision: int) -> None:
    try:
        encode_key(key)
    except InvalidKey:
        return
    assert decode_token(encode_token(revision, key), key[:1]) == (revision, key)


@given(st.binary(min_size=1, max_size=20).filter(lambda raw: b"\0" not in raw))
def test_any_bytes_of_another_program_survive_as_a_key(raw: bytes) -> None:
    assert encode_key(decode_key(raw)) == raw


@given(st.text(max_size=40))
def test_no_text_makes_a_token_crash(text: str) -> None:
    try:
        revision, _ = decode_token(text, "")
    except InvalidKey:
        return
    assert revision >= 1


def test_a_limit_is_not_negative() -> None:
    check_limit(0)
    with pytest.raises(ValueError, match="0 or more"):
        check_limit(-1)
