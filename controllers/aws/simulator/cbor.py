"""CBOR (RFC 8949) as boto3 and CloudWatch speak it: what JSON has, byte strings, and times as seconds since 1970.

Called by `controllers.aws.simulator.cloudwatch`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

_BREAK = 0xFF
_ENDLESS = 31
_SIMPLE = {20: False, 21: True, 22: None, 23: None}
_FLOATS = {25: ">e", 26: ">f", 27: ">d"}


def dumps(value: Any) -> bytes:  # noqa: PLR0911 - one way out per type
    """A value as CBOR; a `datetime` becomes a tagged number of seconds."""
    match value:
        case None:
            return b"\xf6"
        case bool():
            return b"\xf5" if value else b"\xf4"
        case int():
            return _head(0, value) if value >= 0 else _head(1, -1 - value)
        case float():
            return b"\xfb" + struct.pack(">d", value)
        case str():
            text = value.encode()
            return _head(3, len(text)) + text
        case bytes():
            return _head(2, len(value)) + value
        case datetime():
            return b"\xc1" + dumps(value.timestamp())
        case Mapping():
            return _head(5, len(value)) + b"".join(dumps(k) + dumps(v) for k, v in value.items())
        case Sequence():
            return _head(4, len(value)) + b"".join(map(dumps, value))
    raise TypeError(f"{type(value).__name__} has no CBOR here")


def loads(content: bytes) -> Any:
    """The value of CBOR; times are numbers of seconds. Raises `ValueError`."""
    reader = _Reader(content)
    try:
        value = reader.item()
    except (IndexError, struct.error, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"not CBOR: {error!r}") from error
    if reader.position != len(content):
        raise ValueError("something follows the CBOR")
    return value


def _head(major: int, number: int) -> bytes:
    for info, width in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if info == 24 and number < 24:
            return bytes([major << 5 | number])
        if number < 1 << 8 * width:
            return bytes([major << 5 | info]) + number.to_bytes(width, "big")
    raise TypeError("a number of more than 64 bits has no CBOR here")


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0

    def item(self) -> Any:  # noqa: PLR0911 - one way out per major type
        major, info = divmod(self._take(1)[0], 32)
        match major:
            case 0:
                return self._number(info)
            case 1:
                return -1 - self._number(info)
            case 2:
                return self._string(info)
            case 3:
                return self._string(info).decode()
            case 4:
                return [self.item() for _ in self._items(info)]
            case 5:
                return {self.item(): self.item() for _ in self._items(info)}
            case 6:
                self._number(info)  # the only tag in use says that a number is a time
                return self.item()
        if info in _FLOATS:
            (value,) = struct.unpack(_FLOATS[info], self._take(1 << info - 24))
            return value
        return _SIMPLE[info]

    def _take(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        if self.position > len(self._content):
            raise IndexError("it breaks off")
        return self._content[start : self.position]

    def _number(self, info: int) -> int:
        if info < 24:
            return info
        if info > 27:
            raise KeyError(info)
        return int.from_bytes(self._take(1 << info - 24), "big")

    def _string(self, info: int) -> bytes:
        if info != _ENDLESS:
            return self._take(self._number(info))
        return b"".join(self._string(self._take(1)[0] % 32) for _ in self._until_break())

    def _items(self, info: int) -> Any:
        return self._until_break() if info == _ENDLESS else range(self._number(info))

    def _until_break(self) -> Any:
        while self._content[self.position] != _BREAK:
            yield None
        self.position += 1
