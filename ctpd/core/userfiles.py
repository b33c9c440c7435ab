"""Files that a user names: their paths, and their text, which is UTF-8 with or without a byte order mark."""

import codecs
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctpd.core.errors import UserError

_CONTAINERS = {
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file or an Excel workbook",
    b"PAR1": "a Parquet file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"%PDF": "a PDF file",
}
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32LE",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
}
CONFIGURATION_BYTES = 2**20  # the largest recipe or suite that is read
_HEAD = 4096  # bytes from which an encoding is guessed
_SAMPLE = 2**20  # bytes after the first that is not UTF-8, for the same


def user_path(text: str) -> Path:
    """A path as a user writes it, with `~` for the home directory where there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~name`, and there is no such user
        return Path(text)


def exists(path: Path) -> bool:
    """Whether there is a file or folder; a path that no file system accepts (too long, NUL) does not exist."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def regular_file(path: Path, *, what: str, fix: str) -> Path:
    """The path, if it is a file that can be read.

    Args:
        path: where it should be.
        what: the file in words, such as "data file".
        fix: how to correct the path.

    Raises:
        UserError: it does not exist, or is a folder or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        problem = "does not exist" if is_missing else f"cannot be read ({_reason(error)})"
        raise UserError(f"the {what} '{path}' {problem}", fix=fix) from error
    if stat.S_ISDIR(mode):
        raise UserError(f"the {what} '{path}' is a folder, and a file is needed", fix=fix)
    if not stat.S_ISREG(mode):
        raise UserError(f"the {what} '{path}' is no regular file", fix=fix)
    return path


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """In this block, errors of the operating system and bytes that are not UTF-8 become a `UserError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise wrong_encoding(path) from error
    except OSError as error:
        raise UserError(f"the file cannot be read ({_reason(error)})", where=str(path)) from error


def read_text(path: Path, *, most_bytes: int) -> str:
    """The text of a small UTF-8 file, without its byte order mark.

    Raises:
        UserError: it cannot be read, is larger than ``most_bytes``, or is not UTF-8.
    """
    with readable(path):
        size = path.stat().st_size
        if size > most_bytes:
            raise UserError(
                f"the file has {size / 2**20:,.1f} MiB, more than the {most_bytes / 2**20:,.0f} MiB that are read here",
                where=str(path),
                fix="Check that it is the file you mean",
            )
        text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise wrong_encoding(path)
    return text


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, without its byte order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    with readable(path), path.open(encoding="utf-8-sig", newline="") as handle:
        for line in handle:
            if "\0" in line:
                raise wrong_encoding(path)
            yield line


def wrong_encoding(path: Path) -> UserError:
    """The error for a file that is not UTF-8: where, what it looks like, how to convert it."""
    offset, number, byte = _first_bad_byte(path)
    with path.open("rb") as handle:
        head = handle.read(_HEAD)
    for magic, what in _CONTAINERS.items():
        if head.startswith(magic):
            return UserError(f"the file is {what}, and not text", where=str(path), fix="Unpack or export it as text")
    where = f"{path}, line {number}"
    what = f"the file is not UTF-8 text: byte 0x{byte:02X} at position {offset:,}"
    guess = _guess(head, path, offset)
    if guess is None:
        return UserError(what, where=where, fix="Save it as UTF-8")
    return UserError(
        f"{what}; it looks like {guess}", where=where, fix=f"Save it as UTF-8: `iconv -f {guess} -t UTF-8 OLD > NEW`"
    )


def _first_bad_byte(path: Path) -> tuple[int, int, int]:
    """Position, line and value of the first byte that is no UTF-8 text; a NUL counts, since text has none."""
    offset = number = 0
    with path.open("rb") as handle:
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


def _guess(head: bytes, path: Path, offset: int) -> str | None:
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if 4 * max(even, odd) > len(head):  # of Latin text in UTF-16 every second byte is 0
        return "UTF-16LE" if odd > even else "UTF-16BE"
    if even or odd:
        return None  # binary
    with path.open("rb") as handle:
        handle.seek(offset)
        found = set(handle.read(_SAMPLE))
    return "WINDOWS-1252" if found & set(range(0x80, 0xA0)) else "ISO-8859-1"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
