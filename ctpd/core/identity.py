"""The canonical form of a configuration for hashing. Fields at their default are left out, so that fields can be added.

A new field whose default keeps the old behaviour changes no key. A changed default needs a new version of the stages that
read it; a test compares all defaults with a recorded list.
"""

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel


def identity(value: Any) -> Any:
    """Convert a value to JSON types, without the fields of configurations that equal their default.

    Raises:
        TypeError: the value has no canonical form, and so cannot be part of an identity.
    """
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        given = {name: getattr(value, name) for name in fields}
        return {name: identity(item) for name, item in given.items() if item != _default(fields[name])}
    if isinstance(value, Mapping):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [identity(item) for item in value]
    if isinstance(value, Enum):
        return identity(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical JSON form")


_MISSING = object()


def _default(field: Any) -> Any:
    return _MISSING if field.is_required() else field.get_default(call_default_factory=True)


def canonical(value: Any) -> str:
    """Serialize JSON types in one canonical form: sorted keys, no white space, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of ``value`` (JSON types only), as 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
