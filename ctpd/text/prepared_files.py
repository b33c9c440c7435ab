"""Prepared pairs as files: written block by block, so that memory does not grow with the data, and read whole.

`pairs.safetensors` has the arrays of `PreparedPairs` and `pairs.json` the rest; `dropped.jsonl`, if pairs were dropped, lists these.
"""

import json
import shutil
import struct
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ctpd.text.pairs import Place
from ctpd.text.prepare import STARTS, TEXTS, Loss, Preparation, PreparedPairs, from_arrays

PAIRS, META, DROPPED = "pairs.safetensors", "pairs.json", "dropped.jsonl"
_DTYPES = {"int64": "I64", "int32": "I32", "int8": "I8", "bool": "BOOL"}  # numpy's name: that of safetensors
_HEADER_ALIGNMENT = 8


def write_prepared(preparation: Preparation, folder: Path, *, places: Mapping[str, Place | None] | None = None) -> None:
    """Prepare pairs and write them to ``folder``.

    Arrays and texts grow in nameless temporary files of the folder until their sizes are known.

    Args:
        preparation: what is prepared while it is written.
        folder: exists.
        places: by split, the file of a row and its number there, if its source has several.

    Raises:
        UserError: as `Preparation.pieces`.
    """
    with ExitStack() as files:
        arrays: dict[str, _GrowingArray] = {}
        texts = {name: files.enter_context(tempfile.TemporaryFile(dir=folder)) for name in TEXTS}
        for piece in preparation.pieces():
            for name, array in piece.arrays.items():
                if name not in arrays:
                    file = files.enter_context(tempfile.TemporaryFile(dir=folder))
                    arrays[name] = _GrowingArray(file, array.dtype, holds_starts=name.endswith(STARTS))
                arrays[name].append(array)
            for name, of_piece in piece.texts.items():
                if of_piece:
                    file = texts[name]
                    file.write(b", " if file.tell() else b"")
                    file.write(json.dumps(of_piece, ensure_ascii=False)[1:-1].encode())
        if not preparation.has_marks:
            del arrays["marks"]
        _write_arrays(arrays, folder / PAIRS)
        counts = {"dropped": preparation.dropped, "report": preparation.report, "end_tokens": preparation.end_tokens}
        _write_texts(texts, counts, folder / META)
    if preparation.losses:
        with (folder / DROPPED).open("w", encoding="utf-8", newline="\n") as listed:
            for loss in preparation.losses:
                placed = _placed(loss, (places or {}).get(loss.split))
                listed.write(json.dumps(placed._asdict(), ensure_ascii=False) + "\n")


def _placed(loss: Loss, place: Place | None) -> Loss:
    """A dropped pair with the one of several files that it was read from, and its row there."""
    if place is None:
        return loss
    file, row = place(int(loss.row))
    detail = loss.detail.removeprefix(f"{file}, row {row}").lstrip(",: ")  # which the error of a whole split needs
    return loss._replace(source=file, row=str(row), detail=detail)


def read_meta(folder: Path) -> dict[str, Any]:
    """Texts and ids, and counts of dropped and cut rows."""
    meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    return meta


def read_prepared(folder: Path) -> PreparedPairs:
    """Read the prepared pairs that `write_prepared` wrote to ``folder``."""
    from safetensors.numpy import load_file

    return from_arrays(load_file(folder / PAIRS), read_meta(folder))


class _GrowingArray:
    """A flat array in a file; lengths of rows become where rows begin.

    Attributes:
        size: number of elements.
    """

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any], *, holds_starts: bool) -> None:
        self.file, self.dtype = file, dtype
        self._end = 0 if holds_starts else None
        self.size = 0
        if holds_starts:
            self._write(np.zeros(1, dtype=dtype))

    def append(self, array: NDArray[Any]) -> None:
        if self._end is not None:
            array = self._end + np.cumsum(array, dtype=self.dtype)
            self._end = int(array[-1]) if array.size else self._end
        self._write(array)

    def _write(self, array: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(array, dtype=self.dtype).data)
        self.size += array.size


def _write_arrays(arrays: Mapping[str, _GrowingArray], path: Path) -> None:
    """A safetensors file; the library writes only what is in memory.

    Format: the length of the header in 8 bytes, the header as JSON, the arrays, in the library's order: the largest
    elements first, so that all are aligned (https://huggingface.co/docs/safetensors/index#format).
    """
    header, offset = {}, 0
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, arrays[name].dtype.kind == "b", name))
    for name in order:
        array = arrays[name]
        stop = offset + array.size * array.dtype.itemsize
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": [array.size], "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    with path.open("wb") as target:
        target.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            _copy(arrays[name].file, target)


def _write_texts(texts: Mapping[str, IO[bytes]], counts: Mapping[str, Any], path: Path) -> None:
    """One JSON object: a list of each file's texts, and the counts."""
    with path.open("wb") as target:
        target.write(b"{")
        for name, file in texts.items():
            target.write(json.dumps(name).encode() + b": [")
            _copy(file, target)
            target.write(b"], ")
        target.write(json.dumps(counts, ensure_ascii=False).encode()[1:])


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    source.seek(0)
    shutil.copyfileobj(source, target, 2**20)
