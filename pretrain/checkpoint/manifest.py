"""What a folder of files should be: each file's size and SHA-256, in a file of its own."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pretrain.core.files import fsync

NAME = "manifest.json"


class Damaged(Exception):
    """A folder isn't what its manifest says. The message says which file, and how it differs."""


def _hash(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def seal(folder: Path, **about: Any) -> None:
    """Write the manifest of all that is in a folder, and wait until everything is on disk.

    Args:
        folder: flat, without folders in it.
        about: what else the manifest says of it.
    """
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in sorted(folder.iterdir())}
    with (folder / NAME).open("w") as file:
        json.dump({**about, "files": files}, file, indent=1)
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)


def verify(folder: Path) -> None:
    """Compare a folder with its manifest.

    Raises:
        Damaged: a file is missing, too much, of another size or of other bytes.
    """
    try:
        files = json.loads((folder / NAME).read_text())["files"]
        expected = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in files.items()}
        found = {path.name for path in folder.iterdir()} - {NAME}
        for name in sorted({*expected} ^ found):
            raise Damaged(f"{name} is {'missing' if name in expected else 'not in its manifest'}")
        for name, (size, digest) in expected.items():
            if (given := (folder / name).stat().st_size) != size:
                raise Damaged(f"{name} has {given:,} bytes, its manifest says {size:,}")
            if _hash(folder / name) != digest:
                raise Damaged(f"the bytes of {name} are not those that were written (SHA-256)")
    except FileNotFoundError:
        raise Damaged(f"it has no {NAME}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"it can't be read: {type(error).__name__}: {' '.join(str(error).split())}") from None
