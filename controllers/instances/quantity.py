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
_UNITS = (("bytes", 1), ("KiB", 1024), ("MiB", 1024**2), ("GiB", 1024**3), ("TiB", 1024**4))
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
LEAST_CORES = 0.01
"""A millisecond of the tenth of a second by which the kernel shares a processor out: it takes no smaller limit."""
SomeCores = Annotated[float, Field(ge=LEAST_CORES, le=1024), BeforeValidator(_cores), _TOLD]
"""CPU that a lab may ask for."""
SomeBytes = Annotated[int, Field(ge=6 * 1024**2, le=64 * 1024**4), BeforeValidator(_bytes), _TOLD]
"""Memory that a lab may ask for; an engine takes no less than 6 MiB."""


def told_bytes(amount: int) -> str:
    """Bytes as people write them: whole in the largest unit that is not larger, else with at most two decimals."""
    unit, size = max(
        ((unit, size) for unit, size in _UNITS if size <= amount), key=lambda one: one[1], default=_UNITS[0]
    )
    return f"{_short(Decimal(amount) / size)} {unit}"


def told_cores(amount: float) -> str:
    """Cores as people write them."""
    return f"{_short(Decimal(str(amount)))} {'core' if amount == 1 else 'cores'}"


def _short(amount: Decimal) -> str:
    """Two decimals, and those only where they say something; what is too little for them in full."""
    rounded = amount.quantize(Decimal("0.01")) if amount >= Decimal("0.01") else amount
    return f"{rounded.normalize():f}"
