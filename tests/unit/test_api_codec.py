"""JSON in, and which form an answer takes."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request

from lrm.api.codec import MAX_DEPTH, Accepted, Form, negotiate, parse_documents, parse_json, to_yaml
from lrm.api.status import RequestError

TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"a": {"b": 1, "b": 1}}', "duplicate key 'b'"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 9223372036854775808}', "beyond 64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON|digits"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"a": "\\u0000"}', "zero character"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1', "JSON"),
        (b'{"a": 1} x', "Extra data"),
        (b"[" * 100_000, "deeper than|JSON"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "deeper than"),
        (b"[" * MAX_DEPTH + b'"\\u0000"' + b"]" * MAX_DEPTH, "zero character"),
        (b"[" + b"1," * 300_000 + b"1]", "more than 200000 values"),
    ],
)
def test_json_that_could_not_be_stored_and_given_back_is_refused(body: bytes, told: str) -> None:
    with pytest.raises(RequestError, match=told) as refused:
        parse_json(body)
    assert refused.value.code == 400


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"spec": {"environment": {"A": "fine", "B": "\\u0000"}}}', "spec.environment.B"),
        (b'{"spec": {"durationMinutes": 1000000000000000000000000000000}}', "spec.durationMinutes"),
        (b'{"metadata": {"labels": {"x/y.z": "\\u0000"}}}', "metadata.labels[x/y.z]"),
        (b'{"spec": {"list": [1, {"key\\u0000": 1}]}}', "spec.list[1]['key\\x00']"),
        (b'[{"op": "add", "path": "/spec/a", "value": 1e999}]', "[0].value"),
        (b'"\\u0000"', ""),
    ],
)
def test_what_is_refused_is_named_by_its_field(body: bytes, field: str) -> None:
    for read in (parse_json, lambda body: parse_documents(body, "application/yaml", 1)):
        with pytest.raises(RequestError) as refused:
            read(body)
        assert [cause.field for cause in refused.value.causes] == [field]
        assert str(refused.value).startswith(f"{field or 'the body'}: must not ")


def test_the_field_of_one_of_many_documents_says_which() -> None:
    with pytest.raises(RequestError, match=r"^\[1\]\.b: "):
        parse_documents(b'a: 1\n---\nb: "\\0"\n', "application/yaml", 10)


def test_the_deepest_that_is_allowed_is_the_same_in_json_and_yaml() -> None:
    text = b"[" * MAX_DEPTH + b"1" + b"]" * MAX_DEPTH
    assert parse_documents(text, "application/yaml", 1) == [parse_json(text)]
    with pytest.raises(RequestError, match="deeper"):
        parse_documents(b"[" + text + b"]", "application/yaml", 1)


def test_yaml_cannot_carry_what_json_may_not() -> None:
    for text in (b"a: 9223372036854775808", b"a: 1e999", b'a: "\\0"', b"\xff\xfe", b"a: \xc3"):
        with pytest.raises(RequestError) as refused:
            parse_documents(text, "application/yaml", 10)
        assert refused.value.code == 400


def test_json_with_a_byte_order_mark_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("accept", "form", "why"),
    [
        ("", "json", "curl without a header"),
        ("*/*", "json", "curl"),
        ("application/*", "json", ""),
        ("application/yaml", "yaml", ""),
        ("text/yaml", "yaml", ""),
        (f"{TABLE},application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json", "table", "kubectl get"),
        ("application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json", "json", "an old form is passed over"),
        ("application/vnd.kubernetes.protobuf,application/json", "json", "protobuf is passed over"),
        ("application/json;q=0.5,application/yaml", "yaml", "quality"),
        ("application/yaml;q=0,application/json", "json", "q=0 means never"),
        ("application/yaml;q=x,application/json", "json", "nonsense is not preferred"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "json", "a browser"),
    ],
)
def test_the_best_offered_form_is_taken(accept: str, form: Form, why: str) -> None:
    request = make_mocked_request("GET", "/", headers={"Accept": accept} if accept else {})
    assert negotiate(request, ("json", "yaml", "table")).form == form, why


def test_discovery_is_offered_in_both_of_its_versions() -> None:
    header = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"
    request = make_mocked_request("GET", "/", headers={"Accept": header})
    assert negotiate(request, ("json", "discovery")) == Accepted("discovery", "v2")
    assert negotiate(request).form == "json"


@pytest.mark.parametrize("accept", ["text/html", "application/vnd.kubernetes.protobuf", TABLE, "application/json;q=0"])
def test_what_is_not_offered_is_406(accept: str) -> None:
    request = make_mocked_request("GET", "/", headers={"Accept": accept})
    with pytest.raises(RequestError) as refused:
        negotiate(request)
    assert (refused.value.code, refused.value.reason) == (406, "NotAcceptable")


def test_yaml_out_keeps_the_order_and_reads_back() -> None:
    raw = b'{"kind":"K","apiVersion":"v1","metadata":{"name":"yes","note":"2026-01-01"},"n":1}'
    text = to_yaml(raw)
    assert text.startswith(b"kind: K\napiVersion: v1\n")
    assert parse_documents(text, "application/yaml", 1) == [parse_json(raw)]
