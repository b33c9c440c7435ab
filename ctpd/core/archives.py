"""The bytes of a file, unpacked while they are read where the ending of its name says that it is compressed."""

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from ctpd.core.errors import UserError, shortened

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""How a file is compressed, by the last ending of its name."""

FREE_BYTES = 2**28
MOST_EXPANSION = 200  # gzip can reach 1,032 and zstd far more; texts and tables of numbers stay below 50
"""An archive may expand to so many bytes whatever its size, and beyond that to so many times its size."""

_BUFFER = 2**16


def compression(path: Path) -> str | None:
    """How a file is compressed, as far as its name says: `gzip`, `zstd` or None."""
    return COMPRESSIONS.get(path.suffix.lower())


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file for reading its bytes, unpacked.

    Reading raises:
        UserError: the archive is damaged or cut short, or expands more than any data do.
        OSError: the file cannot be read.
    """
    how = compression(path)
    if how == "zstd":
        _check_zstd(path)
    raw = path.open("rb")
    return raw if how is None else io.BufferedReader(_Unpacked(raw, path, how), _BUFFER)


def _check_zstd(path: Path) -> None:
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        raise UserError("the installed pyarrow cannot read zstd", where=str(path), fix="Unpack it and give that file")


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a file, which is closed with it."""

    def __init__(self, raw: IO[bytes], path: Path, how: str) -> None:
        self._raw, self._path, self._how = raw, path, how
        self._size, self._seen = path.stat().st_size, 0
        self._stream = _stream(raw, how)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        room = memoryview(buffer).cast("B")
        data = self._read(len(room))
        self._seen += len(data)
        if self._seen > max(FREE_BYTES, MOST_EXPANSION * self._size):
            raise UserError(
                f"the file expands to more than {MOST_EXPANSION} times its size, and no data do",
                where=str(self._path),
                fix="Check that it is the file you mean; if it is, unpack it and give the unpacked file",
            )
        room[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except (EOFError, zlib.error, ValueError, OSError) as error:  # Arrow's errors are OSError and ValueError
            if isinstance(error, OSError) and error.errno is not None:
                raise
            words = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the file is no whole {self._how} archive: it is damaged or cut short ({shortened(words, most=200)})",
                where=str(self._path),
                fix="Copy or download it again; a file that is not compressed needs a name without "
                f"'{self._path.suffix}'",
            ) from error

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._raw.close()
        super().close()


def _stream(raw: IO[bytes], how: str) -> IO[bytes]:
    if how == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb"))
    import pyarrow as pa

    return cast(IO[bytes], pa.CompressedInputStream(raw, how))
