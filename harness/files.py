"""Names of files for rows and tables, whose own names may hold any characters."""

import hashlib
import re

DIGITS = 8


def file_stem(name: str) -> str:
    """A file name, without its suffix, that no other name has, on a file system that ignores case as well.

    A name of the characters a-z, 0-9, `_` and `-` is kept. Any other is reduced to these characters, and a digest of
    the whole name makes it unique: ``mu: -1`` and ``mu: 1`` become ``mu-1-`` with two different digests.
    """
    kept = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
    if kept == name:
        return kept
    digest = hashlib.sha256(name.encode()).hexdigest()[:DIGITS]
    return f"{kept}-{digest}" if kept else digest
