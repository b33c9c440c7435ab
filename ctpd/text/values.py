"""What a cell of a row holds, in words, and the error of a row that is no pair."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from ctpd.core.errors import UserError


class BadRow(UserError):
    """A row that is no pair.

    Attributes:
        reason: one of `ctpd.text.pairs.DROP_REASONS`.
    """

    def __init__(self, what: str, *, where: str, fix: str, reason: str = "malformed") -> None:
        super().__init__(what, where=where, fix=fix)
        self.reason = reason


class WrongForm(BadRow):
    """A row in another form than those that are read: all rows of its source may be in it."""


class WrongColumns(WrongForm):
    """A row whose columns have other names than those that are read: all rows of its source will have."""


def valid_text(text: str, *, where: str) -> str:
    """The text.

    Raises:
        BadRow: it has no form in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"character {error.start} of the text is half of a surrogate pair, which no tokenizer reads",
            where=where,
            fix="Write the file again as valid UTF-8",
        ) from None
    return text


def is_filled(value: object) -> bool:
    """Whether a cell holds anything: not null, false, or an empty text, list or object, also as JSON text."""
    if isinstance(value, np.ndarray):
        return value.size > 0
    if isinstance(value, str):  # some data sets store tools as JSON text
        return value.strip() not in ("", "[]", "{}", "null")
    return not is_null(value) and value is not False and not (isinstance(value, Sequence | Mapping) and not value)


def is_null(value: object) -> bool:
    """Whether a cell is null; of a data frame that is NaN."""
    return value is None or (isinstance(value, float) and bool(np.isnan(value)))


def as_list(value: object) -> object:
    """The value, or the list that an array holds: pandas reads the lists of a Parquet file as arrays."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def kind(value: object) -> str:
    """The type and the beginning of a value, for errors."""
    if is_null(value):
        return "nothing (null)"
    try:
        text = json.dumps(value, default=str)
    except (RecursionError, TypeError, ValueError):  # nested deeply, or keys that JSON has not
        return type(value).__name__
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
