"""Numbers as JSON can write them."""

from __future__ import annotations

import math
from typing import Any

DECIMALS = 6  # of scores, probabilities and points


def json_number(value: Any) -> float | None:
    """Return a number that JSON can write: few digits, and null for NaN and infinity."""
    number = float(value)
    return round(number, DECIMALS) if math.isfinite(number) else None
