"""What engines and containers say, made fit to be stored and shown: bounded, and without what a terminal would obey."""

from __future__ import annotations

import re

LAST_LINES = 20
"""Lines of a log that are kept of a lab that is over."""
LAST_LOG_MOST = 2048
"""Bytes of them, UTF-8."""
_MESSAGE_MOST = 300

_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(\x07|\x1b\\)?)")
"""Colours, movements of the cursor, titles of windows: of those that are not ended, what is on their line."""


def one_line(text: str, most: int = _MESSAGE_MOST) -> str:
    """The text as one printable line of at most so many characters."""
    words = " ".join(_printable(_ESCAPES.sub("", text)).split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


def last_lines(log: bytes) -> str:
    """The end of a log: `LAST_LINES` printable lines and `LAST_LOG_MOST` bytes at most, and no half of a character."""
    text = _ESCAPES.sub("", log.decode(errors="replace")).replace("\r\n", "\n")
    lines = [_printable(line) for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    kept = "".join(f"{line}\n" for line in lines[-LAST_LINES:])
    return kept.encode()[-LAST_LOG_MOST:].decode(errors="ignore")


def _printable(text: str) -> str:
    """With a replacement character for each that has no shape of its own; a tab is a space."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\t\n\r" else "\ufffd" for c in text)
