"""Messages of a conversation that a cell holds as JSON text, as tables and some data sets store them (docs/data.md)."""

import json
import re
from collections.abc import Mapping

from ctpd.text.messages import ROLE_NAMES, is_message
from ctpd.text.values import BadRow, WrongForm

LONGEST_CELL = 32_767  # characters of a cell in spreadsheets
_TEXTS = ("content", "value", "text", "message", "parts")
_NAMED_ROLE = rf"""["'](?:role|from)["']\s*:\s*["'](?:{"|".join(ROLE_NAMES)})["']"""
_BEGINS = re.compile(r"""\s*[\[(]?\s*\{\s*["']\w+["']\s*:""")
_BEGINS_AS_MESSAGES = re.compile(
    rf"""\s*(?:[\[(]?\s*\{{\s*{_NAMED_ROLE}|[\[(]\s*\{{[^{{}}]*{_NAMED_ROLE}|[\[(]\s*\{{\s*["']content["']\s*:\s*["'])"""
)


def decoded(text: str, *, where: str) -> object:
    """The messages that a text is as JSON, one or a list of them; any other text as it is.

    Raises:
        WrongForm: it begins like messages and is no JSON: it was cut, or is in the notation of another language.
    """
    if not _BEGINS.match(text):
        return text
    try:
        found = json.loads(text, strict=False)  # a line break inside a string stands as it is in some tables
    except (ValueError, RecursionError) as error:
        # A text may go on behind an example of JSON.
        goes_on = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if not goes_on and _BEGINS_AS_MESSAGES.match(text):
            raise _broken(text, error, where) from None
        return text
    if isinstance(found, list):
        return found if found and all(_is_one_of_a_list(item) for item in found) else text
    return found if is_message(found) else text


def is_read_as_text(value: object) -> bool:
    """Whether a cell is not a text that holds messages, or begins like them."""
    try:
        return not isinstance(value, str) or decoded(value, where="") is value
    except BadRow:
        return False


def decoded_where_possible(value: object) -> object:
    """The messages that a cell holds, or the cell as it is."""
    try:
        return decoded(value, where="") if isinstance(value, str) else value
    except BadRow:
        return value


def _is_one_of_a_list(item: object) -> bool:
    if is_message(item):
        return True
    if not isinstance(item, Mapping):
        return False
    return {"role", "content"} <= item.keys() or (item.get("role") in ROLE_NAMES and any(key in item for key in _TEXTS))


def _broken(text: str, error: Exception, where: str) -> WrongForm:
    if re.match(r"\s*(?:\(|\[?\s*\{\s*')", text):
        return WrongForm(
            "the cell holds messages in Python's notation, not as JSON",
            where=where,
            fix="Write such cells with json.dumps, or save the data as jsonl or Parquet",
        )
    cut = f"; its {len(text):,} characters are as many as a spreadsheet keeps" if len(text) == LONGEST_CELL else ""
    return WrongForm(
        f"the cell begins like messages and is no valid JSON ({error}){cut}",
        where=where,
        fix="Write such cells whole with json.dumps, or save the data as jsonl or Parquet; `form: text` in the recipe's "
        "data source if texts are meant",
    )
