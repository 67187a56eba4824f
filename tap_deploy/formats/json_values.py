"""Numbers in JSON."""

from __future__ import annotations

import math
from typing import Any

DECIMALS = 6  # decimals of scores, probabilities and points


def json_number(value: Any) -> float | None:
    """Return a number for JSON, rounded to ``DECIMALS``; None for NaN and infinity."""
    number = float(value)
    return round(number, DECIMALS) if math.isfinite(number) else None
