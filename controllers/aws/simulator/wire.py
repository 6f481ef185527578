"""EC2's wire format: flat form parameters in, XML out; and the error that becomes an XML error answer.

Knows nothing of instances. Called by the other files of the simulator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15/"

_DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class CloudError(Exception):
    """A refusal or failure as EC2 words it."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status


def tree(parameters: Mapping[str, str]) -> dict[str, Any]:
    """`{"Tag.1.Key": "a"}` → `{"Tag": ["…"]}`: dots are nesting, numbers are places in a list."""
    root: dict[str, Any] = {}
    for name, value in parameters.items():
        node = root
        *path, last = name.split(".")
        for part in path:
            below = node.setdefault(part, {})
            if not isinstance(below, dict):
                raise CloudError("InvalidParameter", f"the parameter {name} contradicts another one")
            node = below
        if isinstance(node.get(last), dict):
            raise CloudError("InvalidParameter", f"the parameter {name} contradicts another one")
        node[last] = value
    listed = _listed(root)
    if isinstance(listed, list):
        raise CloudError("InvalidParameter", "parameters have names")
    return listed


def _listed(node: dict[str, Any]) -> dict[str, Any] | list[Any]:
    below = {key: _listed(value) if isinstance(value, dict) else value for key, value in node.items()}
    if below and all(key.isdecimal() for key in below):
        return [below[key] for key in sorted(below, key=int)]
    return below


def text(parameters: Mapping[str, Any], name: str, default: str = "") -> str:
    """A parameter that is one value."""
    value = parameters.get(name, default)
    if not isinstance(value, str):
        raise CloudError("InvalidParameterValue", f"{name} must be one value")
    if _NOT_XML.search(value):
        raise CloudError("InvalidParameterValue", f"{name} has characters that XML cannot carry")
    return value


def flag(parameters: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """A parameter that is true or false."""
    value = text(parameters, name, "true" if default else "false").lower()
    if value not in ("true", "false"):
        raise CloudError("InvalidParameterValue", f"{name} must be true or false")
    return value == "true"


def number(parameters: Mapping[str, Any], name: str, default: int, lowest: int, highest: int) -> int:
    """A parameter that is a whole number between two others."""
    value = text(parameters, name, str(default))
    if not re.fullmatch(r"-?\d{1,9}", value) or not lowest <= int(value) <= highest:
        raise CloudError("InvalidParameterValue", f"Value ({value}) for parameter {name} is invalid.")
    return int(value)


def structure(parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A parameter that is a structure."""
    value = parameters.get(name, {})
    if not isinstance(value, dict):
        raise CloudError("InvalidParameterValue", f"{name} must be a structure")
    return value


def items(parameters: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A parameter that is a list of structures."""
    value = parameters.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise CloudError("InvalidParameterValue", f"{name} must be a list of structures")
    return value


def texts(parameters: Mapping[str, Any], name: str) -> list[str]:
    """A parameter that is a list of values."""
    value = parameters.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CloudError("InvalidParameterValue", f"{name} must be a list of values")
    return [text({name: item}, name) for item in value]


def answer(action: str, request_id: str, body: Mapping[str, Any]) -> bytes:
    """A good answer: mappings become elements, lists become `item`s, None is left out."""
    inner = _xml({"requestId": request_id, **body})
    return f'{_DECLARATION}<{action}Response xmlns="{NAMESPACE}">{inner}</{action}Response>'.encode()


def error_answer(error: CloudError, request_id: str) -> bytes:
    """EC2's error document."""
    inner = _xml({"Errors": {"Error": {"Code": error.code, "Message": error.message}}, "RequestID": request_id})
    return f"{_DECLARATION}<Response>{inner}</Response>".encode()


def query_error(error: CloudError, request_id: str) -> bytes:
    """The error document of the services that share AWS's query protocol."""
    inner = _xml({"Error": {"Type": "Sender", "Code": error.code, "Message": error.message}, "RequestId": request_id})
    return f"{_DECLARATION}<ErrorResponse>{inner}</ErrorResponse>".encode()


def _xml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case Mapping():
            return "".join(f"<{name}>{_xml(part)}</{name}>" for name, part in value.items() if part is not None)
        case list() | tuple():
            return "".join(f"<item>{_xml(part)}</item>" for part in value)
        case _:
            return escape(str(value))
