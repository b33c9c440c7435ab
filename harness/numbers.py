"""The type of a measured number in a record: JSON has no NaN and no infinity."""

import math
from typing import Annotated

from pydantic import BeforeValidator


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A measured number; None (null in JSON) where it was not finite."""
