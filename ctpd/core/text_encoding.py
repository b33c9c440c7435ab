"""Encodings of text: their names, and what is said of a file that is not in the one that it should be in."""

import codecs
import encodings.aliases
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ctpd.core.archives import compression, open_bytes
from ctpd.core.errors import UserError, nearest, shortened

_CONTAINERS = {
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file or an Excel workbook",
    b"PAR1": "a Parquet file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"%PDF": "a PDF file",
}
_COMPRESSED_ENDINGS = {"a gzip file": ".gz", "a zstd file": ".zst"}
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32LE",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
    codecs.BOM_UTF8: "UTF-8",
}
_PYTHONS = {"WINDOWS-1252": "cp1252", **{f"UTF-{n}{end}": f"utf-{n}" for n in (16, 32) for end in ("LE", "BE")}}
"""The codec of Python that reads what iconv calls by another name; UTF-16 and UTF-32 by their mark."""
_UTF8 = ("utf-8", "utf-8-sig")  # of both a byte order mark is accepted
_NOT_OF_FILES = ("idna", "punycode", "unicode-escape", "raw-unicode-escape")  # of host names, of Python's own texts
_HEAD = 4096  # bytes from which an encoding is guessed
_SAMPLE = 2**20  # bytes after the first that is not UTF-8, for the same
_CHUNK = 2**16


def text_codec(name: str) -> str | None:
    """Python's own name of a text encoding; None for UTF-8, with or without a byte order mark.

    Raises:
        UserError: Python has no such encoding, or it is none of text.
    """
    try:
        "".encode(name)  # refuses codecs from bytes to bytes and from text to text
        found = codecs.lookup(name).name
    except (LookupError, ValueError) as error:  # ValueError: a NUL; UnicodeError of the codec `undefined`
        raise _no_codec(name) from error
    if found in _NOT_OF_FILES:
        raise _no_codec(name)
    return None if found in _UTF8 else found


def _no_codec(name: str) -> UserError:
    known = {*encodings.aliases.aliases, *encodings.aliases.aliases.values()}
    return UserError(
        f"there is no encoding of text files {shortened(repr(name))}.{'' if name in known else nearest(name, known)}",
        fix="Give a name that Python knows, such as cp1252, latin-1, utf-16, gbk or shift_jis",
    )


def wrong_encoding(path: Path, *, is_data: bool = False) -> UserError:
    """The error for a file that is not UTF-8: where, what it looks like, how to read or convert it.

    Args:
        path: the file.
        is_data: it is a source of pairs, beside which a recipe can say an encoding.
    """
    opened: Callable[[Path], BinaryIO] = open_bytes if is_data else _open
    offset, number, byte = _first_bad_byte(opened(path))
    head, sample = _bytes(opened(path), 0, _HEAD), _bytes(opened(path), offset, _SAMPLE)
    for magic, what in _CONTAINERS.items():
        if head.startswith(magic):
            ending = _COMPRESSED_ENDINGS.get(what) if is_data and compression(path) is None else None
            fix = "Unpack or export it as text" if ending is None else f"Name it '{path.name}{ending}', or unpack it"
            return UserError(f"the file is {what}, and not text", where=str(path), fix=fix)
    where = f"{path}, line {number}"
    what = f"the file is not UTF-8 text: byte 0x{byte:02X} at position {offset:,}"
    guess = _guess(head, sample)
    if guess is None:
        hint = "" if b"\0" in sample or not is_data else ", or say which encoding it has by `encoding:` beside `path`"
        return UserError(what, where=where, fix=f"Save it as UTF-8{hint}")
    mark = any(head.startswith(mark) for mark in _MARKS)
    codec = _PYTHONS[guess] if mark or guess not in _MARKS.values() else guess.lower()
    convert = f"ave it as UTF-8: `iconv -f {guess} -t UTF-8 OLD > NEW`"
    fix = (
        f"Write `encoding: {codec}` beside `path` in the recipe (`--encoding {codec}` of `ctpd init`), or s{convert}"
        if is_data
        else f"S{convert}"
    )
    return UserError(f"{what}; it looks like {guess}", where=where, fix=fix)


def check_mark(path: Path, head: bytes, encoding: str) -> None:
    """Refuse a file whose byte order mark is that of another encoding than the given one.

    Raises:
        UserError: it is.
    """
    found = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if found is not None and encoding not in (found[:6].lower(), f"{found[:6]}-{found[6:]}".lower()):
        raise UserError(
            f"the file begins with the byte order mark of {found}, and the recipe says that it is {encoding}",
            where=str(path),
            fix=f"Write `encoding: {_PYTHONS[found]}`" if found in _PYTHONS else "Remove `encoding`",
        )


def not_in_encoding(path: Path, encoding: str, error: UnicodeError | None) -> UserError:
    """The error for a file that is not text of the encoding that the recipe gives.

    Args:
        path: the file.
        encoding: Python's name.
        error: of the decoder; None for a NUL, which no text has.
    """
    what = f"the file is not {encoding} text"
    number, byte = _first_bad(path, encoding)
    if byte is not None:
        what += f": byte 0x{byte:02X}"
    elif error is not None and not isinstance(error, UnicodeDecodeError):
        what += f" ({shortened(' '.join(str(error).split()))})"
    elif error is None:
        what += ": it holds a NUL"
    head = _bytes(open_bytes(path), 0, _HEAD)
    guess = _guess(head, head)
    fix = "Correct `encoding`, or save the file as UTF-8"
    if error is not None and _is_utf8(path):
        fix = "It is valid UTF-8: remove `encoding`"
    elif guess is not None and _PYTHONS[guess] != encoding:
        fix = f"It looks like {guess}: correct `encoding`, or save the file as UTF-8"
    return UserError(what, where=f"{path}, line {number}", fix=fix)


def _is_utf8(path: Path) -> bool:
    with open_bytes(path) as handle:
        try:
            return all(line.isascii() or line.decode("utf-8") for line in handle)
        except UnicodeDecodeError:
            return False


def _first_bad(path: Path, encoding: str) -> tuple[int, int | None]:
    """Line and value of the first byte that does not decode; the line of the first NUL, or of the end, and None."""
    decoder = codecs.getincrementaldecoder(encoding)()
    number = 1
    with open_bytes(path) as handle:
        while True:
            chunk = handle.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                good = error.object[: error.start].decode(encoding, errors="replace")
                return number + good.count("\n"), error.object[error.start]
            except UnicodeError:
                return number, None
            nul = text.find("\0")
            number += text.count("\n", 0, nul if nul >= 0 else len(text))
            if nul >= 0 or not chunk:
                return number, None


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _first_bad_byte(opened: BinaryIO) -> tuple[int, int, int]:
    """Position, line and value of the first byte that is no UTF-8 text; a NUL counts, since text has none."""
    offset = number = 0
    with opened as handle:
        for number, line in enumerate(handle, start=1):
            nul = line.find(b"\0")
            try:
                line.decode("utf-8")
                bad = nul
            except UnicodeDecodeError as error:
                bad = error.start if nul < 0 else min(nul, error.start)
            if bad >= 0:
                return offset + bad, number, line[bad]
            offset += len(line)
    return offset, max(number, 1), 0


def _bytes(opened: BinaryIO, start: int, count: int) -> bytes:
    with opened as handle:
        while start > 0 and (passed := len(handle.read(min(start, _SAMPLE)))):  # an archive cannot be sought in
            start -= passed
        return handle.read(count)


def _guess(head: bytes, sample: bytes) -> str | None:
    """What the first bytes, and those from the first that is not UTF-8, look like; None if that cannot be told."""
    for mark, name in _MARKS.items():
        if head.startswith(mark) and name in _PYTHONS:
            return name
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if 4 * max(even, odd) > len(head):  # of Latin text in UTF-16 every second byte is 0
        return "UTF-16LE" if odd > even else "UTF-16BE"
    if even or odd:
        return None  # binary
    high = [byte >= 0x80 for byte in sample]
    in_runs = sum(
        one and (left or right) for left, one, right in zip([False, *high], high, [*high[1:], False], strict=False)
    )
    if 2 * in_runs > sum(
        high
    ):  # Chinese, Japanese, Cyrillic or Greek; of Western text one letter in a word has its accent
        return None
    try:
        sample.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return "WINDOWS-1252"
