"""Label and field selectors as Kubernetes writes them: `a=b,c!=d,e in (f,g),!h` and `metadata.name=x,status.phase!=y`.

Values of a kind's own fields are compared without regard to case (enum values are PascalCase, people are not); names
and namespaces exactly. A bad selector is a 400 that says what is wrong; none is ever ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lrm.api.status import RequestError, bad_request
from lrm.fanout import Selector
from lrm.kind import Kind
from lrm.resource import AnyResource

_MAX_TERMS = 100
_TOKEN = re.compile(r"\s*(?:(?P<op>==|!=|=|!|,|\(|\))|(?P<word>[^\s,()=!<>]+)|(?P<bad>\S))")

Labels = dict[str, str]
_Test = Callable[[Labels], bool]


def selector_of(kind: Kind[Any], labels: str, fields: str) -> Selector | None:
    """A test for objects, None when everything matches. Raises 400."""
    label_tests = parse_labels(labels)
    field_tests = parse_fields(kind, fields)
    if not label_tests and not field_tests:
        return None

    def matches(resource: AnyResource) -> bool:
        return all(t(resource.metadata.labels) for t in label_tests) and all(t(resource) for t in field_tests)

    return matches


def parse_labels(text: str) -> list[_Test]:
    """The terms of a label selector. Raises 400."""
    tokens = _tokens(text)
    tests: list[_Test] = []
    while tokens:
        tests.append(_label_term(tokens, text))
        if tokens and (tokens.pop(0) != "," or not tokens):
            raise _bad(text, "terms are separated by single commas")
        if len(tests) > _MAX_TERMS:
            raise _bad(text[:40] + "…", f"more than {_MAX_TERMS} terms")
    return tests


def parse_fields(kind: Kind[Any], text: str) -> list[Callable[[AnyResource], bool]]:
    """The terms of a field selector. Raises 400, also for a field that the kind does not offer."""
    return [_field_test(kind, term) for term in field_terms(text)]


@dataclass(frozen=True, slots=True)
class FieldTerm:
    """One term of a field selector: `name=value`, or with `wanted` False `name!=value`."""

    name: str
    value: str
    wanted: bool


def field_terms(text: str) -> list[FieldTerm]:
    """What a field selector says, whatever its fields are. Raises 400."""
    terms: list[FieldTerm] = []
    for part in _split_escaped(text):
        match = re.match(r"\s*([^=!\s]+)\s*(==|=|!=)(.*)", part, re.DOTALL)
        if not match:
            raise bad_request(f"field selector {part!r} is not of the form field=value or field!=value")
        terms.append(FieldTerm(match[1], re.sub(r"\\(.)", r"\1", match[3].strip()), match[2] != "!="))
    if len(terms) > _MAX_TERMS:
        raise bad_request(f"more than {_MAX_TERMS} terms in a field selector")
    return terms


def _field_test(kind: Kind[Any], term: FieldTerm) -> Callable[[AnyResource], bool]:
    if term.name == "metadata.name":
        return lambda r: (r.metadata.name == term.value) is term.wanted
    if term.name == "metadata.namespace":
        return lambda r: (r.metadata.namespace == term.value) is term.wanted
    read = kind.fields.get(term.name)
    if read is None:
        raise unknown_field(term.name, kind.plural, ["metadata.name", "metadata.namespace", *kind.fields])
    folded = term.value.casefold()
    return lambda r: (str(read(r)).casefold() == folded) is term.wanted


def unknown_field(name: str, plural: str, known: Iterable[str]) -> RequestError:
    """400: a list of this kind cannot be selected by that field."""
    listed = ", ".join(sorted(set(known)))
    return bad_request(f'field label not supported: "{name}"; {plural} can be selected by {listed}')


def _label_term(tokens: list[str], text: str) -> _Test:
    first = tokens.pop(0)
    if first == "!":
        key = _word(tokens, text)
        return lambda labels: key not in labels
    if first in _OPERATORS:
        raise _bad(text, f"a key was expected, not {first!r}")
    key = first
    if not tokens or tokens[0] == ",":
        return lambda labels: key in labels
    operator = tokens.pop(0)
    if operator in ("=", "=="):
        value = _value(tokens)
        return lambda labels: labels.get(key) == value
    if operator == "!=":
        value = _value(tokens)
        return lambda labels: labels.get(key) != value
    if operator in ("in", "notin"):
        values = _values(tokens, text)
        if operator == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    raise _bad(text, f"{operator!r} is not one of =, ==, !=, in, notin")


def _values(tokens: list[str], text: str) -> frozenset[str]:
    if not tokens or tokens.pop(0) != "(":
        raise _bad(text, "in and notin want values in parentheses")
    values = [_value(tokens)]
    while tokens and tokens[0] == ",":
        tokens.pop(0)
        values.append(_value(tokens))
    if not tokens or tokens.pop(0) != ")":
        raise _bad(text, "a parenthesis is not closed")
    return frozenset(values)


def _value(tokens: list[str]) -> str:
    """A value may be empty: `a=` and `a in (,b)` are allowed."""
    return tokens.pop(0) if tokens and tokens[0] not in _OPERATORS else ""


def _word(tokens: list[str], text: str) -> str:
    if not tokens or tokens[0] in _OPERATORS:
        raise _bad(text, "a key was expected")
    return tokens.pop(0)


_OPERATORS = frozenset({"==", "!=", "=", "!", ",", "(", ")"})


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    for match in _TOKEN.finditer(text):
        if match["bad"]:
            raise _bad(text, f"{match['bad']!r} has no meaning here")
        found.append(match["op"] or match["word"])
    return found


def _split_escaped(text: str) -> list[str]:
    """At commas that no backslash precedes."""
    parts = re.findall(r"(?:\\.|[^,\\])+", text, re.DOTALL)
    if sum(len(p) for p in parts) + max(len(parts) - 1, 0) != len(text):
        raise bad_request(f"field selector {text[:80]!r} has an empty term or ends in a backslash")
    return parts


def _bad(text: str, why: str) -> RequestError:
    return bad_request(f"unable to parse label selector {text[:200]!r}: {why}")
