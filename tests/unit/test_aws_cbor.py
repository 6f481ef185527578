"""The simulator's CBOR: what boto3 writes it reads, and what it writes boto3 reads."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers.aws.simulator.cbor import dumps, loads

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_was_written_is_read(value: Any) -> None:
    assert loads(dumps(value)) == value


@pytest.mark.parametrize(
    ("content", "value", "why"),
    [
        ("c11a6955b900", 1767225600, "a time is its number of seconds"),
        ("9f0102ff", [1, 2], "a list without a length ends at its break"),
        ("bf6161f5ff", {"a": True}, "so does a map"),
        ("7f61616162ff", "ab", "and a text in pieces"),
        ("f93c00", 1.0, "half a float"),
        ("fa7f800000", math.inf, "a single float"),
        ("f7", None, "undefined is nothing"),
    ],
)
def test_forms_that_only_others_write(content: str, value: Any, why: str) -> None:
    assert loads(bytes.fromhex(content)) == value, why


@pytest.mark.parametrize("content", ["", "82", "61", "1c", "fc", "9f01", "0102", "61ff"])
def test_what_is_no_cbor_is_an_error(content: str) -> None:
    with pytest.raises(ValueError, match="CBOR"):
        loads(bytes.fromhex(content))


def test_a_time_is_tagged_and_what_has_no_form_is_refused() -> None:
    assert dumps(datetime(2026, 1, 1, tzinfo=UTC))[:1] == b"\xc1"
    for value in (object(), 2**64):
        with pytest.raises(TypeError):
            dumps(value)
