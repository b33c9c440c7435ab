"""Files that a user names: their paths, and their text, with or without a byte order mark."""

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctpd.core.archives import open_bytes
from ctpd.core.errors import UserError
from ctpd.core.text_encoding import check_mark, not_in_encoding, wrong_encoding

CONFIGURATION_BYTES = 2**20  # the largest recipe or suite that is read
LONGEST_LINE = 2**28
"""Characters of the longest line, and of the longest row of a CSV file: what is longer has no end, or is no data."""
_MARK = "\ufeff"  # byte order mark
_PIECE = 2**20  # characters read at once


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


def is_folder(path: Path) -> bool:
    """Whether there is a folder; a path that no file system accepts is none."""
    return exists(path) and path.is_dir()


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


def text_lines(path: Path, *, encoding: str | None = None) -> Iterator[str]:
    """The lines of a text file with their ends, unpacked and without a byte order mark.

    Args:
        path: the file; compressed if its name ends in `.gz` or `.zst`.
        encoding: Python's name; left out, UTF-8.

    Raises:
        UserError: it cannot be read or unpacked, is not in that encoding, or has a line without end.
    """
    parts: list[str] = []
    size = 0
    for piece in text_pieces(path, encoding=encoding):
        parts.append(piece)
        size += len(piece)
        if piece.endswith(("\n", "\r")):
            yield "".join(parts)
            parts, size = [], 0
        elif size > LONGEST_LINE:
            raise too_long(str(path), "a line")
    if parts:
        yield "".join(parts)


def too_long(where: str, what: str) -> UserError:
    """The error for a line or a row that has no end."""
    return UserError(
        f"{what} has more than {LONGEST_LINE:,} characters",
        where=where,
        fix="Check that it is the file you mean: a row is a prompt and two responses",
    )


def text_pieces(path: Path, *, encoding: str | None = None) -> Iterator[str]:
    """The text of a file as `text_lines` reads it, in pieces: each is a line, or a part of a long one.

    Raises:
        UserError: it cannot be read or unpacked, or is not in that encoding.
    """
    with readable(path), open_bytes(path) as raw:
        if encoding is not None:
            check_mark(path, raw.peek(4)[:4], encoding)
        handle = io.TextIOWrapper(raw, encoding=encoding or "utf-8", newline="")
        try:
            piece = handle.readline(_PIECE).removeprefix(_MARK)
            while piece:
                if "\0" in piece:
                    raise _not_text(path, encoding, None)
                yield piece
                piece = handle.readline(_PIECE)
        except UnicodeError as error:
            raise _not_text(path, encoding, error) from error


def _not_text(path: Path, encoding: str | None, error: UnicodeError | None) -> UserError:
    return wrong_encoding(path, is_data=True) if encoding is None else not_in_encoding(path, encoding, error)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
