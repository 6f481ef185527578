"""Amounts of CPU and memory as Kubernetes writes them (`500m`, `1.5`, `256Mi`, `1G`), as numbers in the model.

Source: Kubernetes API conventions, "Quantity". On the wire they are numbers: cores, and bytes.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

_SUFFIXES = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{s: Decimal(1000) ** (i + 1) for i, s in enumerate(("k", "M", "G", "T"))},
    **{s: Decimal(1024) ** (i + 1) for i, s in enumerate(("Ki", "Mi", "Gi", "Ti"))},
}
_QUANTITY = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)([a-zA-Z]{0,2})")


def _amount(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value.strip())
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"{value[:40]!r} is no quantity; write 2, 0.5, 500m, 512Mi or 2Gi")
    return Decimal(match[1]) * _SUFFIXES[match[2]]


def _cores(value: Any) -> Any:
    amount = _amount(value)
    return float(amount) if isinstance(amount, Decimal) else amount


def _bytes(value: Any) -> Any:
    amount = _amount(value)
    if not isinstance(amount, Decimal):
        return amount
    if amount != amount.to_integral_value():
        raise ValueError(f"{value[:40]!r} is no whole number of bytes")
    return int(amount)


Cores = Annotated[float, BeforeValidator(_cores)]
"""CPU, in cores."""
Bytes = Annotated[int, BeforeValidator(_bytes)]
"""Memory, in bytes."""

_TOLD = WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
SomeCores = Annotated[float, Field(gt=0, le=1024), BeforeValidator(_cores), _TOLD]
"""CPU that a lab may ask for."""
SomeBytes = Annotated[int, Field(ge=6 * 1024**2, le=64 * 1024**4), BeforeValidator(_bytes), _TOLD]
"""Memory that a lab may ask for; an engine takes no less than 6 MiB."""
