"""What can go wrong between us and an engine; its class tells whether the same call can succeed later.

EngineError
├── EngineUnavailable   no answer, or no sensible one: whether a call had its effect is not known
├── EngineNotFound      it has no such container, network, volume or image (404)
├── EngineConflict      the name is taken, or something is in use or in progress (409, and 403 of networks)
├── EngineRefused       it will not do this, however often it is asked (400 and the like; 500 where the kernel refuses)
└── EngineFailed        it tried and failed, in its own words (500)
"""

from __future__ import annotations

from controllers.containers.words import one_line

_KERNEL_REFUSES = ("OCI runtime", "invalid argument")
"""Of a 500: what the kernel was asked for can never be, such as a limit that is too small. All else that stops a
container from being started may pass: no memory, no space, no port, a task that was not made in time."""


class EngineError(Exception):
    """Base; the text is the engine's own where it has said anything."""


class EngineUnavailable(EngineError):  # noqa: N818 - it says what happened
    """No answer, or no sensible one: nothing is known."""


class EngineNotFound(EngineError):  # noqa: N818 - it says what happened
    """It has no such thing."""


class EngineConflict(EngineError):  # noqa: N818 - it says what happened
    """The name is taken, or something is in use or in progress."""


class EngineRefused(EngineError):  # noqa: N818 - it says what happened
    """It will not do this, however often it is asked."""


class EngineFailed(EngineError):  # noqa: N818 - it says what happened
    """It tried, and failed."""


def plain(message: object) -> str:
    """What a call failed with, in one line, without the HTTP library's word for its way of doing TLS."""
    return one_line(str(message).replace(" ssl:default", ""), 1000)


def of_status(status: int, message: str) -> EngineError:
    """The error for an answer that is none of success."""
    text = plain(message) or f"status {status}"
    if status == 404:
        return EngineNotFound(text)
    if status == 409 or (status == 403 and "active endpoints" in text):
        return EngineConflict(text)
    if 400 <= status < 500:
        return EngineRefused(text)
    if status == 500 and all(words in text for words in _KERNEL_REFUSES):
        return EngineRefused(text)
    if status == 500:
        return EngineFailed(text)
    return EngineUnavailable(text)
