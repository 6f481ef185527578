"""Lists among the settings: words with commas between them."""

from __future__ import annotations

import pytest

from lrm.settings import Settings


def test_a_list_is_words_with_commas_between_them() -> None:
    assert Settings(secrets_allow="A, B ,,/run/*").secrets_allow == ("A", "B", "/run/*")
    assert Settings(secrets_allow=("A", "B")).secrets_allow == ("A", "B")


def test_json_is_refused_instead_of_being_one_strange_word() -> None:
    with pytest.raises(ValueError, match="a, b, c"):
        Settings(secrets_allow='["/x/*.yaml"]')
