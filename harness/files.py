"""Names of files for rows and tables, whose own names may hold any characters."""

import hashlib
import re

DIGITS = 8
LONGEST = 80  # characters of a name that are kept; a file system allows 255 bytes in all
_LIKE_DIGEST = re.compile(rf"(?:^|-)[0-9a-f]{{{DIGITS}}}$")


def file_stem(name: str) -> str:
    """A file name, without its suffix, that no other name has, on a file system that ignores case as well.

    A name of the characters a-z, 0-9, `_` and `-` is kept. Any other name, a long one, and one that ends like a digest
    is reduced to these characters, and a digest of the whole name makes it unique: ``mu: -1`` and ``mu: 1`` become
    ``mu-1-`` with two different digests. The result never leaves the folder that it is put into.
    """
    kept = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
    if kept and kept == name and len(name) <= LONGEST and not _LIKE_DIGEST.search(name):
        return kept
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]
    kept = kept[:LONGEST].rstrip("-")
    return f"{kept}-{digest}" if kept else digest
