"""Label and field selectors: Kubernetes' grammar, and a 400 for everything else."""

from __future__ import annotations

import pytest

from equipment.api import TELESCOPE, Telescope, telescope
from lrm.api.selectors import parse_fields, parse_labels, selector_of
from lrm.api.status import RequestError


@pytest.mark.parametrize(
    ("text", "labels", "matches"),
    [
        ("", {}, True),
        ("a=b", {"a": "b"}, True),
        ("a==b", {"a": "b"}, True),
        ("a=b", {"a": "c"}, False),
        ("a=b", {}, False),
        ("a!=b", {}, True),
        ("a!=b", {"a": "b"}, False),
        ("a", {"a": ""}, True),
        ("!a", {"a": ""}, False),
        ("! a", {}, True),
        ("a=", {"a": ""}, True),
        ("a=,b=c", {"a": "", "b": "c"}, True),
        ("a in (x, y)", {"a": "y"}, True),
        ("a in (x,y)", {"a": "z"}, False),
        ("a in (x,)", {"a": ""}, True),
        ("a notin (x,y)", {}, True),
        ("a notin (x,y)", {"a": "x"}, False),
        ("a=b,c!=d,e in (f),!g", {"a": "b", "e": "f"}, True),
        ("example.com/track=ccna", {"example.com/track": "ccna"}, True),
        (" a = b , c = d ", {"a": "b", "c": "d"}, True),
        ("in=notin", {"in": "notin"}, True),
    ],
)
def test_labels_match(text: str, labels: dict[str, str], matches: bool) -> None:
    assert all(test(labels) for test in parse_labels(text)) is matches


@pytest.mark.parametrize(
    "text",
    [
        "=b",
        "a=b,",
        ",a",
        "a in x",
        "a in (x",
        "a in",
        "a x",
        "a=b c",
        "(a)",
        "a>1",
        "a!",
        "!",
        "!=b",
        "a==b==c",
        "a=(b)",
    ],
)
def test_a_label_selector_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_labels(text)
    assert refused.value.code == 400


def an_object() -> Telescope:
    made = Telescope.model_validate(telescope("hubble", "Orbit", namespace="space"))
    made.status.phase = "Ready"
    return made


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("metadata.name=hubble", True),
        ("metadata.name==hubble,metadata.namespace=space", True),
        ("metadata.name=Hubble", False),
        ("metadata.name!=hubble", False),
        ("metadata.namespace!=default", True),
        ("status.phase=ready", True),
        ("status.phase=READY", True),
        ("status.phase!=Pending", True),
        ("spec.site=or\\,bit", False),
        ("spec.site=or\\bit", True),
    ],
)
def test_fields_match(text: str, matches: bool) -> None:
    assert all(test(an_object()) for test in parse_fields(TELESCOPE, text)) is matches


@pytest.mark.parametrize(
    "text", ["spec.nothing=1", "metadata.name", "=x", "a=b,,c=d", "metadata.name=x,", "status.phase=x\\"]
)
def test_a_field_selector_that_cannot_be_served_is_refused(text: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_fields(TELESCOPE, text)
    assert refused.value.code == 400


def test_an_unknown_field_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(RequestError, match=r"metadata.name, metadata.namespace, spec.site, status.phase"):
        parse_fields(TELESCOPE, "spec.mirror=1")


def test_nothing_asked_is_no_selector() -> None:
    assert selector_of(TELESCOPE, "", "") is None
    both = selector_of(TELESCOPE, "a=b", "metadata.name=hubble")
    assert both is not None
    assert not both(an_object())
