"""Atomic writes of files, so that a crash leaves the old content or the new one, never a part."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block ends, rename it to `file` and flush both to disk.

    At any moment `file` has its old content or its new one. If the block raises, the temporary file is removed.
    """
    temporary = file.with_name(f"{file.name}.part")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(file)
        fsync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)
