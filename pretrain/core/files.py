"""Files that are whole or not there, whatever happens while they are written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name beside a file's own to write to; when that is done it takes the file's place, on disk.

    At any moment the file is the old one or the new one. Where the writing fails nothing is left of it.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        yield part
        sync(part)
        part.replace(file)
        sync(file.parent)
    finally:
        part.unlink(missing_ok=True)
