"""A manifest: the size and SHA-256 of every file in a folder, to notice damage."""

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pretrain.core.files import fsync, read_json

NAME = "manifest.json"


class Damaged(Exception):
    """A folder differs from its manifest. The message names the file and the difference."""


def describe(file: Path) -> tuple[int, str]:
    """The size of a file in bytes, and its SHA-256."""
    with file.open("rb") as handle:
        return file.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(folder: Path, known: Mapping[str, tuple[int, str]] = MappingProxyType({}), **about: Any) -> None:
    """Write the manifest of all files in a folder, and wait until everything is on disk.

    Args:
        folder: without folders in it.
        known: what `describe` gives, of files by name for which it is known already.
        about: further entries of the manifest, plain JSON.

    Raises:
        OSError: it can't be written.
    """
    about_files = {path.name: known.get(path.name) or describe(path) for path in sorted(folder.iterdir())}
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in about_files.items()}
    with (folder / NAME).open("w") as file:
        json.dump({**about, "files": files}, file, indent=1)
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)


def _is_of_the_system(name: str) -> bool:
    """Whether file managers leave such a file in any folder (.DS_Store, ._x, Thumbs.db)."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def verify(folder: Path) -> list[str]:
    """Compare a folder with its manifest.

    Returns:
        the names of its files.

    Raises:
        Damaged: a file is missing, is not in the manifest, or has another size or hash, or the manifest can't be read.
    """
    try:
        files = read_json(folder / NAME)["files"]
        expected = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in files.items()}
        found = {path.name for path in folder.iterdir() if not _is_of_the_system(path.name)} - {NAME}
        for name in sorted({*expected} ^ found):
            raise Damaged(f"{name} is {'missing' if name in expected else 'not in its manifest'}")
        for name, (size, digest) in expected.items():
            if not stat.S_ISREG((folder / name).lstat().st_mode):  # opening a pipe would wait for a writer
                raise Damaged(f"{name} is not a regular file")
            if (actual := (folder / name).stat().st_size) != size:
                raise Damaged(f"{name} has {actual:,} bytes, its manifest says {size:,}")
            if describe(folder / name)[1] != digest:
                raise Damaged(f"the bytes of {name} are not those that were written (SHA-256)")
        return [*expected]
    except FileNotFoundError:
        raise Damaged(f"it has no {NAME}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"it can't be read: {type(error).__name__}: {' '.join(str(error).split())}") from None
